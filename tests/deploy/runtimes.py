"""Exports to LiteRT, MediaPipe and OpenVINO, run by ``make deploy``.

It needs .venv-deploy, so pytest does not collect it by itself.
"""
import copy
import json
import subprocess
import sys
from zipfile import ZipFile

import cv2
import numpy as np
import pytest
import torch
from export_parts import build as building
from export_parts import onnx_file
from export_parts.detector import anchors_of
from export_parts.evaluation import agreement, detect
from export_parts.heads import Heads
from helpers.tiny_data import CLASSES
from test_export import SIDE, arguments, close, export, tiny  # noqa: F401
from torchvision.ops import nms

from mmdet_efficientdet import plain_network
from mmdet_efficientdet.deploy.settings import DetectorSettings
from mmdet_efficientdet.models.anchors import AnchorBoxCoder

PYTHON = str(building.ROOT / '.venv-deploy' / 'bin' / 'python')
NAMES = ['rot, groß', 'grün 🌳', 'blau']


@pytest.fixture(scope='module')
def confident(tiny, tmp_path_factory):  # noqa: F811
    """Config, checkpoint and detector, with some scores above 0.3."""
    config, _, detector = tiny
    detector = copy.deepcopy(detector)
    detector.bbox_head.conv_cls.pointwise.bias.data += 3
    checkpoint = tmp_path_factory.mktemp('confident') / 'x.pth'
    torch.save(
        dict(
            state_dict=detector.state_dict(),
            meta=dict(dataset_meta=dict(classes=CLASSES))), checkpoint)
    return config, checkpoint, detector


@pytest.fixture(scope='module')
def parts(confident):
    """Plain network, settings and anchors."""
    network = plain_network(confident[2])
    settings = DetectorSettings([SIDE, SIDE], [127.] * 3, [128.] * 3, NAMES,
                                'stretch', {})
    return network, settings, anchors_of(confident[2], network, (SIDE, SIDE))


@pytest.fixture(scope='module')
def exported(confident, tmp_path_factory):
    """A function to the file of a format and precision, made once."""
    folder, known = tmp_path_factory.mktemp('runtimes'), {}
    images = tmp_path_factory.mktemp('calibration')
    for i, path in enumerate(3 * sorted(confident[0].parent.rglob('*.jpg'))):
        image = np.roll(cv2.imread(str(path)), 9 * i, 1)
        cv2.imwrite(str(images / f'{i}.png'), image)
    data = confident[0].parent / 'data'
    renamed = json.loads((data / 'coco.json').read_text())
    for category in renamed['categories']:
        category['name'] = NAMES[CLASSES.index(category['name'])]
    annotations = folder / 'renamed.json'
    annotations.write_text(json.dumps(renamed))

    def get(format, precision='fp32'):
        if (format, precision) not in known:
            suffix = 'xml' if format == 'openvino' else 'tflite'
            out = folder / f'{format}_{precision}.{suffix}'
            export(
                arguments(confident, '--to', format, '--precision', precision,
                          '--out', out, '--size', SIDE, SIDE, '--resize',
                          'stretch', '--classes', *NAMES, '--data',
                          annotations, '--images', data / 'JPEGImages',
                          '--max-ap-loss', 100, '--calibration', images))
            known[format, precision] = out
        return known[format, precision]

    return get


@pytest.fixture
def picture(confident, tmp_path):
    """An image of the input's size, and a file of it."""
    path = next((confident[0].parent / 'data/JPEGImages').glob('*.jpg'))
    image = cv2.resize(cv2.imread(str(path)), (SIDE, SIDE))
    cv2.imwrite(str(tmp_path / 'picture.png'), image)
    return image[None, ..., ::-1].copy(), tmp_path / 'picture.png'


def lines_of(example, *arguments, python=PYTHON):
    """What an example prints: class, score and corners of each box."""
    script = building.ROOT / 'examples' / f'{example}_detect.py'
    done = subprocess.run([python, script, *map(str, arguments)],
                          env=building.environment(),
                          capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.rsplit(' ', 5) for line in done.stdout.splitlines()]
    return (np.array([row[2:] for row in rows], np.float32).reshape(-1, 4),
            np.array([row[1] for row in rows], np.float32),
            np.array([NAMES.index(row[0]) for row in rows], int))


def outputs_of(path, image, tmp_path):
    """What LiteRT computes, in the order of this package."""
    run = building.open_runtime('litert', path, PYTHON, tmp_path / 'log.txt')
    try:
        return run(image)[1]
    finally:
        run.close()


def heads_of(parts, image):
    """What PyTorch computes."""
    heads = Heads(*parts[:2])
    return [x.numpy() for x in heads(torch.from_numpy(image))]


def whole_pixels(boxes):
    """Boxes of MediaPipe, with corner and size as whole numbers.

    It moves a box over the left or upper border inwards, instead of cutting
    it off.
    """
    corner = np.floor(boxes[:, :2].clip(0))
    return np.hstack([corner, corner + np.floor(boxes[:, 2:] - boxes[:, :2])])


def same(expected, found, tolerance=1e-3):
    """For each box, whether the other side has it, within a pixel."""
    boxes, scores, labels = found
    return [((abs(boxes - box).max(1) <= 1) & (labels == label)
             & (abs(scores - score) <= tolerance)).any()
            for box, score, label in zip(*expected)]  # yapf: disable


@pytest.mark.parametrize('format', ['litert', 'openvino'])
def test_example(format, exported, parts, picture):
    """A script without this package finds the boxes of PyTorch's heads."""
    image, path = picture
    found = lines_of(format, exported(format), path)
    expected = detect(*heads_of(parts, image), parts[2],
                      dict(max_per_img=10**4), 'hard')
    hits = agreement(expected, found)
    assert len(hits) > 3 and np.mean(hits) > 0.95
    assert len(found[0]) == len(hits)


@pytest.mark.parametrize('nms', ['soft', 'hard'])
def test_onnx_example(nms, confident, parts, picture, tmp_path):
    """The same for boxes that the file itself suppresses."""
    image, path = picture
    network, settings, anchors = parts
    config, model = dict(confident[2].test_cfg), tmp_path / 'x.onnx'
    onnx_file.write(network, settings, str(model), nms, anchors, config)
    found = lines_of('onnxruntime', model, path, python=sys.executable)
    expected = detect(*heads_of(parts, image), anchors, config, nms)
    hits = agreement(expected, found)
    assert len(hits) > 1 and np.mean(hits) > 0.95
    assert len(found[0]) == len(hits)


def test_mediapipe(exported, parts, picture):
    """It finds PyTorch's boxes, one class for each anchor, in whole pixels."""
    image, path = picture
    found = lines_of('mediapipe', exported('mediapipe'), path)
    deltas, logits = map(torch.from_numpy, heads_of(parts, image))
    scores, labels = logits[0].sigmoid().max(1)
    boxes = AnchorBoxCoder().decode(parts[2], deltas[0])
    keep = nms(boxes, scores, 0.3)  # across classes
    keep = keep[scores[keep] >= 0.3]
    expected = [x[keep].numpy() for x in (boxes, scores, labels)]
    expected[0] = whole_pixels(expected[0])
    hits = same(expected, found)
    assert len(hits) > 3 and all(hits) and len(found[0]) == len(hits)


@pytest.mark.parametrize('example', ['litert', 'openvino'])
@pytest.mark.parametrize('shape', [(10, 5000), (5000, 10)])
def test_extreme_picture(example, shape, exported, tmp_path):
    """A thin picture keeps at least one pixel."""
    path = tmp_path / 'thin.png'
    cv2.imwrite(str(path), np.full((*shape, 3), 99, np.uint8))
    model = exported(example)
    for suffix in ('.xml', '.bin', '.tflite'):
        if model.with_suffix(suffix).exists():
            copy = (tmp_path / 'copy').with_suffix(suffix)
            copy.write_bytes(model.with_suffix(suffix).read_bytes())
    settings = json.loads(model.with_suffix('.json').read_text('utf-8'))
    settings['resize'] = 'pad'
    (tmp_path / 'copy.json').write_text(json.dumps(settings))
    lines_of(example, (tmp_path / 'copy').with_suffix(model.suffix), path)


def test_labels(exported):
    """Commas, umlauts and emoji, one a line, behind the model."""
    with ZipFile(exported('mediapipe')) as archive:
        assert archive.read('labels.txt').decode().split('\n') == NAMES


def test_fp16(exported, parts, picture, tmp_path):
    """Half the bytes; PyTorch with the same rounded weights agrees."""
    small = exported('litert', 'fp16')
    ratio = small.stat().st_size / exported('litert').stat().st_size
    assert ratio < 0.6
    network = copy.deepcopy(parts[0])
    for name, weight in network.state_dict().items():
        if name.endswith('weight'):
            weight.copy_(weight.half())
    found = outputs_of(small, picture[0], tmp_path)
    for exact, ours, theirs in zip(
            heads_of(parts, picture[0]),
            heads_of((network, parts[1]), picture[0]), found):
        close(ours, theirs)
        assert abs(exact - theirs).max() > 1e-3 * abs(exact).max()


def test_int8(exported, parts, picture, tmp_path):
    """A third of the bytes; heads correlate with those of PyTorch.

    The random network enlarges rounding, unlike a trained one.
    """
    small = exported('litert', 'int8')
    ratio = small.stat().st_size / exported('litert').stat().st_size
    assert ratio < 1 / 3
    found = outputs_of(small, picture[0], tmp_path)
    for ours, theirs in zip(heads_of(parts, picture[0]), found):
        assert ours.shape == theirs.shape
        assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.9


def test_frigate(exported, picture, parts, tmp_path):
    """Read as Frigate and pycoral do, it has PyTorch's suppression of int8.

    Both take boxes, classes, scores and count in this order: Frigate always,
    pycoral if there is no signature and the fourth output has one value.
    """
    path = exported('frigate', 'int8')
    image, file = picture
    code = '''
import json, sys, numpy as np
from PIL import Image
from ai_edge_litert.interpreter import Interpreter
x = Interpreter(sys.argv[1])
x.allocate_tensors()
given, = x.get_input_details()
assert given['dtype'] == np.uint8 and not x.get_signature_list()
x.set_tensor(given['index'], np.array(Image.open(sys.argv[2]))[None])
x.invoke()
outputs = [x.get_tensor(y['index']) for y in x.get_output_details()]
assert [y.shape for y in outputs] == [(1, 100, 4), (1, 100), (1, 100), (1, )]
boxes, classes, scores, count = (y[0] for y in outputs)
print(json.dumps([(int(classes[i]), float(scores[i]), *boxes[i].tolist())
                  for i in range(int(count))]))
'''
    done = subprocess.run([PYTHON, '-c', code, path, file],
                          capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    rows = np.array(json.loads(done.stdout.splitlines()[-1]), np.float32)
    found = rows[:, [3, 2, 5, 4]] * SIDE, rows[:, 1], rows[:, 0]
    labels = path.with_suffix('.labels.txt').read_text(encoding='utf-8')
    assert labels.splitlines() == NAMES
    heads = outputs_of(exported('litert', 'int8'), image, tmp_path)
    expected = detect(*heads, parts[2], dict(max_per_img=100, nms_pre=0),
                      'one_class')
    hits = agreement(expected, found)
    assert len(hits) > 3 and np.mean(hits) > 0.95
    assert len(agreement(found, expected)) == len(hits)
    # The same file in MediaPipe, whose int8 may differ by one step.
    found = [x[found[1] >= 0.3] for x in found]
    found[0] = whole_pixels(found[0])
    hits = same(lines_of('mediapipe', path, file), found, tolerance=0.01)
    assert len(hits) == len(found[0]) > 3 and all(hits)
