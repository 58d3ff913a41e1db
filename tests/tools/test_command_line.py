"""The tools by name, by ``python -m mmdet_efficientdet``, and their help."""
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers.tiny_data import CONFIGS, TOOLS, trained_run

import setup

ROOT = CONFIGS.parents[1]
FOR_MIM = [ROOT / 'tools' / 'test.py', ROOT / 'tools' / 'train.py']
OWN = [
    path.stem for path in sorted((ROOT / 'tools').glob('*.py'))
    if path not in FOR_MIM
]
SCRIPTS = [
    path for path in sorted((ROOT / 'tools').rglob('*.py'))
    if "__name__ == '__main__'" in path.read_text()
    and not path.parent.name.endswith('_parts')  # which a tool runs itself
    and path not in FOR_MIM
]
HEAVY = ('torch', 'mmcv', 'mmdet', 'scipy', 'matplotlib')


def command(*args, cwd, package=ROOT):
    """Runs ``python -m mmdet_efficientdet`` as a user does."""
    return subprocess.run([sys.executable, '-m', 'mmdet_efficientdet', *args],
                          cwd=cwd,
                          env=dict(os.environ, PYTHONPATH=str(package)),
                          capture_output=True,
                          text=True)


def listed(text):
    """Names and descriptions of the list."""
    return dict(re.findall(r'^  (\w+) +(\S.*)$', text, re.M))


@pytest.mark.slow
def test_list(tmp_path):
    """Our tools and the host's scripts, with a line of each."""
    for args in ([], ['--help']):
        done = command(*args, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        names = listed(done.stdout)
        assert list(names)[:len(OWN)] == OWN
        assert {'train', 'test', 'browse_dataset', 'analyze_logs'} <= {*names}
        assert names['train'] == 'Train a detector'  # argparse has it
        assert names['check_dataset'] == (  # the docstring has it
            'Check the data and the recipe of a config before you train with '
            'it.')
    for name in [*names][len(OWN):]:
        assert len(list(TOOLS.rglob(f'{name}.py'))) > 0


@pytest.mark.slow
def test_a_tool_runs_as_by_its_path(tmp_path):
    """Its own name in the usage, its own exit status, its own messages."""
    done = command('prepare_trees', '--help', cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.startswith(
        'usage: python -m mmdet_efficientdet prepare_trees ')
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'photo.jpg').touch()
    done = command('prepare_trees', '--out', 'mine', cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith('prepare_trees.py: --out ')
    assert command('prepare_trees', '--nonsense', cwd=tmp_path).returncode == 2


@pytest.mark.parametrize('name, near', [('chek_dataset', 'check_dataset'),
                                        ('train.py', 'train'), ('qqq', None)])
def test_unknown_name(name, near, tmp_path):
    """The nearest name, if one is near, and the list."""
    done = command(name, '--help', cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    first, _, text = done.stderr.partition('\n')
    assert repr(name) in first
    assert (f'Did you mean {near!r}?' in first) == ('Did you' in first) == (
        near is not None)
    assert [*listed(text)][:len(OWN)] == OWN


@pytest.mark.slow
def test_without_mmdetection(tmp_path):
    """A tool that needs it says so, and what to do."""
    source = """
import sys
sys.modules['mmengine'] = None  # as where it is not installed
from mmdet_efficientdet.__main__ import main
sys.argv = ['', 'report', 'config.py', 'work_dir']
sys.exit(main())
"""
    done = subprocess.run([sys.executable, '-c', source],
                          cwd=tmp_path,
                          env=dict(os.environ, PYTHONPATH=str(ROOT)),
                          capture_output=True,
                          text=True)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert 'mmengine' in done.stderr and 'doctor' in done.stderr


@pytest.mark.slow
def test_wheel(tmp_path, tmp_path_factory):
    """The tools are in the wheel, find their modules, and are found there."""
    source = tmp_path / 'source'
    ignored = shutil.ignore_patterns('.mim', '__pycache__')
    for name in ('mmdet_efficientdet', 'configs', 'tools', 'zoo'):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    done = subprocess.run([
        sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps',
        '--no-build-isolation', '--wheel-dir', tmp_path, source
    ],
                          capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    wheel, = tmp_path.glob('*.whl')
    package = tmp_path / 'site'
    zipfile.ZipFile(wheel).extractall(package)
    top = {path.name for path in package.iterdir()}
    assert top == {
        'mmdet_efficientdet',
        f'{"-".join(wheel.name.split("-")[:2])}.dist-info'
    }
    metadata, = package.glob('*.dist-info/METADATA')
    text = metadata.read_text()
    assert re.search(r'^Requires-Dist: torch', text, re.M)
    assert '# mmdet_efficientdet' in text
    assert not re.search(r'\]\((?!https://)', text)  # works on an index
    zoo = package / 'mmdet_efficientdet' / '.mim' / 'zoo'
    assert {path.name
            for path in (zoo / 'trees').iterdir()
            } == {path.name
                  for path in (ROOT / 'zoo' / 'trees').iterdir()}
    tools = package / 'mmdet_efficientdet' / '.mim' / 'tools'
    assert {path.relative_to(tools)
            for path in tools.rglob('*.py')} == {
                path.relative_to(ROOT / 'tools')
                for path in (ROOT / 'tools').rglob('*.py')
            }

    assert [*listed(command(cwd=tmp_path, package=package).stdout)
            ][:len(OWN)] == OWN
    run = trained_run(tmp_path_factory.getbasetemp())
    done = command(
        'report',
        run.config,
        run.work_dir,
        '--out',
        'page.html',
        cwd=tmp_path,
        package=package)
    assert done.returncode == 0, done.stderr
    assert '<h1>tiny</h1>' in (tmp_path / 'page.html').read_text()
    shutil.copy(ROOT / 'resources' / 'forest.jpg', tmp_path)
    done = command(
        'detect',
        'forest.jpg',
        '--model',
        'trees',
        cwd=tmp_path,
        package=package)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'detections' / 'forest.jpg').is_file()


@pytest.fixture(scope='module')
def helps(tmp_path_factory):
    """What each script prints with --help, from one process for all."""
    source = f'''
import contextlib, io, json, runpy, sys
texts = {{}}
for path in sys.argv[1:]:
    sys.argv, sys.path[0] = [path, '--help'], path.rpartition('/')[0]
    with contextlib.redirect_stdout(io.StringIO()) as file:
        try:
            runpy.run_path(path, run_name='__main__')
        except SystemExit as end:
            assert not end.code, path
    heavy = [name for name in {HEAVY} if name in sys.modules]
    assert not heavy, (path, heavy)
    texts[path] = file.getvalue()
print(json.dumps(texts))
'''
    done = subprocess.run([sys.executable, '-c', source, *map(str, SCRIPTS)],
                          env=dict(os.environ, PYTHONPATH=str(ROOT)),
                          cwd=tmp_path_factory.mktemp('helps'),
                          capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda path: path.stem)
def test_help(helps, path):
    """It says what the tool does and how it is called, before torch loads."""
    text = helps[str(path)]
    own = f'python -m mmdet_efficientdet {path.stem}'
    usage, name = ((own, own) if path.stem in OWN else
                   (path.name, f'python {path.relative_to(ROOT)}'))
    assert text.startswith(f'usage: {usage} ')
    assert name in text.partition('\nExample:\n')[2].partition('\n\n')[0]
    # Every argument has words, and every option its default.
    options = text.partition('\noptions:\n')[2]
    for option in re.split(r'\n(?=  -)', options)[1:]:
        words = option.partition('  ')[2]
        assert len(words.split()) > 3, option


def test_files_are_short():
    """No file of the tools has more than 300 lines."""
    lengths = {
        path.name: len(path.read_text().splitlines())
        for path in Path(ROOT / 'tools').rglob('*.py')
    }
    assert {k: n for k, n in lengths.items() if n > 300} == {}


@pytest.mark.parametrize('tool, arguments', [
    ('report', ['nosuch.py', '.']),
    ('check_dataset', ['nosuch.py']),
    ('convert_checkpoint', ['effdet://tf_efficientdet_d0', 'a.pth', '--config',
                            'nosuch.py']),
    ('convert_checkpoint', ['nosuch.pth', 'a.pth']),
])  # yapf: disable
def test_missing_file(tool, arguments, tmp_path, monkeypatch, capsys):
    """It is named, without a traceback, and nothing is written."""
    missing = next(name for name in arguments if name.startswith('nosuch'))
    script = str(ROOT / 'tools' / f'{tool}.py')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', [script, *arguments])
    with pytest.raises(SystemExit) as end:  # all else would be a traceback
        runpy.run_path(script, run_name='__main__')
    assert end.value.code
    assert missing in f'{end.value.code}{capsys.readouterr()}'
    assert not list(tmp_path.iterdir())


def test_description_for_an_index():
    """With an address, links and pictures lead there; without one, nowhere."""
    text = setup.description('https://example.org/x/blob/v1')
    assert '](https://example.org/x/blob/v1/docs/training.md)' in text
    assert '](https://example.org/x/raw/v1/resources/trees.jpg)' in text
    without = setup.description()
    for page in (text, without):
        assert not re.search(r'\]\((?!https://)', page)
    assert 'Training' in without and '![' not in without
