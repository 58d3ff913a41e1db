"""The backbones against the official tables, timm and explicit padding."""
import math
from functools import lru_cache

import pytest
import timm
import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from mmdet.registry import MODELS
from mmengine.model import revert_sync_batchnorm
from mmengine.runner import load_checkpoint
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdet_efficientdet.models.efficientnet import EfficientNet
from mmdet_efficientdet.weights.schemes import convert_imagenet_backbone

B0_WIDTHS = [16, 24, 40, 80, 112, 192, 320]
B2_WIDTHS = [16, 24, 48, 88, 120, 208, 352]
B3_WIDTHS = [24, 32, 48, 96, 136, 232, 384]
B4_WIDTHS = [24, 32, 56, 112, 160, 272, 448]
B5_WIDTHS = [24, 40, 64, 128, 176, 304, 512]
B6_WIDTHS = [32, 40, 72, 144, 200, 344, 576]
B7_WIDTHS = [32, 48, 80, 160, 224, 384, 640]
# Stem, repeats, widths of the stages, last block of levels 1-5.
NETS = dict(
    b0=(32, [1, 2, 2, 3, 3, 4, 1], B0_WIDTHS, [0, 2, 4, 10, 15]),
    b1=(32, [2, 3, 3, 4, 4, 5, 2], B0_WIDTHS, [1, 4, 7, 15, 22]),
    b2=(32, [2, 3, 3, 4, 4, 5, 2], B2_WIDTHS, [1, 4, 7, 15, 22]),
    b3=(40, [2, 3, 3, 5, 5, 6, 2], B3_WIDTHS, [1, 4, 7, 17, 25]),
    b4=(48, [2, 4, 4, 6, 6, 8, 2], B4_WIDTHS, [1, 5, 9, 21, 31]),
    b5=(48, [3, 5, 5, 7, 7, 9, 3], B5_WIDTHS, [2, 7, 12, 26, 38]),
    b6=(56, [3, 6, 6, 8, 8, 11, 3], B6_WIDTHS, [2, 8, 14, 30, 44]),
    b7=(64, [4, 7, 7, 10, 10, 13, 4], B7_WIDTHS, [3, 10, 17, 37, 54]),
    lite0=(32, [1, 2, 2, 3, 3, 4, 1], B0_WIDTHS, [0, 2, 4, 10, 15]),
    lite1=(32, [1, 3, 3, 4, 4, 5, 1], B0_WIDTHS, [0, 3, 6, 14, 20]),
    lite2=(32, [1, 3, 3, 4, 4, 5, 1], B2_WIDTHS, [0, 3, 6, 14, 20]),
    lite3=(32, [1, 3, 3, 5, 5, 6, 1], B3_WIDTHS, [0, 3, 6, 16, 23]),
    lite4=(32, [1, 4, 4, 6, 6, 8, 1], B4_WIDTHS, [0, 4, 8, 20, 29]))
PARAMETERS = dict(
    b0=3_595_388,
    b1=6_101_024,
    b2=7_202_562,
    b3=10_103_336,
    b4=16_742_216,
    b5=27_288_112,
    b6=39_403_992,
    b7=62_143_440,
    lite0=2_958_848,
    lite1=3_723_520,
    lite2=4_357_952,
    lite3=6_422_016,
    lite4=11_149_568)
KERNELS = [3, 3, 5, 3, 5, 5, 3]
STRIDES = [1, 2, 2, 2, 1, 2, 1]


def build(arch, device='cpu', **kwargs):
    with torch.device(device):
        return EfficientNet(arch, **kwargs)


@lru_cache
def outline(arch):
    """A network without memory, to count and measure."""
    return build(arch, 'meta', out_indices=(1, 2, 3, 4, 5))


def randomize_norms(model):
    """Gives all batch norms statistics and parameters that matter."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model


@pytest.mark.parametrize('arch', NETS)
def test_architecture(arch):
    """Every block has the official kernel, stride, widths and squeeze."""
    stem, repeats, widths, ends = NETS[arch]
    net = outline(arch)
    assert net.stem.conv.out_channels == stem
    rows = [(stage, repeat) for stage, n in enumerate(repeats)
            for repeat in range(n)]
    assert len(net.blocks) == len(rows)
    lite = arch.startswith('lite')
    width = stem
    for block, (stage, repeat) in zip(net.blocks, rows):
        conv = block.depthwise_conv.conv
        hidden = width if stage == 0 else 6 * width
        stride = STRIDES[stage] if repeat == 0 else 1
        assert conv.kernel_size == (KERNELS[stage], ) * 2
        assert conv.stride == (stride, stride)
        assert conv.groups == conv.out_channels == hidden
        assert block.with_expand_conv == (stage > 0)
        assert block.with_se != lite
        if not lite:
            assert block.se.conv1.conv.out_channels == max(
                1, int(0.25 * width))
        residual = stride == 1 and width == widths[stage]
        assert block.with_res_shortcut == residual
        width = widths[stage]
        assert block.linear_conv.conv.out_channels == width
        assert not block.linear_conv.with_activation
    assert list(net.level_ends.values()) == ends
    assert list(net.level_ends) == [1, 2, 3, 4, 5]
    assert net.out_channels == tuple(widths[i] for i in (0, 1, 2, 4, 6))
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[arch]
    activation = nn.ReLU6 if lite else nn.SiLU
    acts = [
        m for name, m in net.named_modules()
        if name.endswith('activate') and not name.endswith('se.conv2.activate')
    ]
    assert acts and all(type(act) is activation for act in acts)


def test_squeeze_of_b0():
    """The squeeze is a quarter of the block's input, not of its inside."""
    net = outline('b0')
    assert [block.se.conv1.conv.out_channels for block in net.blocks
            ] == [8, 4, 6, 6, 10, 10, 20, 20, 20, 28, 28, 28, 48, 48, 48, 48]


@pytest.mark.parametrize('size, kernel, pad', [
    (8, 3, (0, 1)),
    (7, 3, (1, 1)),
    (8, 5, (1, 2)),
    (7, 5, (2, 2)),
    (1, 3, (1, 1)),
])
@pytest.mark.parametrize('arch', ['b0', 'lite0'])
def test_same_padding(arch, size, kernel, pad):
    """At stride 2 an impulse anywhere spreads as with explicit padding."""
    index = {3: 1, 5: 3}[kernel]
    conv = build(arch).blocks[index].depthwise_conv.conv
    assert conv.kernel_size == (kernel, kernel) and conv.stride == (2, 2)
    impulses = torch.eye(size * size).view(-1, 1, size, size)
    impulses = impulses.expand(-1, conv.in_channels, -1, -1)
    expected = F.conv2d(
        F.pad(impulses, pad * 2), conv.weight, stride=2, groups=conv.groups)
    torch.testing.assert_close(conv(impulses), expected)
    assert (expected.abs().amax((1, 2, 3)) > 0).sum() > size * size // 2


@pytest.mark.parametrize('size, pad', [(8, (0, 1)), (7, (1, 1))])
def test_same_padding_of_the_stem(size, pad):
    """The stem pads an even size at its end only."""
    conv = build('b0').stem.conv
    x = torch.randn(2, 3, size, size + 2)
    expected = F.conv2d(F.pad(x, pad * 2), conv.weight, stride=2)
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize('height, heights', [
    (97, [49, 25, 13, 7, 4]),
    (131, [66, 33, 17, 9, 5]),
    (64, [32, 16, 8, 4, 2]),
    (256, [128, 64, 32, 16, 8]),
    (511, [256, 128, 64, 32, 16]),
    (513, [257, 129, 65, 33, 17]),
])
def test_sizes(height, heights):
    """Every level is half the previous one, rounded up, on each axis."""
    outs = outline('lite0')(torch.empty(1, 3, height, 97, device='meta'))
    assert [out.shape[2] for out in outs] == heights
    assert [out.shape[3] for out in outs] == [49, 25, 13, 7, 4]
    assert [out.shape[1] for out in outs] == [16, 24, 40, 112, 320]


@pytest.mark.parametrize('arch', ['b0', 'lite1'])
def test_out_indices(arch):
    """Any choice of levels gives the same tensors from fewer blocks."""
    net = randomize_norms(build(arch, out_indices=(1, 2, 3, 4, 5))).eval()
    x = torch.randn(2, 3, 65, 96)
    with torch.no_grad():
        outs = net(x)
        assert len(outs) == 5
        for level, expected in enumerate(outs, 1):
            part = build(arch, out_indices=(level, )).eval()
            part.load_state_dict(net.state_dict(), strict=False)
            assert len(part.blocks) == NETS[arch][3][level - 1] + 1
            assert part.out_channels == (expected.shape[1], )
            out, = part(x)
            assert torch.equal(out, expected)
        some = build(arch, out_indices=(4, 2)).eval()
        some.load_state_dict(net.state_dict(), strict=False)
        for out, level in zip(some(x), (4, 2)):
            assert torch.equal(out, outs[level - 1])
    three = build(arch, 'meta')(torch.empty(1, 3, 64, 64, device='meta'))
    assert [out.shape[2] for out in three] == [8, 4, 2]


@pytest.mark.parametrize('kwargs', [
    dict(out_indices=()),
    dict(out_indices=(0, 3)),
    dict(out_indices=(3, 6)),
    dict(frozen_stages=-2),
    dict(frozen_stages=6),
])
def test_bad_levels_raise(kwargs):
    """Levels out of range raise and are named."""
    (key, value), = kwargs.items()
    with pytest.raises(ValueError) as error:
        build('b0', **kwargs)
    assert f'{key}={value}' in str(error.value)


@pytest.mark.parametrize('arch', ['b8', 'es', 'D0'])
def test_unknown_arch_raises(arch):
    """An unknown architecture raises and the known ones are listed."""
    with pytest.raises(KeyError, match="'b0'.*'lite4'"):
        build(arch)


@pytest.mark.parametrize('frozen_stages', range(-1, 6))
def test_frozen_stages(frozen_stages):
    """A step changes nothing up to the frozen level, all of the rest."""
    net = build('b0', frozen_stages=frozen_stages, drop_path_rate=0.0)
    frozen = {} if frozen_stages < 0 else {'stem': net.stem}
    if frozen_stages > 0:
        for i in range(NETS['b0'][3][frozen_stages - 1] + 1):
            frozen[f'blocks.{i}'] = net.blocks[i]
    parts = dict(stem=net.stem)
    parts.update((f'blocks.{i}', block) for i, block in enumerate(net.blocks))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.train()
    for name, part in parts.items():
        mode = name not in frozen
        assert all(m.training == mode for m in part.modules()), name
        assert all(p.requires_grad == mode for p in part.parameters()), name
    outs = net(torch.randn(2, 3, 64, 64))
    if frozen_stages < 5:
        sum(out.square().mean() for out in outs).backward()
        torch.optim.SGD(net.parameters(), 1.0).step()
    changed = {
        name
        for name, part in parts.items()
        if any(not torch.equal(v, before[f'{name}.{k}'])
               for k, v in part.state_dict().items())
    }
    assert changed == set(parts) - set(frozen)
    net.eval()
    assert not any(m.training for m in net.modules())


def test_frozen_from_the_start():
    """Gradients are off before train() is called: DDP asks only once."""
    net = build('b0', frozen_stages=1)
    assert not any(p.requires_grad for p in net.stem.parameters())
    assert not any(p.requires_grad for p in net.blocks[0].parameters())
    assert all(p.requires_grad for p in net.blocks[1].parameters())


@pytest.mark.parametrize('norm', ['BN', 'SyncBN', 'reverted'])
def test_norm_eval(norm):
    """Norms of any kind stay in evaluation mode, all else trains."""
    net = build(
        'lite0',
        norm_eval=True,
        norm_cfg=dict(type='BN' if norm == 'BN' else 'SyncBN'))
    if norm == 'reverted':
        net = revert_sync_batchnorm(net)
        assert not any(isinstance(m, nn.SyncBatchNorm) for m in net.modules())
    before = {k: v.clone() for k, v in net.named_buffers()}
    net.train()
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm)]
    assert len(norms) == 1 + 2 + 15 * 3
    for module in net.modules():
        assert module.training != isinstance(module, _BatchNorm)
    net(torch.randn(2, 3, 64, 64))
    for key, value in net.named_buffers():
        assert torch.equal(value, before[key]), key
    assert all(p.requires_grad for p in net.parameters())


def test_norms_train_by_default():
    """Without norm_eval every norm learns its statistics, by 1 %."""
    net = build('lite0').train()
    net(torch.randn(4, 3, 64, 64))
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            assert module.num_batches_tracked == 1
            assert 0 < module.running_mean.abs().max()
            assert ((module.running_var - 0.99) >= -1e-6).all()


@pytest.mark.parametrize('arch', NETS)
def test_drop_path_schedule(arch):
    """Block i of N is dropped with 0.2 * i / N, and none in b0."""
    blocks = outline(arch).blocks
    num = sum(NETS[arch][1])
    rates = [getattr(block.drop_path, 'drop_prob', 0.0) for block in blocks]
    full = 0.0 if arch == 'b0' else 0.2
    assert rates == pytest.approx([full * i / num for i in range(num)])


def test_drop_path_of_b1():
    """The last block of 23 is dropped with 0.191304."""
    assert outline('b1').blocks[-1].drop_path.drop_prob \
        == pytest.approx(0.191304, abs=1e-6)


def test_drop_path_rate_is_free():
    """A rate given by hand holds for b0, too, also with fewer blocks."""
    blocks = build('b0', 'meta', drop_path_rate=0.32, out_indices=(2, )).blocks
    assert [getattr(b.drop_path, 'drop_prob', 0) for b in blocks] \
        == pytest.approx([0, 0.02, 0.04])
    blocks = build('lite0', 'meta', drop_path_rate=0.0).blocks
    assert not any(isinstance(m, DropPath) for m in blocks.modules())


def test_drop_path_drops_samples():
    """A residual branch is dropped per image, or divided by what survives."""
    block = build('b1', drop_path_rate=0.9).blocks[-1]
    drop = 0.9 * 22 / 23
    x = torch.randn(400, 320, 2, 2)
    with torch.no_grad():
        branch = block.eval()(x) - x
        block.drop_path.train()
        out = block(x) - x
    dropped = (out == 0).flatten(1).all(1)
    assert dropped.float().mean() == pytest.approx(drop, abs=0.06)
    torch.testing.assert_close(
        out[~dropped], branch[~dropped] / (1 - drop), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('arch', ['b0', 'lite0'])
def test_initialisers(arch):
    """Kernels are normal with std sqrt(2 / (k * k * out)), biases zero."""
    net = build(arch)
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            assert (module.weight == 1).all() and not module.bias.any()
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.ones_(module.bias)
    net.init_weights()
    ratios = []
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            area = module.kernel_size[0]**2
            out = 1 if module.groups > 1 else module.out_channels
            ratio = module.weight / math.sqrt(2 / (area * out))
            tolerance = 5 / math.sqrt(2 * ratio.numel())
            assert ratio.std().item() == pytest.approx(1, abs=tolerance), name
            assert abs(ratio.mean()) < 5 / math.sqrt(ratio.numel()), name
            assert module.bias is None or not module.bias.any(), name
            ratios.append(ratio.flatten())
    ratios = torch.cat(ratios)
    assert ratios.std().item() == pytest.approx(1, abs=2e-3)
    # Beyond three deviations lie 0.27 % of a normal distribution.
    assert (ratios.abs() > 3).float().mean().item() == pytest.approx(
        0.0027, rel=0.1)


@pytest.mark.parametrize('arch', ['b0', 'lite0'])
def test_with_cp_changes_nothing(arch):
    """Recomputing blocks gives equal gradients and statistics."""
    image = torch.randn(3, 3, 64, 64)
    nets = [
        build(arch, with_cp=cp, drop_path_rate=0.5) for cp in (False, True)
    ]
    nets[1].load_state_dict(nets[0].state_dict())
    for net in nets:
        net.train()
        torch.manual_seed(1)
        sum(out.square().mean() for out in net(image)).backward()
    for a, b in zip(nets[0].parameters(), nets[1].parameters()):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)
    for (name, a), b in zip(nets[0].named_buffers(), nets[1].buffers()):
        assert torch.equal(a, b), name
        assert not name.endswith('num_batches_tracked') or a == 1


@pytest.mark.parametrize('training', [True, False])
def test_with_cp_recomputes(training):
    """Blocks run a second time for the backward pass, in training only."""
    calls = []
    net = build('lite0', with_cp=True, out_indices=(1, )).train(training)
    net.blocks[0].register_forward_pre_hook(lambda *args: calls.append(args))
    out, = net(torch.randn(2, 3, 8, 8))
    assert len(calls) == 1
    out.sum().backward()
    assert len(calls) == 1 + training


@pytest.mark.parametrize('arch', ['b0', 'b3', 'lite0', 'lite4'])
def test_equals_timm(arch):
    """timm's network with the same weights gives the same five levels."""
    reference = randomize_norms(
        timm.create_model(f'tf_efficientnet_{arch}',
                          features_only=True)).eval()
    net = build(arch, out_indices=(1, 2, 3, 4, 5)).eval()
    net.load_state_dict(
        convert_imagenet_backbone(reference.state_dict(), arch))
    for size in ((97, 131), (64, 96), (128, 128)):
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            outs, expected = net(x), reference(x)
        assert len(outs) == len(expected) == 5
        for out, other in zip(outs, expected):
            assert out.shape == other.shape
            assert (out - other).abs().max() < 1e-5 * other.abs().max()


@pytest.mark.parametrize('given, own, message', [
    ('b0', 'b1', r'only in the model.*\n  \+ blocks'),
    ('b1', 'b0', r'only in the checkpoint.*\n  - blocks'),
    ('b1', 'b2', r'shape.*\n  ! blocks'),
    ('lite0', 'b0', r'only in the model.*\n  \+ blocks.0.se'),
])
def test_other_arch_raises(given, own, message, tmp_path):
    """Weights of another architecture raise, also where loading is lax."""
    state_dict = build(given).state_dict()
    net = build(own)
    with pytest.raises(ValueError, match=message):
        net.load_state_dict(state_dict, strict=False)
    torch.save(state_dict, tmp_path / 'other.pth')
    with pytest.raises(ValueError, match=message):
        load_checkpoint(net, str(tmp_path / 'other.pth'), strict=False)


@pytest.mark.parametrize('arch', ['b0', 'lite0'])
def test_gray_images(arch, tmp_path):
    """Weights for colors give what they give for three equal channels."""
    colored = build(arch)
    torch.save(colored.state_dict(), tmp_path / 'x.pth')
    net = build(
        arch,
        in_channels=1,
        init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'x.pth')))
    net.init_weights()
    assert net.stem.conv.weight.shape == (32, 1, 3, 3)
    image = torch.randn(1, 1, 64, 96)
    with torch.no_grad():
        outs = net.eval()(image)
        expected = colored.eval()(image.expand(-1, 3, -1, -1))
    for out, other in zip(outs, expected):
        torch.testing.assert_close(out, other, rtol=1e-4, atol=1e-4)
    again = build(arch, in_channels=1)  # from weights for gray images
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.stem.conv.weight, net.stem.conv.weight)


@pytest.mark.parametrize('given, own', [(3, 4), (1, 3), (4, 1)])
def test_other_channels_raise(given, own):
    """Both numbers are named, and the way out."""
    with pytest.raises(ValueError) as error:
        build(
            'b0', in_channels=own).load_state_dict(
                build('b0', in_channels=given).state_dict())
    for words in (f'of {given} channels', f'in_channels={own}',
                  'init_cfg=None'):
        assert words in str(error.value)


def test_both_sides_are_listed():
    """What is missing and what is too much stand in one message."""
    state_dict = build('b0').state_dict()
    state_dict['surplus.weight'] = state_dict.pop('stem.conv.weight')
    with pytest.raises(ValueError) as error:
        build('b0').load_state_dict(state_dict)
    assert '+ stem.conv.weight (32, 3, 3, 3)' in str(error.value)
    assert '- surplus.weight (32, 3, 3, 3)' in str(error.value)


def test_counters_may_be_missing():
    """Converted weights without num_batches_tracked load."""
    state_dict = build('b0').state_dict()
    state_dict = {
        k: v
        for k, v in state_dict.items() if 'num_batches_tracked' not in k
    }
    assert len(state_dict) < len(build('b0').state_dict())
    build('b0').load_state_dict(state_dict, strict=False)


@pytest.mark.parametrize('name, num_norms', [
    ('d0', 108),
    ('d3', 171),
    ('d7x', 308),
    ('lite0', 108),
    ('lite4', 192),
])
def test_norm_constants(meta_detector, name, num_norms):
    """All batch norms of a detector have TensorFlow's constants."""
    norms = [
        m for m in meta_detector(name).modules() if isinstance(m, _BatchNorm)
    ]
    assert len(norms) == num_norms
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.01)}


@pytest.mark.parametrize('part', [
    dict(type='mmdet_efficientdet.EfficientNet'),
    dict(
        type='mmdet_efficientdet.BiFPN',
        in_channels=[8, 8],
        out_channels=4,
        num_outs=3),
    dict(
        type='mmdet_efficientdet.EfficientDetHead',
        num_classes=1,
        in_channels=8),
])
def test_default_norm_constants(part):
    """The same holds for parts that are built without a norm_cfg."""
    norms = [
        m for m in MODELS.build(part).modules() if isinstance(m, _BatchNorm)
    ]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.01)}
