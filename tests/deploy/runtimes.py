"""Exports to LiteRT, MediaPipe and OpenVINO, run by ``make deploy``.

It needs .venv-deploy, so pytest does not collect it by itself.
"""
import subprocess
from zipfile import ZipFile

import cv2
import numpy as np
import pytest
import torch
from export_parts import build as building
from export_parts.evaluation import agreement, detect
from test_export import SIDE, arguments, export, parts, tiny  # noqa: F401

from mmdet_efficientdet.deploy.heads import Heads

PYTHON = str(building.ROOT / '.venv-deploy' / 'bin' / 'python')
NAMES = ['rot, groß', 'grün 🌳', 'blau']


@pytest.fixture(scope='module')
def exported(tiny, tmp_path_factory):  # noqa: F811
    """A function to the file of a format and precision, made once."""
    folder, known = tmp_path_factory.mktemp('runtimes'), {}
    images = tmp_path_factory.mktemp('calibration')
    for i, path in enumerate(3 * sorted(tiny[0].parent.rglob('*.jpg'))):
        image = np.roll(cv2.imread(str(path)), 9 * i, 1)
        cv2.imwrite(str(images / f'{i}.png'), image)

    def get(format, precision='fp32'):
        if (format, precision) not in known:
            suffix = 'xml' if format == 'openvino' else 'tflite'
            out = folder / f'{format}_{precision}.{suffix}'
            export(
                arguments(tiny, '--to', format, '--precision', precision,
                          '--out', out, '--resize', 'stretch', '--classes',
                          *NAMES, '--max-ap-loss', 100, '--calibration',
                          images))
            known[format, precision] = out
        return known[format, precision]

    return get


@pytest.fixture
def picture(tiny, tmp_path):  # noqa: F811
    """An image of the input's size, and a file of it."""
    path = next((tiny[0].parent / 'data/JPEGImages').glob('*.jpg'))
    image = cv2.resize(cv2.imread(str(path)), (SIDE, SIDE))
    cv2.imwrite(str(tmp_path / 'picture.png'), image)
    return image[None, ..., ::-1].copy(), tmp_path / 'picture.png'


def lines_of(example, *arguments):
    """What an example prints: class, score and corners of each box."""
    script = building.ROOT / 'examples' / f'{example}_detect.py'
    done = subprocess.run([PYTHON, script, *map(str, arguments)],
                          env=building.environment(),
                          capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.rsplit(' ', 5) for line in done.stdout.splitlines()]
    return (np.array([row[2:] for row in rows], np.float32).reshape(-1, 4),
            np.array([row[1] for row in rows], np.float32),
            np.array([NAMES.index(row[0]) for row in rows], int))


@pytest.mark.parametrize('example, format', [('litert', 'litert'),
                                             ('openvino', 'openvino'),
                                             ('mediapipe', 'mediapipe')])
def test_example(example, format, exported, parts, picture):  # noqa: F811
    """A script without this package finds the boxes of PyTorch's heads."""
    network, settings, anchors, _ = parts
    image, path = picture
    found = lines_of(example, exported(format), path)
    outputs = Heads(network, settings)(torch.from_numpy(image))
    tail = 'one_class' if example == 'mediapipe' else 'hard'
    expected = detect(*(x.numpy() for x in outputs), anchors,
                      dict(max_per_img=10**4), tail)
    if tail == 'hard':
        hits = agreement(expected, found)
        assert len(hits) > 3 and np.mean(hits) > 0.95
    # MediaPipe's boxes are whole pixels; scores and classes are comparable.
    assert set(found[2]) <= set(expected[2])
    assert found[1].max() == pytest.approx(expected[1].max(), abs=1e-3)


def test_labels(exported):
    """Commas, umlauts and emoji, one a line, behind the model."""
    with ZipFile(exported('mediapipe')) as archive:
        assert archive.read('labels.txt').decode().split('\n') == NAMES


@pytest.mark.parametrize('precision', ['fp16', 'int8'])
def test_precisions(precision, exported):
    """Smaller files, whose heads are near those of float32."""
    small = exported('litert', precision)
    full = exported('litert')
    ratio = small.stat().st_size / full.stat().st_size
    assert ratio < dict(fp16=0.6, int8=0.4)[precision]


def test_frigate(exported, picture, parts):  # noqa: F811
    """The outputs in the order of Frigate and pycoral, without signature."""
    path = exported('frigate', 'int8')
    code = '''
import sys, numpy as np
from ai_edge_litert.interpreter import Interpreter
x = Interpreter(sys.argv[1])
x.allocate_tensors()
given, = x.get_input_details()
assert given['dtype'] == np.uint8 and not x.get_signature_list()
print([y['shape'].tolist() for y in x.get_output_details()])
'''
    done = subprocess.run([PYTHON, '-c', code, path],
                          capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split('\n')[0] == str([[1, 100, 4], [1, 100], [1, 100],
                                              [1]])
    labels = path.with_suffix('.labels.txt').read_text(encoding='utf-8')
    assert labels.splitlines() == NAMES
