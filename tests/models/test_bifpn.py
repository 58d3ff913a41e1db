"""The neck: its graph, fusion, extra levels and initialisers."""
import math

import numpy as np
import onnxruntime
import pytest
import torch
from effdet.config.fpn_config import bifpn_config
from mmdet.models.necks import FPN
from torch import nn

from mmdet_efficientdet.models.bifpn import (BiFPN, BiFPNLayer, FusionNode,
                                             bifpn_graph)

# (level, inputs) of the nodes, by hand from the official rule.
GRAPHS = {
    2: [(0, [0, 1]), (1, [1, 2])],
    3: [(1, [1, 2]), (0, [0, 3]), (1, [1, 3, 4]), (2, [2, 5])],
    4: [(2, [2, 3]), (1, [1, 4]), (0, [0, 5]), (1, [1, 5, 6]), (2, [2, 4, 7]),
        (3, [3, 8])],
    5: [(3, [3, 4]), (2, [2, 5]), (1, [1, 6]), (0, [0, 7]), (1, [1, 7, 8]),
        (2, [2, 6, 9]), (3, [3, 5, 10]), (4, [4, 11])],
    6: [(4, [4, 5]), (3, [3, 6]), (2, [2, 7]), (1, [1, 8]), (0, [0, 9]),
        (1, [1, 9, 10]), (2, [2, 8, 11]), (3, [3, 7, 12]), (4, [4, 6, 13]),
        (5, [5, 14])],
}
# In the files of D0-D7x: number of fusion weights.
FUSION_WEIGHTS = dict(
    d0=57,
    d1=76,
    d2=95,
    d3=114,
    d4=133,
    d5=133,
    d6=0,
    d7=0,
    d7x=0,
    lite0=0,
    lite1=0,
    lite2=0,
    lite3=0,
    lite3x=0,
    lite4=0)
# Limits of the uniform kernels by width: depthwise, pointwise.
LIMITS = {
    64: (0.10127, 0.21651),
    88: (0.08655, 0.18464),
    112: (0.07681, 0.16366),
    160: (0.06435, 0.13693),
    224: (0.05443, 0.11573),
    288: (0.04803, 0.10206),
    384: (0.04161, 0.08839),
}
RELU = dict(type='ReLU')


def make_identity(module):
    """Turns the convolutions of nodes, of equal widths, into identities."""
    for node in module.modules():
        if isinstance(node, FusionNode):
            nn.init.zeros_(node.conv.depthwise.weight)
            node.conv.depthwise.weight.data[:, :, 1, 1] = 1
            nn.init.eye_(node.conv.pointwise.weight.data[..., 0, 0])
            nn.init.zeros_(node.conv.pointwise.bias)
    return module


def fuse(fusion, weights, values):
    """Fuses constant maps of positive values in a node of identities."""
    node = make_identity(
        FusionNode([2] * len(values), 2, fusion, None, RELU).double())
    if weights:
        assert node.fusion_weights.tolist() == [1.0] * len(values)
        node.fusion_weights.data = torch.tensor(weights).double()
    maps = [torch.full((1, 2, 3, 4), v, dtype=torch.double) for v in values]
    out = node(maps, (3, 4))
    assert out.shape == (1, 2, 3, 4)
    assert (out == out[0, 0, 0, 0]).all()
    return out[0, 0, 0, 0].item()


@pytest.mark.parametrize('num_levels', GRAPHS)
def test_graph(num_levels):
    """The nodes are those of the official table, and effdet's."""
    graph = bifpn_graph(num_levels)
    assert graph == GRAPHS[num_levels]
    assert len(graph) == 2 * (num_levels - 1)
    assert sum(len(inputs) for _, inputs in graph) == 5 * num_levels - 6
    nodes = bifpn_config(3, 2 + num_levels).nodes
    assert graph == [(node.feat_level - 3, list(node.inputs_offsets))
                     for node in nodes]


@pytest.mark.parametrize('fusion, weights, values, expected', [
    ('fast_normalized', (1., 1.), (1., 1.), 0.99995),
    ('fast_normalized', (1., 1., 1.), (1., 1., 1.), 0.999967),
    ('fast_normalized', (2., 0.), (1., 5.), 0.99995),
    ('fast_normalized', (-1., 1.), (3., 7.), 7 / 1.0001),
    ('fast_normalized', (-1., -2.), (3., 7.), 0.0),
    ('fast_normalized', (1., 2., 3.), (1., 10., 100.), 321 / 6.0001),
    ('softmax', (0., math.log(3)), (8., 4.), 5.0),
    ('softmax', (1., 1., 1.), (1., 2., 6.), 3.0),
    ('unbounded', (2., -0.5), (3., 4.), 4.0),
    ('unbounded', (0., 2., 3.), (1., 10., 100.), 320.0),
    ('sum', None, (3., 4.), 7.0),
    ('sum', None, (1., 10., 100.), 111.0),
])
def test_fusion(fusion, weights, values, expected):
    """Golden values of every fusion, in the order of the inputs."""
    assert fuse(fusion, weights, values) == pytest.approx(expected, rel=4e-7)


@pytest.mark.parametrize('fusion, expected', [
    ('channel_softmax', [(1 * 4 + 3 * 8) / 4, (3 * 40 + 5 * 80) / 8]),
    ('channel_fast_normalized', [(1 * 4 + 3 * 8) / 4.0001, 40 * 3 / 3.0001]),
])
def test_fusion_of_channels(fusion, expected):
    """Each channel has weights of its own; those of a channel sum to 1.

    Formulas of the official ``channel_attn`` and ``channel_fastattn``.
    """
    node = make_identity(FusionNode([2, 2], 2, fusion, None, RELU).double())
    assert node.fusion_weights.tolist() == [[1, 1], [1, 1]]
    weights = torch.tensor([[1, 3], [3, 5]]).double()
    if fusion == 'channel_softmax':
        weights = weights.log()
    else:
        weights[1, 1] = -1
    node.fusion_weights.data = weights
    fine, coarse = (
        torch.tensor(v).double().view(1, 2, 1, 1).expand(1, 2, 4, 4)
        for v in ([4, 40], [8, 80]))
    out = node([fine, coarse[..., :2, :2]], (4, 4))
    assert out[0, :, 0, 0].tolist() == pytest.approx(expected, rel=1e-9)
    assert (out == out[..., :1, :1]).all()


def test_fusion_is_relative():
    """Fast normalised fusion does not depend on the weights' common scale."""
    small, large = (
        fuse('fast_normalized', (scale, 3 * scale), (8., 4.))
        for scale in (1e3, 1e4))
    assert small == pytest.approx(5, rel=1e-6)
    assert large == pytest.approx(5, rel=1e-6)


def test_order_of_inputs():
    """A node weighs its own level first, then upper, then lower ones."""
    layer = make_identity(
        BiFPNLayer([1, 1, 1], 1, 'unbounded', None, RELU).double())
    weights = [(2, 3), (5, 7), (11, 13, 17), (19, 23)]
    for node, numbers in zip(layer.nodes, weights):
        node.fusion_weights.data = torch.tensor(numbers).double()
    inputs = [
        torch.full((1, 1, n, n), v, dtype=torch.double)
        for n, v in ((4, 1), (2, 10), (1, 100))
    ]
    middle = 2 * 10 + 3 * 100
    fine = 5 * 1 + 7 * middle
    middle_out = 11 * 10 + 13 * middle + 17 * fine
    coarse = 19 * 100 + 23 * middle_out
    outs = layer(inputs)
    assert [out.shape[2] for out in outs] == [4, 2, 1]
    for out, value in zip(outs, (fine, middle_out, coarse)):
        assert (out == value).all()


def test_activation_comes_before_the_convolution():
    """Negative sums are cut off, so that only the bias is left."""
    node = FusionNode([3, 3], 3, 'sum', None, RELU)
    nn.init.normal_(node.conv.pointwise.bias)
    out = node([-torch.rand(2, 3, 4, 4)] * 2, (4, 4))
    bias = node.conv.pointwise.bias.view(1, 3, 1, 1)
    assert torch.equal(out, bias.expand_as(out))


def test_no_activation_after_the_norm():
    """Outputs are normalised, hence negative in about half the places."""
    neck = BiFPN([8, 16], 8, 4, act_cfg=RELU)
    neck.init_weights()
    for out in neck([torch.randn(4, 8, 16, 16), torch.randn(4, 16, 8, 8)]):
        assert 0.2 < (out < 0).float().mean() < 0.8
        assert out.mean((0, 2, 3)).abs().max() < 1e-4
        # A variance of 1, but for the 1e-3 under the root.
        assert out.square().mean((0, 2, 3)).max() <= 1 + 1e-4


@pytest.mark.parametrize('name, nodes', [
    ('d0', {
        1: 320,
        2: 112,
        3: 40,
        4: 112,
        5: 320
    }),
    ('lite4', {
        1: 448,
        2: 160,
        3: 56,
        4: 160,
        5: 448
    }),
    ('d7x', {
        2: 640,
        3: 224,
        4: 80,
        5: 224,
        6: 640
    }),
])
def test_projections(meta_detector, name, nodes):
    """Six edges change width, each by a projection of its own.

    Those are five in the first layer, all at a node's first input, and the
    one that makes P6; P7 and P8 have no parameters.
    """
    neck = meta_detector(name).neck
    width = neck.out_channels
    found = {
        name: module
        for name, module in neck.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (
            1, 1) and not name.endswith('pointwise')
    }
    expected = {
        f'layers.0.nodes.{i}.resamples.0.conv': channels
        for i, channels in nodes.items()
    }
    expected['extra_levels.0.conv'] = max(nodes.values())
    assert {k: m.in_channels for k, m in found.items()} == expected
    assert all(m.out_channels == width for m in found.values())
    assert all(m.bias is not None for m in found.values())
    assert len({id(m.weight) for m in found.values()}) == 6
    assert not any(list(level.parameters()) for level in neck.extra_levels[1:])


@pytest.mark.slow
@pytest.mark.parametrize('name', FUSION_WEIGHTS)
def test_number_of_fusion_weights(meta_detector, name):
    """D0-D5 weigh their inputs; D6, D7, D7x and Lite add them."""
    numbers = [
        p.numel() for key, p in meta_detector(name).neck.named_parameters()
        if 'fusion_weights' in key
    ]
    assert sum(numbers) == FUSION_WEIGHTS[name]


def test_projection_only_where_the_width_differs():
    """An input that has the neck's width already gets no projection."""
    neck = BiFPN([8, 16, 8], 8, 5)
    assert [k for k, m in neck.named_modules() if k.endswith('resamples.0')
            ] == [f'layers.0.nodes.{i}.resamples.0' for i in (2, 4)]
    assert not list(neck.extra_levels.parameters())


def test_second_layer_reads_the_first():
    """Layers follow each other, and the caller's list is left alone."""
    neck = BiFPN([4, 6], 8, 3, stack_times=2).eval()
    first, second = neck.layers
    feats = [torch.randn(1, 4, 8, 8), torch.randn(1, 6, 4, 4)]
    given = list(feats)
    outs = neck(feats)
    assert len(feats) == 2 and all(a is b for a, b in zip(feats, given))
    neck.layers = nn.ModuleList([first])
    torch.testing.assert_close(outs, second(neck(feats)), rtol=0, atol=0)


def test_extra_levels_are_pooled():
    """P6 is projected, then pooled; P7 is pooled from P6.

    Here each window of 3x3 pixels is cut out by hand, and there is no ReLU.
    """
    neck = BiFPN([4], 2, 3, relu_before_extra_convs=True).eval()
    levels = []

    def look(module, args):
        levels.extend(args[0])

    neck.layers[0].register_forward_pre_hook(look)
    x = torch.randn(1, 4, 7, 10)
    neck([x])
    assert [x.shape[2:] for x in levels] == [(7, 10), (4, 5), (2, 3)]
    projected = neck.extra_levels[0](x)
    assert projected.min() < -1  # no ReLU has been here
    for pooled, below in zip(levels[1:], (projected, levels[1])):
        (height, width), (rows, columns) = below.shape[2:], pooled.shape[2:]
        for row, column in np.ndindex(rows, columns):
            # SAME: what the size lacks is padded at both ends, more at the
            # lower right.
            top = 2 * row - (2 * (rows - 1) + 3 - height) // 2
            left = 2 * column - (2 * (columns - 1) + 3 - width) // 2
            window = below[..., max(top, 0):top + 3, max(left, 0):left + 3]
            assert torch.equal(pooled[..., row, column], window.amax((2, 3)))


def test_extra_levels_of_negative_values():
    """The pooling ignores what lies beyond the border: -1 stays -1."""
    neck = BiFPN([4], 2, 3).eval()
    nn.init.zeros_(neck.extra_levels[0].conv.weight)
    nn.init.constant_(neck.extra_levels[0].conv.bias, -1)
    neck.extra_levels[0].norm.eps = 0
    feats = [torch.randn(1, 4, 7, 10)]
    neck._add_levels(feats)
    for level in feats[1:]:
        assert (level == -1).all()


@pytest.mark.parametrize('settings', [
    dict(num_outs=4),
    dict(num_outs=6),
    dict(num_outs=3, start_level=1),
    dict(num_outs=5, start_level=1),
    dict(num_outs=4, start_level=3),
    dict(num_outs=3, end_level=2),
    dict(num_outs=2, start_level=1, end_level=2),
    dict(num_outs=5, start_level=1, end_level=3),
    dict(num_outs=5, add_extra_convs=True),
    dict(num_outs=6, add_extra_convs='on_input'),
    dict(
        num_outs=6,
        start_level=1,
        add_extra_convs='on_output',
        relu_before_extra_convs=True),
])
def test_levels_like_fpn(settings):
    """Number, width and sizes of the outputs are those of FPN."""
    channels = [4, 6, 10, 12]
    feats = [
        torch.empty(2, c, *size, device='meta')
        for c, size in zip(channels, [(64, 50), (32, 25), (16, 13), (8, 7)])
    ]
    with torch.device('meta'):
        neck = BiFPN(channels, 8, **settings)
        fpn = FPN(channels, 8, **settings)
    outs = neck(feats)
    assert len(outs) == settings['num_outs']
    assert [out.shape for out in outs] == [out.shape for out in fpn(feats)]


@pytest.mark.parametrize('relu', [False, True])
def test_convolutions_behind_the_fusion(relu):
    """'on_output': each further level is a convolution of the one before."""
    neck = BiFPN([3, 4], 2, 4, stack_times=1, relu_before_extra_convs=relu,
                 add_extra_convs='on_output').eval()  # yapf: disable
    plain = BiFPN([3, 4], 2, 2, stack_times=1).eval()
    plain.layers = neck.layers
    feats = [torch.randn(1, 3, 16, 16), torch.randn(1, 4, 8, 8)]
    outs = neck(feats)
    torch.testing.assert_close(outs[:2], plain(feats), rtol=0, atol=0)
    first, second = neck.extra_levels
    assert first.conv.stride == second.conv.stride == (2, 2)
    assert torch.equal(outs[2], first(outs[1]))
    middle = outs[2].relu() if relu else outs[2]
    assert torch.equal(outs[3], second(middle))


def test_convolutions_before_the_fusion():
    """'on_input': they read the last input, and the layers fuse them."""
    neck = BiFPN([3, 4], 2, 4, stack_times=1,
                 add_extra_convs='on_input').eval()
    feats = [torch.randn(1, 3, 16, 16), torch.randn(1, 4, 8, 8)]
    first, second = neck.extra_levels
    assert (first.conv.in_channels, first.conv.out_channels) == (4, 2)
    levels = [*feats, first(feats[1]), second(first(feats[1]))]
    torch.testing.assert_close(
        neck(feats), neck.layers[0](levels), rtol=0, atol=0)


@pytest.mark.parametrize('num_ins', [2, 3, 4, 5, 6])
def test_number_of_inputs(num_ins):
    """From P2 with six inputs, to two; nothing is made up."""
    widths = list(range(3, 3 + num_ins))
    neck = BiFPN(widths, 2, num_ins, stack_times=2).eval()
    assert not neck.extra_levels
    assert len(neck.layers[0].nodes) == 2 * (num_ins - 1)
    outs = neck(
        [torch.randn(1, c, 64 >> i, 96 >> i) for i, c in enumerate(widths)])
    assert [out.shape for out in outs] == [(1, 2, 64 >> i, 96 >> i)
                                           for i in range(num_ins)]


def test_full_convolutions():
    """3x3 kernels of all channels in place of the separable ones."""
    neck = BiFPN([2, 2], 2, 3, stack_times=1, separable_conv=False)
    shapes = [node.conv.weight.shape for node in neck.layers[0].nodes]
    assert shapes == [(2, 2, 3, 3)] * 4
    assert len(neck([torch.ones(1, 2, 8, 8), torch.ones(1, 2, 4, 4)])) == 3


@pytest.mark.parametrize('norm_cfg, kind', [
    (dict(type='GN', num_groups=2), nn.GroupNorm),
    (dict(type='SyncBN'), nn.SyncBatchNorm),
    (dict(type='BN', requires_grad=False), nn.BatchNorm2d),
])
def test_norms(norm_cfg, kind):
    """The norm stands behind every convolution, trained or frozen."""
    neck = BiFPN([3, 4], 6, 3, norm_cfg=norm_cfg)
    norms = [m for m in neck.modules() if isinstance(m, kind)]
    # 3 x 4 nodes; the first layer reads the input of level 0 once and that of
    # level 1 twice; the level above
    assert len(norms) == 12 + 3 + 1
    learned = norm_cfg.get('requires_grad', True)
    assert {norm.weight.requires_grad for norm in norms} == {learned}


def test_statistics_that_stay():
    """norm_eval freezes statistics, not scales; evaluation is evaluation."""
    neck = BiFPN([3, 4], 6, 3, norm_eval=True)
    before = {k: v.clone() for k, v in neck.named_buffers()}
    feats = [torch.randn(2, 3, 16, 16), torch.randn(2, 4, 8, 8)]
    sum(out.square().sum() for out in neck.train()(feats)).backward()
    assert all(torch.equal(v, before[k]) for k, v in neck.named_buffers())
    assert neck.layers[0].nodes[0].norm.weight.grad.any()
    assert neck.training and not neck.eval().training


def test_no_activation():
    """act_cfg=None, the default of FPN, hands negative sums on."""
    node = make_identity(FusionNode([2, 2], 2, 'sum', None, None))
    out = node([-torch.ones(1, 2, 2, 2)] * 2, (2, 2))
    assert (out == -2).all()


@pytest.mark.parametrize('sizes', [
    [(64, 65), (32, 33), (16, 17), (8, 9), (4, 5)],
    [(13, 17), (7, 9), (4, 5), (2, 3), (1, 2), (1, 1)],
    [(8, 32), (4, 16), (2, 8), (1, 4), (1, 2), (1, 1)],
    [(40, 40), (20, 20), (10, 10), (5, 5), (3, 3)],
    [(50, 60), (20, 15), (7, 15), (4, 8)],
    [(5, 5), (10, 12), (10, 30)],
])
@pytest.mark.parametrize('fusion', ['fast_normalized', 'channel_softmax'])
def test_odd_sizes(sizes, fusion):
    """Levels of odd sizes, down to one pixel, keep their sizes."""
    neck = BiFPN([3, 4, 5], 2, len(sizes), fusion=fusion).eval()
    outs = neck(
        [torch.randn(2, c, *size) for c, size in zip((3, 4, 5), sizes)])
    assert [out.shape for out in outs] == [(2, 2, *size) for size in sizes]
    assert all(out.isfinite().all() for out in outs)


def test_all_parameters_learn():
    """Gradients reach every parameter of the neck."""
    neck = BiFPN([3, 4, 5], 6, 5, stack_times=2)
    neck.init_weights()
    outs = neck(
        [torch.randn(2, c, n, n) for c, n in ((3, 32), (4, 16), (5, 8))])
    sum((out * torch.randn_like(out)).sum() for out in outs).backward()
    for key, parameter in neck.named_parameters():
        assert parameter.grad.isfinite().all(), key
        # Biases in front of a norm have no effect but for rounding.
        assert parameter.grad.any(), key


def test_without_norm():
    """norm_cfg=None leaves the norms out everywhere."""
    neck = BiFPN([3, 4], 6, 3, norm_cfg=None)
    assert not [k for k in neck.state_dict() if 'norm' in k]
    assert len(neck([torch.ones(1, 3, 8, 8), torch.ones(1, 4, 4, 4)])) == 3


@pytest.mark.parametrize('settings, words', [
    (dict(fusion='attention'), "'attention'.*'fast_normalized'"),
    (dict(num_outs=2), 'num_outs=2.*at least 3'),
    (dict(num_outs=1, start_level=2), 'num_outs=1.*at least 2'),
    (dict(num_outs='5'), "num_outs='5'.*at least 1"),
    (dict(out_channels=0), 'out_channels=0.*at least 1'),
    (dict(in_channels=[0, 4]), 'in_channels=0.*at least 1'),
    (dict(stack_times=1.5), 'stack_times=1.5.*at least 1'),
    (dict(num_outs=1, end_level=0), r' 0 of \[3, 4, 5\].*add_extra_convs'),
    (dict(num_outs=4, end_level=1), 'num_outs=4.*exactly 2.* 0 to 1 of'),
    (dict(start_level=2, end_level=1), r'=2 and end_level=1.*\[3, 4, 5\]'),
    (dict(end_level=3), r'end_level=3.*\[3, 4, 5\]'),
    (dict(start_level=-1), r'start_level=-1.*\[3, 4, 5\]'),
    (dict(stack_times=0), 'stack_times=0.*at least 1'),
    (dict(in_channels=256), 'in_channels=256.*list'),
    (dict(add_extra_convs='on_lateral'), "'on_lateral'.*'on_output'"),
    (dict(start_level=2,
          add_extra_convs='on_output'), r' 2 of \[3, 4, 5\].*add_extra_convs'),
])
def test_bad_arguments_raise(settings, words):
    """The message has the value and what is allowed."""
    with pytest.raises(ValueError, match=words):
        BiFPN(**{**dict(in_channels=[3, 4, 5], out_channels=2, num_outs=5),
                 **settings})  # yapf: disable


@pytest.mark.parametrize('shapes, words', [
    ([(3, 8, 8)], r'1 .*\[3\].*in_channels=\[3, 4\].*out_indices'),
    ([(3, 8, 8), (5, 4, 4)], r'\[3, 5\].*in_channels=\[3, 4\]'),
    ([(3, 8, 8), (4, 4, 9)], r'0 and 1.*8x8 and 4x9.*\[\(8, 8\), \(4, 9\)\]'),
    ([(3, 8, 8), (4, 8, 0)], 'input 1.*8x0.*Enlarge'),
])
def test_inputs_that_do_not_fit(shapes, words):
    """Levels and sizes are named."""
    neck = BiFPN([3, 4], 2, 2)
    with pytest.raises(ValueError, match=words):
        neck([torch.ones(1, *shape) for shape in shapes])


@pytest.mark.parametrize('add_extra_convs', [False, True, 'on_output'])
def test_empty_input_below_further_levels(add_extra_convs):
    """The input is named before further levels are made from it."""
    neck = BiFPN([2, 3, 4], 2, 4, start_level=1,
                 add_extra_convs=add_extra_convs)  # yapf: disable
    with pytest.raises(ValueError, match='input 2.*0x2.*Enlarge'):
        neck([
            torch.ones(1, c, *size)
            for c, size in ((2, (2, 8)), (3, (1, 4)), (4, (0, 2)))
        ])


@pytest.mark.parametrize('add_extra_convs', [False, True, 'on_output'])
def test_single_value_under_batch_norm(add_extra_convs):
    """Batch norm cannot train on one pixel of one image."""
    settings = dict(start_level=1, add_extra_convs=add_extra_convs)
    feats = [torch.randn(1, c, n, n) for c, n in ((2, 8), (3, 4), (4, 2))]
    neck = BiFPN([2, 3, 4], 2, 4, **settings)
    words = (r'level 3.*1x1.*\[\(4, 4\), \(2, 2\), \(1, 1\), \(1, 1\)\].*'
             'Enlarge.*norm_eval=True')
    with pytest.raises(ValueError, match=words):
        neck(feats)
    assert len(neck([x.repeat(2, 1, 1, 1) for x in feats])) == 4
    assert len(neck.eval()(feats)) == 4
    for other in (dict(norm_eval=True),
                  dict(norm_cfg=dict(type='GN', num_groups=1))):
        neck = BiFPN([2, 3, 4], 2, 4, **settings, **other).train()
        assert len(neck(feats)) == 4
    neck = BiFPN([2, 3, 4], 2, 4, **settings, norm_cfg=dict(type='SyncBN'))
    with pytest.raises(ValueError, match='more than 1 value'):  # by itself
        neck(feats)


EXPORTED = [
    dict(num_outs=5),
    dict(num_outs=5, fusion='softmax', add_extra_convs='on_output'),
    dict(num_outs=4, fusion='channel_fast_normalized', separable_conv=False),
    dict(num_outs=3, fusion='unbounded', stack_times=2,
         norm_cfg=dict(type='GN', num_groups=2)),
    dict(num_outs=6, fusion='sum', norm_cfg=None, add_extra_convs=True),
]  # yapf: disable


def trained(settings):
    """A neck whose statistics and weights are not the initial ones."""
    torch.manual_seed(0)
    neck = BiFPN([3, 4, 5], 6, **{'stack_times': 1, **settings})
    feats = [
        torch.randn(2, c, n, n + 2) for c, n in ((3, 30), (4, 15), (5, 8))
    ]
    neck.train()(feats)
    for parameter in neck.parameters():
        parameter.data += torch.rand_like(parameter) * 0.1
    return neck.eval(), feats


@pytest.mark.slow
@pytest.mark.parametrize('settings', EXPORTED, ids=str)
def test_onnx(settings, tmp_path):
    """The exported graph computes the same; its levels are odd in size."""
    neck, feats = trained(settings)
    path = str(tmp_path / 'neck.onnx')
    torch.onnx.export(neck, (feats, ), path, dynamo=False, opset_version=17)
    session = onnxruntime.InferenceSession(path)
    outs = session.run(None, {
        i.name: x.numpy()
        for i, x in zip(session.get_inputs(), feats)
    })
    with torch.no_grad():
        expected = neck(feats)
    assert len(outs) == settings['num_outs']
    for out, reference in zip(outs, expected):
        assert reference.abs().max() > 0.1
        np.testing.assert_allclose(
            out, reference.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('settings', EXPORTED, ids=str)
def test_compiled_in_one_piece(settings):
    """torch.compile takes the whole neck: a graph break would raise."""
    torch._dynamo.reset()  # its limit of recompilations counts all tests
    neck, feats = trained(settings)
    compiled = torch.compile(neck, backend='eager', fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(feats), neck(feats))


@pytest.mark.parametrize('width', LIMITS)
def test_initialisers(width):
    """Kernels are uniform up to Glorot's limits; all else is 1 or 0."""
    neck = BiFPN([40, 112], width, 5, stack_times=1)
    neck.init_weights()
    state = {
        k: v
        for k, v in neck.state_dict().items() if v.is_floating_point()
    }
    for kind, limit in zip(('depthwise', 'pointwise'), LIMITS[width]):
        kernels = np.concatenate([
            v.flatten().numpy() for k, v in state.items()
            if k.endswith(f'{kind}.weight')
        ])
        assert np.abs(kernels).max() == pytest.approx(limit, rel=2e-3)
        assert kernels.std() == pytest.approx(limit / 3**0.5, rel=0.02)
    kernel = state['layers.0.nodes.3.resamples.0.conv.weight']
    assert kernel.shape == (width, 40, 1, 1)
    assert kernel.abs().max().item() == pytest.approx(
        (6 / (width + 40))**0.5, rel=0.01)
    for key, value in state.items():
        if key.endswith(('bias', 'running_mean')):
            assert not value.any(), key
        elif 'norm' in key or 'fusion_weights' in key:
            assert (value == 1).all(), key


def test_identity_init():
    """Only what is between features of the same width changes."""
    start = {}
    for flag in (False, True):
        torch.manual_seed(0)
        neck = BiFPN([40, 8], 8, 4, stack_times=2, identity_init=flag)
        neck.init_weights()
        start[flag] = neck.state_dict()
    for key, value in start[True].items():
        if key.endswith('pointwise.weight'):
            assert torch.equal(value[..., 0, 0], torch.eye(8)), key
        else:
            assert torch.equal(value, start[False][key]), key
    with pytest.raises(ValueError, match='identity_init=True.*separable_conv'):
        BiFPN([40, 8], 8, 4, separable_conv=False, identity_init=True)


def test_init_cfg():
    """What a config asks for takes the place of the official initialisers."""
    neck = BiFPN([40, 112], 8, 3, stack_times=1,
                 init_cfg=dict(type='Constant', layer='Conv2d',
                               val=3, bias=2))  # yapf: disable
    neck.init_weights()
    convs = [m for m in neck.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) > 8
    for conv in convs:
        assert (conv.weight == 3).all()
        assert conv.bias is None or (conv.bias == 2).all()
