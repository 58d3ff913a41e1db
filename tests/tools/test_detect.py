"""The detect tool: pictures, JSON, and files that are none."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import av
import detect as tool
import numpy as np
import pytest
from PIL import Image
from torch.hub import _Faketqdm

from mmdet_efficientdet import load_detector

ROOT = Path(__file__).resolve().parents[2]
PHOTO = ROOT / 'resources' / 'forest.jpg'


def detect(*arguments, cwd):
    return subprocess.run(
        [sys.executable, '-m', 'mmdet_efficientdet', 'detect', *arguments],
        cwd=cwd,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True)


@pytest.mark.slow
def test_folder_with_a_bad_file(tmp_path):
    """The others are drawn and listed; of two with one name, both are."""
    (tmp_path / 'in').mkdir()
    shutil.copy(PHOTO, tmp_path / 'in' / 'a.jpg')
    Image.open(PHOTO).save(tmp_path / 'in' / 'a.png')
    (tmp_path / 'in' / 'b.jpg').write_bytes(b'')
    run = detect('in', '--model', 'trees', '--threshold', '0.25', cwd=tmp_path)
    assert run.returncode == 1, run.stderr
    assert 'b.jpg' in run.stderr and 'Traceback' not in run.stderr
    out = tmp_path / 'detections'
    assert {x.name
            for x in out.iterdir()} == {'a.jpg', 'a_2.jpg', 'detections.json'}
    found = json.loads((out / 'detections.json').read_text())
    assert [x['path'] for x in found] == ['in/a.jpg', 'in/a.png', 'in/b.jpg']
    assert 'b.jpg' in found[2]['error'] and 'boxes' not in found[2]
    expected = load_detector(ROOT / 'zoo' / 'trees')(PHOTO, threshold=0.25)
    assert found[0]['names'] == expected.names == ['Tree'] * len(
        expected.names)
    np.testing.assert_allclose(found[0]['boxes'], expected.boxes, atol=0.02)
    drawn = np.asarray(Image.open(out / 'a.jpg')).astype(int)
    x1, _, x2, y2 = expected.boxes[0].round().astype(int)
    edge = drawn[y2 - 1, x1 + 2:x2 - 1]
    assert (edge[:, 0] - edge[:, 2]).mean() > 60  # yellow


@pytest.mark.slow
@pytest.mark.parametrize('arguments, word', [
    (['x.jpg', '--model', 'tree'], "'trees'"),
    (['empty', '--model', 'trees'], 'no pictures'),
], ids=['model', 'folder'])  # yapf: disable
def test_mistakes(arguments, word, tmp_path):
    """One line, and nothing is written."""
    (tmp_path / 'empty').mkdir()
    run = detect(*arguments, cwd=tmp_path)
    assert run.returncode == 1 and word in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert [x.name for x in tmp_path.iterdir()] == ['empty']


@pytest.mark.slow
def test_without_tqdm(tmp_path, monkeypatch, capsys):
    """PyTorch does not bring it, but a plain bar of its own."""
    monkeypatch.setattr(tool, 'tqdm', _Faketqdm)
    monkeypatch.setattr(
        sys, 'argv',
        ['detect',
         str(PHOTO), '--model', 'trees', '--out',
         str(tmp_path)])
    assert tool.main() == 0
    assert '31 boxes in 1 pictures' in capsys.readouterr().out


@pytest.mark.slow
def test_own_folder(tmp_path, monkeypatch):
    """A drawn picture does not replace the photograph."""
    photo = tmp_path / 'a.jpg'
    shutil.copy(PHOTO, photo)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv',
                        ['detect', '.', '--model', 'trees', '--out', '.'])
    assert tool.main() == 0
    assert photo.read_bytes() == PHOTO.read_bytes()
    assert Image.open('a_2.jpg').size == Image.open(photo).size


@pytest.mark.slow
def test_nothing_can_be_written(tmp_path, monkeypatch):
    """One line says how much is done."""
    (tmp_path / 'detections.json').mkdir()
    monkeypatch.setattr(
        sys, 'argv',
        ['detect',
         str(PHOTO), '--model', 'trees', '--out',
         str(tmp_path)])
    with pytest.raises(SystemExit, match='1 of 1 pictures are done'):
        tool.main()


@pytest.mark.parametrize('threshold', ['30', 'nan', '-1'])
def test_threshold(threshold, capsys):
    with pytest.raises(SystemExit):
        tool.parse_args(['a', '--model', 'b', '--threshold', threshold])
    assert 'from 0 to 1' in capsys.readouterr().err


@pytest.mark.slow
def test_video(tmp_path):
    """The boxes of each frame are in the JSON, beside those of a picture."""
    with Image.open(PHOTO) as photo, av.open(str(tmp_path / 'a.mp4'),
                                             'w') as file:
        stream = file.add_stream('mpeg4', rate=5)
        stream.width, stream.height = photo.size
        for frame in [av.VideoFrame.from_image(photo)] * 2 + [None]:
            file.mux(stream.encode(frame))
    run = detect(
        'a.mp4', str(PHOTO), '--model', 'trees', '--out', 'out', cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert [x.name for x in sorted((tmp_path / 'out').iterdir())
            ] == ['detections.json', 'forest.jpg']
    found = json.loads((tmp_path / 'out' / 'detections.json').read_text())
    assert [(Path(x['path']).name, x.get('frame'))
            for x in found] == [('a.mp4', 0), ('a.mp4', 1),
                                ('forest.jpg', None)]
    assert all(len(x['boxes']) > 10 for x in found)
