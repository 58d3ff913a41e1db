"""Tests of tools/prepare_trees.py, on a small wheel made here."""
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

TOOL = Path(__file__).parents[2] / 'tools' / 'prepare_trees.py'
SPEC = importlib.util.spec_from_file_location('prepare_trees', TOOL)
trees = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(trees)

# Picture: (width, height, boxes xyxy); the line of the cut is at x = 30.
PICTURES = dict(
    one=(50, 24, [(1, 1, 9, 9), (26, 5, 36, 11), (24, 12, 34, 18),
                  (25, 2, 35, 4), (40, 14, 50, 24)]),
    two=(20, 16, [(4, 4, 12, 12)]))
SETS = dict(
    train=(True, (('one', 0, 0, 30, 24), )),
    test=(False, (('one', 30, 0, 50, 24), ('two', 0, 0, 20, 16))))
# By hand: of the boxes cut at 30 the second goes right, the third left, and
# the fourth, cut in half, left.
TEST_BOXES = [(1, [0, 5, 6, 6]), (1, [10, 14, 10, 10]), (2, [4, 4, 8, 8])]


def pixels(name):
    """Return a picture (h, w, 3) BGR that tells x, y and its name."""
    width, height, _ = PICTURES[name]
    y, x = np.mgrid[:height, :width]
    mark = np.full_like(x, 200 + len(SETS) * (name == 'two'))
    return np.stack([mark, y, x], axis=-1).astype(np.uint8)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Make a wheel with PICTURES and let the tool expect it."""
    path = tmp_path / 'small.whl'
    with zipfile.ZipFile(path, 'w') as archive:
        for name, (_, _, boxes) in PICTURES.items():
            archive.writestr(f'data/{name}.png',
                             cv2.imencode('.png', pixels(name))[1].tobytes())
            text = ('<object><name>Tree</name><bndbox><xmin>{}</xmin><ymin>{}'
                    '</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>')
            objects = ''.join(text.format(*box) for box in boxes)
            archive.writestr(f'data/{name}.xml',
                             f'<annotation>{objects}</annotation>')
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(trees, 'WHEEL', trees.WHEEL._replace(sha256=digest))
    monkeypatch.setattr(trees, 'MEMBERS',
                        {name: f'data/{name}'
                         for name in PICTURES})
    monkeypatch.setattr(trees, 'SETS', SETS)
    return path


@pytest.fixture
def out(tmp_path):
    """Return an output folder that does not exist, alone in its parent."""
    return tmp_path / 'data' / 'trees'


def contents(folder):
    """Return {path: bytes} of all files below ``folder``."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob('*') if path.is_file()
    }


def assert_tidy(out, names=('trees', )):
    """Assert that beside the output nothing is left over."""
    left = out.parent.iterdir() if out.parent.exists() else ()
    assert [path.name for path in left] == list(names)


@pytest.mark.parametrize('box, left, right', [
    ([2, 1, 8, 5], [[2, 1, 8, 5]], []),
    ([4, 1, 12, 5], [[4, 1, 10, 5]], []),
    ([8, 1, 12, 5], [[8, 1, 10, 5]], []),
    ([9, 1, 12, 5], [], [[10, 1, 12, 5]]),
    ([10, 1, 12, 5], [], [[10, 1, 12, 5]]),
])
def test_cut_gives_a_box_to_the_side_with_more_of_it(box, left, right):
    boxes = np.array([box], float)
    assert trees.split_boxes(boxes, (0, 0, 10, 20)).tolist() == left
    assert trees.split_boxes(boxes, (10, 0, 20, 20)).tolist() == right
    # The same of a cut across y.
    boxes = boxes[:, [1, 0, 3, 2]]
    for rect, side in ((0, 0, 20, 10), left), ((0, 10, 20, 20), right):
        expected = [[x0, y0, x1, y1] for y0, x0, y1, x1 in side]
        assert trees.split_boxes(boxes, rect).tolist() == expected


def test_areas_share_no_pixel_and_no_box():
    areas = {
        'crop2': (trees.ABOVE, trees.STRIP, trees.BELOW),
        'crop': (trees.LEFT, trees.RIGHT)
    }
    rng = np.random.default_rng(0)
    for name, (width, height) in dict(
            crop2=(2299, 2472), crop=(1249, 1035)).items():
        seen = np.zeros((height, width), int)
        start = rng.integers(0, (width - 100, height - 100), (2000, 2))
        boxes = np.hstack([start, start + rng.integers(1, 100, (2000, 2))])
        owners = 0
        for source, x0, y0, x1, y1 in areas[name]:
            assert source == name
            seen[y0:y1, x0:x1] += 1
            mine = trees.split_boxes(boxes, (x0, y0, x1, y1))
            owners += len(mine)
            assert (mine >= (x0, y0, x0, y0)).all()
            assert (mine <= (x1, y1, x1, y1)).all()
        assert (seen == 1).all() and owners == len(boxes)
    assert trees.CROP2[1:] == (0, 0, 2299, 2472)
    assert trees.LEFT[3] == 760


def test_sets_hold_the_intended_areas():
    areas = {name: set(parts) for name, (_, parts) in trees.SETS.items()}
    assert areas == dict(
        train={trees.CROP2, trees.LEFT},
        tune_train={trees.ABOVE, trees.BELOW, trees.LEFT},
        tune_val={trees.STRIP},
        test={trees.RIGHT},
        osbs={trees.OSBS})
    # What is evaluated is never tiled, so each tree counts once.
    tiled = {name for name, entry in trees.SETS.items() if entry[0]}
    assert tiled == {'train', 'tune_train'}


def test_windows_by_hand():
    assert trees.windows((5, 2, 28, 10), 10, 6).tolist() == [
        [5, 2, 15, 10], [11, 2, 21, 10], [17, 2, 27, 10], [18, 2, 28, 10]
    ]  # yapf: disable
    assert trees.windows((5, 2, 28, 14), 10, 9).tolist() == [
        [5, 2, 15, 12], [14, 2, 24, 12], [18, 2, 28, 12],
        [5, 4, 15, 14], [14, 4, 24, 14], [18, 4, 28, 14]
    ]  # yapf: disable
    # A stride that ends at the border makes no window twice.
    assert trees.windows((0, 0, 20, 10), 10, 5)[:, 0].tolist() == [0, 5, 10]


@pytest.mark.parametrize('size, stride', [(10, 10), (16, 7), (31, 1),
                                          (64, 32)])
def test_windows_cover_the_area_and_no_more(size, stride):
    x0, y0, x1, y1 = rect = (7, 3, 47, 34)
    seen = np.zeros((60, 60), bool)
    for a, b, c, d in trees.windows(rect, size, stride):
        assert (c - a, d - b) == (min(size, 40), min(size, 31))
        seen[b:d, a:c] = True
    assert seen[y0:y1, x0:x1].all() and seen.sum() == 40 * 31


def test_boxes_in_window_by_hand():
    boxes = np.array([
        [12, 22, 16, 24],  # inside
        [6, 22, 14, 24],  # exactly half inside
        [5, 22, 14, 24],  # 4 of 9 inside
        [26, 36, 34, 44],  # a quarter inside, at a corner
        [50, 22, 60, 24],  # outside
        [0, 10, 40, 50],  # around the window: 400 of 1600
    ], float)  # yapf: disable
    window = np.array([10, 20, 30, 40])
    assert trees.boxes_in_window(boxes, window).tolist() == [[2, 2, 6, 4],
                                                             [0, 2, 4, 4]]
    assert trees.boxes_in_window(boxes, window, 0.25).tolist() == [
        [2, 2, 6, 4], [0, 2, 4, 4], [0, 2, 4, 4], [16, 16, 20, 20],
        [0, 0, 20, 20]
    ]  # yapf: disable


def test_every_tree_is_whole_in_some_window():
    start = np.random.default_rng(0).integers(0, (190, 140), (500, 2))
    boxes = np.hstack([start, start + 10])
    whole = np.zeros(500, bool)
    for window in trees.windows((0, 0, 200, 150), 32, 22):
        whole |= ((boxes[:, :2] >= window[:2]) &
                  (boxes[:, 2:] <= window[2:])).all(1)
    assert whole.all()


def test_sets_on_disk(wheel, out):
    trees.prepare(out, wheel, 16, 5)
    assert_tidy(out)
    test = COCO(out / 'test.json')
    assert [(a['image_id'], a['bbox'])
            for a in test.dataset['annotations']] == TEST_BOXES
    train = json.loads((out / 'train.json').read_text())
    for coco in (test.dataset, train):
        assert coco['info'] and coco['licenses']
        assert [(c['id'], c['name'])
                for c in coco['categories']] == [(1, 'Tree')]
        for key in ('images', 'annotations'):
            ids = [entry['id'] for entry in coco[key]]
            assert ids == list(range(1, len(ids) + 1))
        for a in coco['annotations']:
            assert a['area'] == a['bbox'][2] * a['bbox'][3] > 0
            assert a['iscrowd'] == 0 and a['category_id'] == 1
            assert all(isinstance(value, float) for value in a['bbox'])
    images = train['images'] + test.dataset['images']
    names = {entry['file_name'] for entry in images}
    assert names == {path.name for path in (out / 'images').iterdir()}
    # 4 starts in x (0, 5, 10, 14) and 3 in y (0, 5, 8); some have no tree.
    assert len(train['images']) == 12
    used = {a['image_id'] for a in train['annotations']}
    assert used < {i['id'] for i in train['images']}
    receipt = json.loads((out / 'receipt.json').read_text())
    assert receipt['counts'] == dict(
        train=dict(images=12, boxes=len(train['annotations']), trees=3),
        test=dict(images=2, boxes=3, trees=3))
    assert receipt['settings']['wheel_sha256'] == trees.WHEEL.sha256


def test_pixels_are_kept_and_the_sides_share_none(wheel, out):
    trees.prepare(out, wheel, 16, 5)
    columns = {}
    for name in SETS:
        coco = json.loads((out / f'{name}.json').read_text())
        for entry in coco['images']:
            image = cv2.imread(str(out / 'images' / entry['file_name']))
            assert image.shape == (entry['height'], entry['width'], 3)
            mark, y, x = image[0, 0].tolist()
            source = 'one' if mark == 200 else 'two'
            whole = pixels(source)[y:y + len(image), x:x + entry['width']]
            assert np.array_equal(image, whole)
            seen = columns.setdefault((name, source), set())
            seen.update(image[..., 2].ravel().tolist())
    assert columns == {
        ('train', 'one'): set(range(30)),
        ('test', 'one'): set(range(30, 50)),
        ('test', 'two'): set(range(20))
    }


def test_train_boxes_follow_their_pixels(wheel, out):
    trees.prepare(out, wheel, 16, 5)
    coco = json.loads((out / 'train.json').read_text())
    sides = [(1, 1, 9, 9), (24, 12, 30, 18), (25, 2, 30, 4)]
    whole = set()
    for a in coco['annotations']:
        name = coco['images'][a['image_id'] - 1]['file_name']
        image = cv2.imread(str(out / 'images' / name))
        x, y, width, height = map(int, a['bbox'])
        y0, x0 = image[y, x, 1:].tolist()
        y1, x1 = image[y + height - 1, x + width - 1, 1:].tolist()
        box = x0, y0, x1 + 1, y1 + 1
        parents = [
            side for side in sides if side[0] <= x0 and side[1] <= y0
            and x1 < side[2] and y1 < side[3]
        ]
        assert len(parents) == 1
        whole |= {box} & set(parents)
    assert whole == set(sides)


def test_second_run_does_nothing(wheel, out, tmp_path, capsys):
    trees.prepare(out, wheel, 16, 5)
    before = contents(out), out.stat().st_ino
    capsys.readouterr()
    # Nothing to do needs no wheel either.
    trees.prepare(out, tmp_path / 'none.whl', 16, 5)
    assert 'nothing to do' in capsys.readouterr().out
    assert (contents(out), out.stat().st_ino) == before


@pytest.mark.parametrize('damage', [
    lambda out: (out / 'test.json').unlink(),
    lambda out: next((out / 'images').iterdir()).unlink(),
    lambda out: next((out / 'images').iterdir()).write_bytes(b''),
    lambda out: (out / 'receipt.json').write_text('{'),
    lambda out: (out / 'receipt.json').write_text('[]'),
])
def test_a_damaged_output_is_made_anew(wheel, out, damage):
    trees.prepare(out, wheel, 16, 5)
    before = contents(out)
    damage(out)
    trees.prepare(out, wheel, 16, 5)
    assert contents(out) == before
    assert_tidy(out)


def test_other_settings_replace_the_output(wheel, out):
    trees.prepare(out, wheel, 16, 5)
    trees.prepare(out, wheel, 20)
    receipt = json.loads((out / 'receipt.json').read_text())
    assert (receipt['settings']['window'],
            receipt['settings']['stride']) == (20, 10)
    assert all('16x16' not in name or name.startswith('images/two')
               for name in contents(out))
    assert_tidy(out)


def test_two_runs_give_the_same_bytes(wheel, out, tmp_path):
    trees.prepare(out, wheel, 16, 5)
    trees.prepare(tmp_path / 'again', wheel, 16, 5)
    assert contents(out) == contents(tmp_path / 'again')
    assert len(contents(out)) == 2 + 1 + 12 + 2


@pytest.mark.parametrize('change, given', [
    (lambda path: path.unlink(), 'no such file'),
    (lambda path: path.write_bytes(b''), '0 bytes'),
    (lambda path: path.write_bytes(path.read_bytes()[:-7]), 'bytes with'),
    (lambda path: path.write_bytes(path.read_bytes() + b'x'), 'bytes with'),
])
def test_a_wrong_wheel_is_not_opened(wheel, out, monkeypatch, change, given):
    change(wheel)
    monkeypatch.setattr(zipfile, 'ZipFile', None)
    with pytest.raises(ValueError, match=given) as error:
        trees.prepare(out, wheel, 16, 5)
    for part in (str(wheel), trees.WHEEL.sha256, 'pip download'):
        assert part in str(error.value)
    assert_tidy(out, ())


@pytest.mark.parametrize('window, stride', [(16, 0), (16, -1), (16, 9),
                                            (16, 17), (8, None), (0, None)])
def test_a_stride_that_may_lose_trees_is_refused(wheel, out, window, stride):
    with pytest.raises(ValueError, match='from 1 to window - 8') as error:
        trees.prepare(out, wheel, window, stride)
    assert f'--window {window} ' in str(error.value)
    assert_tidy(out, ())
    trees.prepare(out, wheel, 16, 8)


def test_what_was_not_made_here_is_not_replaced(wheel, out):
    out.mkdir(parents=True)
    (out / 'notes.txt').write_text('mine')
    with pytest.raises(ValueError, match='holds something else'):
        trees.prepare(out, wheel, 16, 5)
    assert contents(out) == {'notes.txt': b'mine'}
    # Nor with a receipt beside it, nor a plain file.
    (out / 'receipt.json').write_text('{}')
    with pytest.raises(ValueError, match='holds something else'):
        trees.prepare(out, wheel, 16, 5)
    with pytest.raises(ValueError, match='holds something else'):
        trees.prepare(out / 'notes.txt', wheel, 16, 5)
    shutil.rmtree(out)
    # Nor folders of pictures that have no receipt.
    (out / 'images').mkdir(parents=True)
    with pytest.raises(ValueError, match='holds something else'):
        trees.prepare(out, wheel, 16, 5)
    (out / 'images').rmdir()
    trees.prepare(out, wheel, 16, 5)
    assert_tidy(out)


def test_a_failure_midway_leaves_the_old_output(wheel, out, monkeypatch):
    write_set = trees.write_set

    def fail(folder, name, *args):
        if name == 'test':
            raise OSError('disk full')
        return write_set(folder, name, *args)

    with monkeypatch.context() as patch:
        patch.setattr(trees, 'write_set', fail)
        with pytest.raises(OSError, match='disk full'):
            trees.prepare(out, wheel, 16, 5)
        assert_tidy(out, ())
    trees.prepare(out, wheel, 16, 5)
    before = contents(out)
    monkeypatch.setattr(trees, 'write_set', fail)
    with pytest.raises(OSError, match='disk full'):
        trees.prepare(out, wheel, 20)
    assert contents(out) == before
    assert_tidy(out)


def test_download(wheel, out, monkeypatch):

    def run(command, **kwargs):
        assert command[:4] == [sys.executable, '-m', 'pip', 'download']
        assert {'--no-deps', 'deepforest==2.1.0'} <= set(command)
        folder = command[command.index('--dest') + 1]
        shutil.copy(wheel, Path(folder, trees.WHEEL.file))
        return subprocess.CompletedProcess(command, 0, '', '')

    monkeypatch.setattr(subprocess, 'run', run)
    trees.prepare(out, None, 16, 5)
    assert (out / 'test.json').exists()


@pytest.mark.parametrize('stderr', ['WARNING: a\nERROR: no network\n', ''])
def test_no_network(wheel, out, monkeypatch, stderr):
    done = subprocess.CompletedProcess([], 1, '', stderr)
    monkeypatch.setattr(subprocess, 'run', lambda *args, **kwargs: done)
    with pytest.raises(ValueError, match='could not download') as error:
        trees.prepare(out, None, 16, 5)
    message = str(error.value)
    assert '--wheel' in message and 'WARNING' not in message
    assert 'ERROR: no network' in message or not stderr
    assert_tidy(out, ())


def test_command_line(wheel, out, monkeypatch):
    args = ['prepare_trees.py', '--out', str(out), '--window', '16']
    monkeypatch.setattr(sys, 'argv', [*args, '--wheel', str(wheel) + 'x'])
    with pytest.raises(SystemExit, match='no such file'):
        trees.main()
    monkeypatch.setattr(sys, 'argv', [*args, '--wheel', str(wheel)])
    trees.main()
    settings = json.loads((out / 'receipt.json').read_text())['settings']
    assert (settings['window'], settings['stride']) == (16, 8)
