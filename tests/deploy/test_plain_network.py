"""The plain network computes what the detector computes."""
import io
import json
import subprocess
import sys

import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from effdet_bridge import our_network, random_weights
from helpers.tiny_data import D0
from mmdet.registry import MODELS
from mmengine.config import Config

from mmdet_efficientdet import load_plain, plain_network, save_plain
from mmdet_efficientdet.utils import config_file

# Even and odd sizes on each axis, and an axis that ends in one pixel.
SIDES = ((128, 128), (97, 160), (150, 67), (64, 384))


@pytest.fixture(scope='module')
def detector():
    """A function to a detector whose every tensor shows in the outputs."""
    known = {}

    def get(size):
        if size not in known:
            known[size] = our_network(random_weights(size), size)
        return known[size]

    return get


def difference(expected, found):
    """The largest, relative to the largest value of a map."""
    pairs = [pair for maps in zip(expected, found) for pair in zip(*maps)]
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)


@torch.no_grad()
def outputs(model, images):
    return model(images, mode='tensor')


@pytest.mark.slow
@pytest.mark.parametrize('size', ['d0', 'lite0', 'd6', 'd7x'])
def test_equal_in_double_precision(detector, size):
    """Only rounding differs: softer sums, six levels and Lite included."""
    model = detector(size).double()
    plain = plain_network(model)
    for height, width in SIDES[:2] if size[:2] in ('d6', 'd7') else SIDES:
        images = torch.randn(2, 3, height, width, dtype=torch.float64)
        assert difference(outputs(model, images), plain(images)) < 1e-12
    model.float()


@pytest.mark.slow
@pytest.mark.parametrize('size', ['d0', 'lite0'])
def test_no_worse_in_single_precision(detector, size):
    """Its rounding is no larger than that of the detector itself."""
    model = detector(size)
    for height, width in SIDES:
        images = torch.randn(1, 3, height, width)
        exact = outputs(model.double(), images.double())
        exact = [[x.float() for x in maps] for maps in exact]
        own = difference(exact, outputs(model.float(), images))
        assert difference(exact, plain_network(model)(images)) < 3 * own


@pytest.mark.parametrize('size', ['d0', 'lite0'])
def test_even(detector, size):
    """The form for export computes the same at the sizes that it takes."""
    model = detector(size).double()
    plain, even = plain_network(model), plain_network(model, even=True)
    model.float()
    images = torch.randn(2, 3, 128, 256, dtype=torch.float64)
    assert difference(plain(images), even(images)) < 1e-13
    for side in (64, 130):
        with pytest.raises(ValueError, match=f'{side}x256.* 128'):
            even(images.new_zeros(1, 3, side, 256))


@pytest.mark.slow
def test_export(model_cfg):
    """One graph for all batches and all sizes from twice the divisor on."""
    config = model_cfg('d0')
    config.neck.num_outs = config.bbox_head.num_levels = 6
    model = MODELS.build(config).eval()
    even, dim = plain_network(model, even=True), torch.export.Dim.DYNAMIC
    sizes = (dict(enumerate((dim, None, dim, dim))), )
    images = torch.empty(2, 3, 768, 512)
    graph = torch.export.export(even, (images, ), dynamic_shapes=sizes)
    graph, images = graph.module(), torch.randn(1, 3, 512, 768)
    assert difference(plain_network(model)(images), graph(images)) < 1e-5
    with pytest.raises(AssertionError, match='% 256 == 0'):
        graph(images[..., :640])


@pytest.mark.parametrize('sides', [(320, 320), (193, 322)])
def test_trace(sides, detector, tmp_path):
    """A graph for other runtimes has no operator of this machine only.

    The maps are so large that the network itself calls oneDNN.
    """
    network = plain_network(detector('lite0'))
    images = torch.randn(1, 3, *sides)
    with torch.no_grad():
        traced = torch.jit.trace(network, images)
        assert 'mkldnn' not in str(traced.inlined_graph)
        assert difference(network(images), traced(images)) < 1e-5
    file = io.BytesIO()
    torch.onnx.export(network, (images, ), file, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / 'optimized.onnx')
    session = onnxruntime.InferenceSession(file.getvalue(), options)
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    assert {'Conv', 'MaxPool'} < {node.op_type for node in nodes}
    # The runtime has joined all padding to convolutions.
    assert 'Pad' not in {node.op_type for node in nodes}
    maps = iter(
        session.run(None, {session.get_inputs()[0].name: images.numpy()}))
    found = [[torch.from_numpy(next(maps)) for _ in group]
             for group in network(images)]
    assert difference(network(images), found) < 1e-3  # rounding grows


def test_large_maps():
    """oneDNN's path, which only large results take."""
    model = MODELS.build(Config.fromfile(config_file('lite0')).model).eval()
    plain = plain_network(model)
    images = torch.randn(1, 3, 384, 512)
    assert difference(outputs(model, images), plain(images)) < 1e-5


def test_batch_does_not_matter():
    """An image has the same maps alone and among others, bit for bit."""
    model = MODELS.build(Config.fromfile(config_file('lite0')).model).eval()
    plain, images = plain_network(model), torch.randn(6, 3, 208, 368)
    together, alone = plain(images), plain(images[1:2])
    for maps, single in zip(together, alone):
        assert all(torch.equal(a[1:2], b) for a, b in zip(maps, single))


def test_group_norm():
    """Group norms cannot be folded, and stay."""
    path = D0.with_name('efficientdet_d0_1xb8-gn-300e_coco.py')
    config = Config.fromfile(path).model
    config.backbone.init_cfg = None
    model = MODELS.build(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    images = torch.randn(2, 3, 128, 160, dtype=torch.float64)
    plain = plain_network(model)
    assert difference(outputs(model, images), plain(images)) < 1e-12


@pytest.mark.parametrize('backbone, neck, head', [
    (dict(out_indices=(2, 3, 4, 5)),
     dict(in_channels=[24, 40, 112, 320], start_level=1), dict()),
    (dict(), dict(end_level=1, num_outs=2), dict(num_levels=2)),
    (dict(), dict(), dict(stacked_convs=0)),
])  # yapf: disable
def test_options(backbone, neck, head, model_cfg):
    """Inputs of the neck that are not used, and a head without layers."""
    config = model_cfg('d0')
    config.backbone.update(backbone)
    config.neck.update(neck)
    config.bbox_head.update(head)
    model = MODELS.build(config).double().eval()
    images = torch.randn(1, 3, 128, 96, dtype=torch.float64)
    plain = plain_network(model)
    assert difference(outputs(model, images), plain(images)) < 1e-12


def test_levels_with_gaps(model_cfg):
    """One pooling cannot bridge them."""
    config = model_cfg('d0')
    config.backbone.out_indices = (2, 3, 5)
    config.neck.in_channels = [24, 40, 320]
    with pytest.raises(ValueError, match=r'\[2, 3, 5\].*no plain form'):
        plain_network(MODELS.build(config))


def test_the_detector_stays_as_it_is(detector):
    """Its mode and its weights, which share no memory with the copies."""
    model = detector('d0').train()
    before = {key: x.clone() for key, x in model.state_dict().items()}
    plain = plain_network(model)
    for parameter in plain.parameters():
        parameter.data.fill_(float('nan'))
    after = model.state_dict()
    assert model.training and before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in after)
    model.eval()


def test_the_images_stay_as_they_are(detector):
    """Activations are computed in place, but not those of the caller."""
    images = torch.randn(1, 3, 128, 128)
    copy = images.clone()
    plain = plain_network(detector('d0'))
    first = [x.clone() for maps in plain(images) for x in maps]
    again = [x for maps in plain(images) for x in maps]
    assert torch.equal(images, copy)
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize(
    'option', [
        dict(add_extra_convs=True),
        dict(separable_conv=False),
        dict(fusion='channel_softmax'),
        dict(norm_cfg=dict(type='IN')),
        dict(act_cfg=dict(type='Tanh'))
    ],
    ids=str)
def test_what_has_no_plain_form(option, model_cfg):
    """It is refused by name."""
    config = model_cfg('d0')
    config.neck.update(option)
    with pytest.raises(ValueError, match='no plain form') as error:
        plain_network(MODELS.build(config))
    value, = option.values()
    value = value['type'] if isinstance(value, dict) else [*option][0]
    assert {
        'IN': 'InstanceNorm',
        'fusion': 'channel_'
    }.get(value, value) in str(error.value)


@pytest.mark.slow
def test_file(detector, tmp_path):
    """It is rebuilt by a process that has neither MMDetection nor MMCV."""
    plain = plain_network(detector('lite0')).double()
    images = torch.randn(1, 3, 96, 130, dtype=torch.float64)
    save_plain(plain, tmp_path / 'plain.safetensors')
    even = load_plain(tmp_path / 'plain.safetensors', even=True)
    with pytest.raises(ValueError, match='96x130'):
        even(images)
    torch.save(images, tmp_path / 'images.pth')
    source = '''
import sys
for name in ('mmcv', 'mmdet', 'mmengine', 'wrapt', 'msgspec'):
    sys.modules[name] = None  # as where they are not installed
import torch
import mmdet_efficientdet
plain = mmdet_efficientdet.load_plain('plain.safetensors')
images = torch.load('images.pth', weights_only=True)
torch.save(plain(images), 'maps.pth')
'''
    done = subprocess.run([sys.executable, '-c', source],
                          cwd=tmp_path,
                          env=dict(PYTHONPATH=str(D0.parents[2])),
                          capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    maps = torch.load(tmp_path / 'maps.pth', weights_only=True)
    assert difference(plain(images), maps) < 1e-12


DAMAGES = dict(
    no_description=lambda settings, weights: settings.clear(),
    unknown_setting=lambda settings, weights: settings.update(colour='red'),
    missing_setting=lambda settings, weights: settings.pop('stem'),
    other_width=lambda settings, weights: settings.update(channels=72),
    endless=lambda settings, weights: settings.update(num_levels=10**12),
    huge=lambda settings, weights: settings.update(stem=10**15),
    blocks=lambda settings, weights: settings.update(blocks=settings['blocks']
                                                     * 10**4),
    text=lambda settings, weights: settings.update(stem='32'),
    missing_weight=lambda settings, weights: weights.popitem())


@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_file(damage, detector, tmp_path):
    """One error names the file; no memory is taken for what it claims."""
    plain = plain_network(detector('lite0'))
    settings, weights = dict(plain.settings), dict(plain.state_dict())
    DAMAGES[damage](settings, weights)
    path = tmp_path / 'plain.safetensors'
    metadata = dict(plain_network=json.dumps(settings)) if settings else None
    weights = {key: x.contiguous() for key, x in weights.items()}
    safetensors.torch.save_file(weights, path, metadata)
    with pytest.raises(ValueError, match=path.name):
        load_plain(path)


def test_no_plain_file(tmp_path):
    """Neither a missing file nor another format ends in a traceback."""
    path = tmp_path / 'plain.safetensors'
    with pytest.raises(FileNotFoundError):
        load_plain(path)
    path.write_bytes(b'PK\x03\x04' * 100)
    with pytest.raises(ValueError, match=path.name):
        load_plain(path)
