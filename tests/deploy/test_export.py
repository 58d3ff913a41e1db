"""Exports in the environment of the tests, and what is refused.

The other runtimes are tested by runtimes.py beside this file: make deploy.
"""
import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import cv2
import export as tool
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_parts import exporting, onnx_file, support
from export_parts.evaluation import (Photographs, agreement,
                                     calibration_images, detect, fit)
from export_parts.exporting import export
from export_parts.heads import Heads, freeze
from export_parts.receipt import TOLERANCE, compare, judge
from helpers.tiny_data import CLASSES, LITE0, make_dataset
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmdet_efficientdet import plain_network
from mmdet_efficientdet.deploy.settings import DetectorSettings
from mmdet_efficientdet.scaling import SCALING

ROOT = Path(tool.__file__).parents[1]
SIDE = 96  # not a multiple of 128: one level is not twice the next


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    """Config, checkpoint and detector of three classes, with varied maps."""
    folder = tmp_path_factory.mktemp('export')
    make_dataset(folder / 'data')
    path = folder / 'tiny.py'
    path.write_text(f'''
_base_ = {str(LITE0)!r}

from mmdet_efficientdet.scaling import scale_config

scale_config(_base_, 'lite0', image_size={SIDE}, classes={CLASSES!r})
model = dict(neck=dict(stack_times=1), bbox_head=dict(stacked_convs=1))
train_dataloader = dict(dataset=dict(
    data_root={str(folder / 'data')!r}, ann_file='coco.json',
    data_prefix=dict(img='JPEGImages')))
test_dataloader = train_dataloader
''')
    config = Config.fromfile(path)
    config.model.backbone.init_cfg = None
    init_default_scope('mmdet')
    torch.manual_seed(0)
    detector = MODELS.build(config.model)
    detector.init_weights()
    images = [cv2.imread(str(x)) for x in (folder / 'data').rglob('*.jpg')]
    images = np.stack([cv2.resize(x, (SIDE, SIDE)) for x in images])
    images = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        # A random network of this depth enlarges rounding 70 times, unlike a
        # trained one, unless the blocks change their input only little.
        for block in detector.backbone.blocks:
            if block.with_res_shortcut:
                block.linear_conv.bn.weight.fill_(0.2)
        for module in detector.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
                module.reset_running_stats()
                module.train()
        detector((images - 127) / 128)
        # Scores that spread, so that suppression has something to do.
        for conv in (detector.bbox_head.conv_cls, detector.bbox_head.conv_reg):
            torch.nn.init.normal_(conv.pointwise.weight, std=0.3)
    detector.eval()
    checkpoint = folder / 'tiny.pth'
    torch.save(
        dict(
            state_dict=detector.state_dict(),
            meta=dict(dataset_meta=dict(classes=CLASSES))), checkpoint)
    return path, checkpoint, detector


@pytest.fixture(scope='module')
def parts(tiny):
    """Plain network, settings, anchors and an image."""
    _, _, detector = tiny
    network = plain_network(detector)
    settings = DetectorSettings([SIDE, SIDE], [127.] * 3, [128.] * 3,
                                list(CLASSES), 'pad', {})
    maps, _ = network(torch.zeros(1, 3, SIDE, SIDE))
    anchors = torch.cat(
        detector.bbox_head.prior_generator.grid_priors(
            [x.shape[-2:] for x in maps], (SIDE, SIDE)))
    image = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3),
                                              np.uint8)
    return network, settings, anchors, image


def close(expected, found):
    """Equal up to the rounding of float32, relative to the largest value."""
    assert expected.shape == found.shape and expected.std() > 0.1
    assert abs(expected - found).max() < 1e-4 * abs(expected).max()


def arguments(tiny, *more):
    """Parsed and checked arguments of the tool."""
    args = tool.parse_args([str(tiny[0]), str(tiny[1]), *map(str, more)])
    tool.settle(args)
    return args


# ------------------------------------------------------------- network -----


def test_heads(tiny, parts):
    """They are the detector's maps of the normalised image, joined."""
    network, settings, _, images = parts
    head = tiny[2].bbox_head
    inputs = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        scores, boxes = tiny[2]((inputs - 127) / 128)
    deltas, logits = Heads(network, settings)(torch.from_numpy(images))
    close(head._flatten(boxes, 4), deltas)
    close(head._flatten(scores, len(CLASSES)), logits)
    swapped, _ = Heads(network, settings, yxhw=True)(torch.from_numpy(images))
    close(deltas[..., [1, 0, 3, 2]], swapped)


@pytest.mark.slow
def test_freeze(parts):
    """Nothing works in place; the maps are the same, for any batch."""
    network, settings, _, images = parts
    heads, images = Heads(network, settings), torch.from_numpy(images)
    frozen = freeze(heads, (SIDE, SIDE))
    targets = [str(node.target) for node in frozen.graph.nodes]
    assert any('convolution' in x or 'conv2d' in x for x in targets)
    assert not [x for x in targets if x.split('.')[0].endswith('_')]
    for n in (1, 3):
        for ours, theirs in zip(heads(images[:n]), frozen(images[:n].float())):
            close(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize('nms', ['none', 'soft', 'hard'])
def test_onnx(nms, tiny, parts, tmp_path):
    """ONNX Runtime finds what PyTorch finds, in a batch and alone."""
    network, settings, anchors, images = parts
    config, path = dict(tiny[2].test_cfg), tmp_path / 'x.onnx'
    onnx_file.write(network, settings, str(path), nms, anchors, config, 500)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count('Loop') == (nms == 'soft')
    assert kinds.count('NonMaxSuppression') == (nms == 'hard')
    session = onnxruntime.InferenceSession(path)
    heads = Heads(network, settings)
    for given in (images, images[1:2]):
        found = session.run(None, dict(images=given))
        expected = [x.numpy() for x in heads(torch.from_numpy(given))]
        if nms == 'none':
            for ours, theirs in zip(expected, found):
                assert abs(ours - theirs).max() < 1e-4 * abs(ours).max()
            continue
        for i in range(len(given)):
            ours = detect(*(x[i:i + 1] for x in expected), anchors,
                          dict(config, nms_pre=500), nms)
            keep = found[1][i] > 0
            theirs = [x[i][keep] for x in found]
            assert len(ours[0]) == len(theirs[0]) > 50
            np.testing.assert_allclose(theirs[1], ours[1], atol=1e-5)
            hits = agreement(ours, theirs, least=0)
            assert len(hits) > 50 and np.mean(hits) > 0.98


@pytest.mark.slow
def test_dynamic_onnx(parts, tmp_path):
    """One file for all multiples of 128, and an error for other sizes."""
    network, settings, anchors, _ = parts
    path = tmp_path / 'x.onnx'
    onnx_file.write(
        network, settings, str(path), 'none', anchors, {}, dynamic=True)
    session = onnxruntime.InferenceSession(path)
    assert session.get_modelmeta().custom_metadata_map['size_divisor'] == '128'
    heads, generator = Heads(network, settings), np.random.default_rng(0)
    for shape in ((1, 128, 384, 3), (2, 256, 128, 3)):
        images = generator.integers(0, 256, shape, np.uint8)
        found = session.run(None, dict(images=images))
        for ours, theirs in zip(heads(torch.from_numpy(images)), found):
            close(ours.numpy(), theirs)
    with pytest.raises(Exception, match='Add'):
        session.run(None, dict(images=np.zeros((1, 200, 320, 3), np.uint8)))


# ---------------------------------------------------------------- tool -----


@pytest.mark.slow
@pytest.mark.parametrize('format, files', [('torch', 'safetensors json pt2'),
                                           ('onnx', 'onnx')])
def test_export_and_verify(format, files, tiny, tmp_path):
    """The files, their receipt, and the receipt once more."""
    suffix = files.split()[0]
    out = tmp_path / f'tiny.{suffix}'
    args = arguments(tiny, '--to', format, '--out', out,
                     *['--pt2'] * (format == 'torch'))
    text = export(args)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        f'tiny.{x}'
        for x in [*files.split(), 'receipt.json', 'receipt.txt']
    }
    receipt = json.loads((tmp_path / 'tiny.receipt.json').read_text())
    assert receipt['size'] == 'custom' and receipt['images'] == 6
    assert max(receipt['heads'].values()) < 1e-4
    assert receipt['boxes_found'] == receipt['boxes_compared']
    assert receipt['ap_pytorch'] == pytest.approx(receipt['ap_artefact'])
    assert text == (tmp_path / 'tiny.receipt.txt').read_text()
    with pytest.raises(ValueError, match=f'{out}.*--force'):
        arguments(tiny, '--to', format, '--out', out)
    # A file that was changed does not pass.
    again = tool.parse_args([str(tiny[0]), '--verify', str(out)])
    tool.settle(again)
    assert export(again).splitlines()[0] == text.splitlines()[0]
    data = out.read_bytes()
    out.write_bytes(data[:len(data) // 2])
    with pytest.raises(ValueError):
        export(again)


@pytest.fixture
def receipt(tmp_path):
    """The receipt of an export in tmp_path, and a file to stand for it."""
    (tmp_path / 'x.onnx').write_bytes(b'')
    return dict(
        format='onnx',
        precision='fp32',
        resize='pad',
        nms='none',
        candidates=None,
        image_size=[SIDE, SIDE],
        checkpoint='none.pth',
        classes=list(CLASSES),
        data='coco.json',
        data_images='folder',
        limit=7)


def recall(tiny, tmp_path, receipt, *options):
    """The settled arguments of --verify with a receipt."""
    path = tmp_path / 'x.receipt.json'
    path.write_text(json.dumps(receipt))
    args = tool.parse_args(
        [str(tiny[0]), '--verify',
         str(tmp_path / 'x.onnx'), *options])
    tool.settle(args)
    return args


@pytest.mark.parametrize('scheme', ['http', 'file', 'local', 'pavi'])
def test_hostile_receipt(scheme, tiny, receipt, tmp_path):
    """Nothing is fetched, and no code in a file runs."""
    marker, asked = tmp_path / 'marker', []

    class Evil:

        def __reduce__(self):
            return Path.touch, (marker, )

    class Handler(BaseHTTPRequestHandler):

        def do_GET(self):
            asked.append(self.path)

    torch.save(dict(state_dict=Evil()), tmp_path / 'evil.pth')
    with HTTPServer(('127.0.0.1', 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f'127.0.0.1:{server.server_port}'
        receipt['checkpoint'] = f'http://{address}/evil.pth' \
            if scheme == 'http' else f'{scheme}://{tmp_path}/evil.pth'
        args = recall(tiny, tmp_path, receipt)
        with pytest.raises(ValueError, match=f'{scheme}://.*published'):
            export(args)
        server.shutdown()
    args.checkpoint = str(tmp_path / 'evil.pth')
    with pytest.raises(ValueError, match='evil.pth'):
        export(args)
    assert not asked and not marker.exists()


def test_same_comparison(tiny, receipt, tmp_path):
    """--verify takes the photographs of the receipt, unless others are given.
    """
    args = recall(tiny, tmp_path, receipt)
    assert (args.data, args.images, args.limit) == (Path('coco.json'),
                                                    Path('folder'), 7)
    assert args.classes == list(CLASSES)
    args = recall(tiny, tmp_path, receipt, '--data', 'a', '--images', 'b',
                  '--limit', '9')
    assert (args.data, args.images, args.limit) == (Path('a'), Path('b'), 9)


@pytest.mark.parametrize('change', [
    dict(classes=3),
    dict(image_size=[96]),
    dict(limit='7'),
    dict(nms='medium'),
    dict(candidates='x'),
    dict(checkpoint=None)
])
def test_damaged_receipt(change, tiny, receipt, tmp_path):
    """The key is named; an empty receipt, too, is one error."""
    key, = change
    with pytest.raises(ValueError, match=rf'x\.receipt\.json.*{key}'):
        recall(tiny, tmp_path, dict(receipt, **change))
    del receipt[key]
    with pytest.raises(ValueError, match=rf'x\.receipt\.json.*{key}'):
        recall(tiny, tmp_path, receipt)
    for empty in ({}, [], 3):
        with pytest.raises(ValueError, match=r'x\.receipt\.json.*--force'):
            recall(tiny, tmp_path, empty)


@pytest.mark.parametrize('head, index', [(0, 0), (1, 5), (1, -1)])
def test_nan_is_seen(head, index, tiny, parts):
    """One NaN of one image is in the receipt, and the gate refuses it."""
    network, settings, anchors, _ = parts
    heads, calls = Heads(network, settings), []

    def run(image):
        calls.append(image)
        outputs = [x.numpy() for x in heads(torch.from_numpy(image))]
        if len(calls) == 1:
            outputs[head].flat[index] = np.nan
        return 0.1, outputs

    folder = tiny[0].parent / 'data'
    photographs = Photographs(folder / 'coco.json', folder / 'JPEGImages',
                              CLASSES, 3)
    measured = compare(heads, run, settings, photographs, anchors,
                       dict(tiny[2].test_cfg), 'soft')
    name = ('deltas', 'logits')[head]
    assert np.isnan(measured['heads'][name]) and len(calls) == 3
    cell = support.Cell('available', '', max_ap_loss=None)
    with pytest.raises(ValueError, match=f'{name}.*nan'):
        judge(measured, 'int8', cell)


def test_full_disk_leaves_nothing(tiny, tmp_path, monkeypatch):
    """A receipt that cannot be written leaves no exported file."""

    def full(path, data):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(exporting, 'write_file', full)
    args = arguments(tiny, '--to', 'torch', '--out',
                     tmp_path / 'x.safetensors')
    with pytest.raises(OSError, match='No space'):
        export(args)
    assert not list(tmp_path.iterdir())


def test_nothing_is_left(tiny, tmp_path):
    """A gate that refuses leaves no file behind."""
    args = arguments(tiny, '--to', 'onnx', '--out', tmp_path / 'x.onnx')
    args.data, args.images = tmp_path / 'none.json', tmp_path
    with pytest.raises(ValueError, match=r'none\.json.*--data'):
        export(args)
    assert not list(tmp_path.iterdir())


def test_fit():
    """A long image is stretched, or padded with the mean colour."""
    image = np.full((50, 100, 3), 200, np.uint8)
    settings = DetectorSettings([96, 96], [127.] * 3, [1.] * 3, ['a'], 'pad',
                                {})
    given, scale = fit(image, settings)
    assert given.shape == (1, 96, 96, 3) and scale == (0.96, 0.96)
    assert (given[0, :48] == 200).all() and (given[0, 48:] == 127).all()
    settings.resize = 'stretch'
    given, scale = fit(image, settings)
    assert (given == 200).all() and scale == (0.96, 1.92)


# ---------------------------------------------------------- the matrix -----


def test_matrix():
    """Every combination has a cell; a reason says why it is so."""
    for format, (precisions, _) in support.FORMATS.items():
        for precision in precisions:
            for size in (*SCALING, 'custom'):
                cell = support.cell(size, format, precision)
                assert cell.state in ('validated', 'available', 'blocked')
                assert cell.reason
                if cell.state == 'blocked':
                    assert '--to' in cell.reason  # the way out
                elif precision != 'int8':
                    assert cell.max_ap_loss == 0.1
    for row in support.rows():
        assert all(text in support.table() for text in row)


def test_docs_have_the_matrix():
    """Cell by cell, and nothing else."""
    text = (ROOT / 'docs/deploy.md').read_text()
    rows = [
        line.strip('| ').split(' | ') for line in text.splitlines()
        if line.startswith('| ')
        and line.split(' | ')[0][2:].strip('`') in support.FORMATS
    ]
    assert [row[:4] for row in rows] == [list(x[:4]) for x in support.rows()]


def test_refused_before_torch():
    """A blocked format ends before a library is imported."""
    code = '''
import runpy, sys
sys.path.insert(0, 'tools')
sys.argv = ['export.py', 'no_config.py', 'no.pth', '--to', 'executorch']
try:
    runpy.run_path('tools/export.py', run_name='__main__')
except SystemExit as error:
    print(error)
assert not {'torch', 'mmdet', 'onnx', 'cv2'} & set(sys.modules)
'''
    done = subprocess.run([sys.executable, '-c', code],
                          cwd=ROOT,
                          capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert 'executorch' in done.stdout and '--to litert' in done.stdout


REFUSED = {
    'format': (['--to', 'coreml'], 'coreml.*onnx'),
    'tensorrt': (['--to', 'tensorrt'], 'tensorrt.*--candidates 3840'),
    'precision': (['--to', 'onnx', '--precision', 'int8'], 'int8.*fp32'),
    'nms': (['--to', 'litert', '--nms', 'hard'], 'hard.*onnx'),
    'dynamic': (['--to', 'onnx', '--nms', 'soft', '--dynamic'], 'nms none'),
    'candidates': (['--to', 'onnx', '--candidates', '0'], '0.*1'),
    'limit': (['--to', 'onnx', '--limit', '0'], '0.*1'),
    'suffix': (['--to', 'onnx', '--out', 'x.tflite'], r'x\.tflite.*x\.onnx'),
    'folder': (['--to', 'onnx', '--out', 'none/x.onnx'], 'none.*--out'),
    'receipt': (['--verify', 'none.onnx'], r'none\.receipt\.json'),
}
REFUSED_LATER = {
    'size': (['--to', 'onnx', '--size', '32', '96'], '32.*64'),
    'divisor': (['--to', 'onnx', '--dynamic'], '128.*96, 96.*--size'),
    'python': (['--to', 'litert', '--python', '/none'], 'litert_torch.*/none'),
    'names': (['--to', 'onnx', '--classes', 'a', 'b'], '3.*2'),
    'name': (['--to', 'onnx', '--classes', 'a', 'b', 'c\nd'], r'c\\nd'),
    'twice': (['--to', 'onnx', '--classes', 'a', 'b', 'a'], "'a'.*twice"),
    'images': (['--to', 'onnx', '--data', 'x.json'], '--images'),
}  # yapf: disable


@pytest.mark.parametrize('case', REFUSED)
def test_refused(case, tiny):
    """The message has what was given and what is allowed."""
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=f'(?s){message}'):
        arguments(tiny, *options)


@pytest.mark.parametrize('case', REFUSED_LATER)
def test_refused_later(case, tiny, tmp_path):
    """The same, for what needs the config or the checkpoint."""
    options, message = REFUSED_LATER[case]
    suffix = support.SUFFIXES[options[1]][0]
    args = arguments(tiny, *options, '--out', tmp_path / f'x{suffix}')
    with pytest.raises(ValueError, match=f'(?s){message}'):
        export(args)
    assert not list(tmp_path.iterdir())


def test_checkpoint_of_another_size(tiny, tmp_path):
    """Both sides are named."""
    args = arguments(tiny, '--to', 'onnx', '--out', tmp_path / 'x.onnx')
    args.config = str(LITE0).replace('lite0', 'lite1')
    with pytest.raises(ValueError, match='does not fit'):
        export(args)
    args.checkpoint = str(tmp_path / 'none.pth')
    with pytest.raises(ValueError, match='none.pth'):
        export(args)


REFUSED_CONFIGS = {
    'type': ('model.type', 'RetinaNet', 'RetinaNet.*EfficientDet'),
    'parts': ('model.neck', None, 'EfficientDet with backbone, neck'),
    'mean': ('model.data_preprocessor.mean', None, 'mean is None.*three'),
    'std': ('model.data_preprocessor.std', [1.], r'std is \[1.0\].*three'),
    'bgr': ('model.data_preprocessor.bgr_to_rgb', False,
            'bgr_to_rgb is False.*True'),
    'pad_value': ('model.data_preprocessor.pad_value', -1,
                  'pad_value is -1.*--resize stretch'),
    'voc': ('test_dataloader.dataset.ann_file', 'Annotations/000001.xml',
            r"000001\.xml.*COCO's.*--data"),
    'checkpoint': ('model.data_preprocessor.mean', [1., 2., 3.],
                   r'other settings.*mean=\[127'),
    'anchors': ('model.bbox_head.anchor_generator.aspect_pairs',
                [(1., 1.), (1.4, 0.7), (0.71, 1.41)], 'aspect_pairs=')
}  # yapf: disable


@pytest.mark.parametrize('case', REFUSED_CONFIGS)
def test_refused_configs(case, tiny, tmp_path, monkeypatch):
    """What the export would not honour, or what is no config for it."""
    key, value, message = REFUSED_CONFIGS[case]
    config = Config.fromfile(tiny[0])
    generator = config.model.bbox_head.anchor_generator
    pairs = [list(map(float, x)) for x in generator.aspect_pairs]
    conventions = dict(mean=[127.] * 3, std=[128.] * 3, aspect_pairs=pairs)
    checkpoint = torch.load(tiny[1], weights_only=True)
    checkpoint['meta'].update(conventions)
    torch.save(checkpoint, tmp_path / 'x.pth')
    *parents, last = key.split('.')
    node = config
    for name in parents:
        node = node[name]
    if value is None and last == 'neck':
        node.pop(last)
    else:
        node[last] = value
    monkeypatch.setattr(exporting, 'read_config', lambda path: config)
    args = arguments(tiny, '--to', 'torch', '--out',
                     tmp_path / 'x.safetensors')
    args.checkpoint = str(tmp_path / 'x.pth')
    with pytest.raises(ValueError, match=f'(?s){message}'):
        export(args)
    assert [x.name for x in tmp_path.iterdir()] == ['x.pth']


def test_exporter_fails(tiny, tmp_path, monkeypatch):
    """An error of PyTorch's exporter, or a missing package, is one line."""

    def fail(*args, **kwargs):
        raise RuntimeError('unsupported')

    args = arguments(tiny, '--to', 'onnx', '--out', tmp_path / 'x.onnx')
    with monkeypatch.context() as patch:
        patch.setattr(torch.onnx, 'export', fail)
        with pytest.raises(ValueError, match='exporter.*unsupported'):
            export(args)
    monkeypatch.setitem(sys.modules, 'onnx', None)
    with pytest.raises(ValueError, match='pip install onnx'):
        export(args)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('number, message', [
    (0, 'none.*no folder'),
    (15, 'at least 16; 15 of.*--calibration'),
    (16, r'\.jpg cannot be read'),
])
def test_refused_calibration(number, message, tiny, tmp_path, monkeypatch):
    """A folder that is missing, has too few files, or no images."""
    folder = tmp_path / ('images' if number else 'none')
    for i in range(number):
        folder.mkdir(exist_ok=True)
        (folder / f'{i}.jpg').write_text('no image')
    monkeypatch.setattr(exporting, 'find_python', lambda *args: sys.executable)
    args = arguments(tiny, '--to', 'litert', '--precision', 'int8', '--out',
                     tmp_path / 'x.tflite', '--calibration', folder)
    with pytest.raises(ValueError, match=f'(?s){message}'):
        export(args)
    assert not [x for x in tmp_path.iterdir() if x != folder]


def test_calibration_by_seed(tmp_path):
    """The seed chooses the images, whatever the order of their names."""
    paths = [tmp_path / f'{i}.png' for i in range(20)]
    for i, path in enumerate(paths):
        cv2.imwrite(str(path), np.full((9, 9, 3), i, np.uint8))
    settings = DetectorSettings([64, 64], [0.] * 3, [1.] * 3, ['a'], 'pad', {})

    def chosen(paths, seed):
        images = calibration_images(tmp_path, paths, settings, 16, seed)
        assert images.shape == (16, 64, 64, 3)
        return images[:, 0, 0, 0].tolist()

    first = chosen(paths, 0)
    assert len(set(first)) == 16
    assert first == chosen(paths[::-1], 0) != chosen(paths, 1)


@pytest.mark.parametrize('number', [1, 1000])
def test_class_names(number):
    """Commas, umlauts and emoji are kept; any number of classes."""
    from export_parts.detector import check_names
    names = [f'Bäume, groß 🌳 {i}' for i in range(number)]
    assert check_names(names, number) == names
    for wrong in ('', ' a', 'a\r', 'a\x00', '\u2028'):
        with pytest.raises(ValueError, match='labels file'):
            check_names([*names[1:], wrong], number)


@pytest.mark.parametrize('precision', TOLERANCE)
def test_gate(precision):
    """It opens at the limit and not behind it."""
    cell = support.Cell('available', '', max_ap_loss=0.4)
    good = dict(
        heads=dict(deltas=TOLERANCE[precision], logits=0.0),
        ap_pytorch=30.0,
        ap_artefact=29.6)
    judge(good, precision, cell)
    for change in (dict(heads=dict(deltas=TOLERANCE[precision] * 1.01)),
                   dict(heads=dict(deltas=float('nan'))),
                   dict(ap_artefact=29.5)):
        with pytest.raises(ValueError, match='PyTorch'):
            judge(dict(good, **change), precision, cell)
    judge(dict(good, ap_artefact=28.0), precision, cell, max_ap_loss=2.0)
    unlimited = support.Cell('available', '', max_ap_loss=None)
    judge(dict(good, ap_artefact=0.0), precision, unlimited)
