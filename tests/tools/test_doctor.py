"""What the doctor says of a good and of broken environments."""
import os
import subprocess
import sys
from pathlib import Path

import doctor
import pytest

TOOL = Path(doctor.__file__)
ROOT = TOOL.resolve().parents[1]


def plant_distribution(folder, name, number):
    info = folder / f'{name.replace("-", "_")}-{number}.dist-info'
    info.mkdir()
    (info / 'METADATA'
     ).write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n')


def test_good_environment(monkeypatch, capsys):
    """The environment of the tests has no problems; all parts are printed."""
    monkeypatch.setattr(sys, 'argv', ['doctor'])
    monkeypatch.delenv('MMDET_EFFICIENTDET_WEIGHTS', raising=False)
    assert doctor.main() == 0
    *table, verdict = capsys.readouterr().out.splitlines()
    assert verdict.startswith('OK: no problems')
    for name in (*doctor.TESTED, 'python', 'GPU', 'CPU', 'downloads'):
        assert any(line.split()[0] == name for line in table), name


@pytest.mark.parametrize('name, number, words', [
    ('mmcv-lite', '2.1.0', ['mmcv-lite', 'uninstall', 'mmcv==2.1.0']),
    ('mmcv', '2.2.0', ['2.2.0', '<2.2', 'mmcv==2.1.0']),
    ('onedl-mmcv', '2.3.6', ['uninstall -y mmcv onedl-mmcv']),
    ('onedl-mmdetection', '3.5.1', ['uninstall -y mmdet onedl-mmdetection']),
])
def test_distributions_that_exclude_each_other(name, number, words, tmp_path,
                                               monkeypatch):
    """pip installs these; the doctor names the cause and the commands."""
    for other, its in (('mmcv', '2.1.0'), ('mmdet', '3.3.0'), (name, number)):
        if not list(tmp_path.glob(f'{other}-{its}*')):
            plant_distribution(tmp_path, other, its)
    if name == 'mmcv':  # the first that is found counts
        (tmp_path / 'mmcv-2.1.0.dist-info' / 'METADATA').unlink()
        (tmp_path / 'mmcv-2.1.0.dist-info').rmdir()
    monkeypatch.setattr(sys, 'path', [str(tmp_path)])
    patient = doctor.Doctor()
    patient.check_distributions()
    problem, = patient.problems
    assert all(word in problem for word in words), problem


@pytest.mark.slow
def test_broken_libraries(tmp_path):
    """An OpenCV without libGL and a setuptools of today, in a process.

    The libraries of OpenMMLab fail as well then. They are not reported, since
    their messages name something else.
    """
    error = 'libGL.so.1: cannot open shared object file'
    (tmp_path / 'cv2.py').write_text(f'raise ImportError({error!r})')
    (tmp_path / 'pkg_resources.py').write_text('raise ImportError("gone")')
    environment = dict(
        os.environ,
        PYTHONPATH=str(tmp_path),
        MMDET_EFFICIENTDET_WEIGHTS=str(tmp_path / 'missing'))
    done = subprocess.run([sys.executable, TOOL],
                          env=environment,
                          capture_output=True,
                          text=True)
    assert done.returncode == 1, done.stderr
    problems = [
        line for line in done.stdout.splitlines()
        if line.startswith('PROBLEM: ')
    ]
    assert len(problems) == 3, done.stdout
    assert 'gone' in problems[0] and 'setuptools==80.9.0' in problems[0]
    assert error in problems[1] and 'opencv-python-headless' in problems[1]
    assert 'MMDET_EFFICIENTDET_WEIGHTS' in problems[2]
    assert done.stdout.splitlines()[-1] == '3 problems to fix.'


@pytest.mark.slow
def test_without_mmdetection(tmp_path):
    """Where only PyTorch is installed, the doctor says what works."""
    source = f"""
import runpy, sys
for name in ('mmcv', 'mmdet', 'mmengine', 'mmpretrain'):
    sys.modules[name] = None
sys.argv = ['doctor']
runpy.run_path({str(TOOL)!r}, run_name='__main__')
"""
    done = subprocess.run([sys.executable, '-c', source],
                          cwd=tmp_path,
                          env=dict(os.environ, PYTHONPATH=str(ROOT)),
                          capture_output=True,
                          text=True)
    *_, verdict, last = done.stdout.splitlines()
    assert done.returncode == 1 and 'problems to fix' in verdict, done.stderr
    assert 'MMDetection' in last and 'load_detector' in last


def test_folders(tmp_path, monkeypatch):
    """Too little space and a read-only folder are warnings with advice."""
    patient = doctor.Doctor()
    patient.check_folder('roomy', tmp_path / 'not' / 'yet', 0)
    assert not patient.warnings and 'GB free' in patient.table['roomy']
    patient.check_folder('full', tmp_path, 1e18, 'buy a disk')
    assert 'GB free' in patient.warnings[0] and 'buy a disk' in (
        patient.warnings[0])
    monkeypatch.setattr(os, 'access', lambda *_: False)
    patient.check_folder('locked', tmp_path, 0)
    assert 'cannot be written' in patient.warnings[1]
