"""The layers against slow transcriptions of TensorFlow's rules."""
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from torch import nn

from mmdet_efficientdet.models.layers import (SeparableConv2d, max_pool_same,
                                              recompute, resize_to)


def same_pool_1d(x, stride):
    """SAME max-pooling of the last axis: padding never wins."""
    size = x.shape[-1]
    window = stride + 1 if stride > 1 else 1
    out = -(-size // stride)
    before = max((out - 1) * stride + window - size, 0) // 2
    starts = [i * stride - before for i in range(out)]
    return np.stack([
        x[..., max(start, 0):start + window].max(-1) for start in starts
    ], -1)  # yapf: disable


def same_pool(x, stride):
    """SAME max-pooling of both axes, one after the other."""
    x = same_pool_1d(x, stride[1])
    return same_pool_1d(x.swapaxes(-1, -2), stride[0]).swapaxes(-1, -2)


@pytest.mark.parametrize('size', [(8, 8), (7, 7), (8, 5), (1, 6), (2, 3)])
def test_pool_padding_never_wins(size):
    """A map of -1 stays -1 everywhere, and sizes are halved upwards."""
    pooled = max_pool_same(torch.full((1, 2, *size), -1.0), (2, 2))
    assert pooled.shape[2:] == (-(-size[0] // 2), -(-size[1] // 2))
    assert (pooled == -1).all()


@pytest.mark.parametrize('stride', [(2, 2), (1, 2), (2, 1), (3, 2), (4, 4)])
@pytest.mark.parametrize('size', [(8, 8), (7, 9), (9, 8), (5, 16), (13, 3)])
def test_pool_window(size, stride):
    """Windows are stride + 1 wide; most of the padding is at the end."""
    x = torch.randn(2, 3, *size) - 3
    expected = same_pool(x.numpy(), stride)
    np.testing.assert_array_equal(max_pool_same(x, stride).numpy(), expected)


@pytest.mark.parametrize('size, index', [
    ((3, 5), [0, 0, 1, 1, 2]),
    ((2, 3), [0, 0, 1]),
    ((4, 8), [0, 0, 1, 1, 2, 2, 3, 3]),
    ((1, 2), [0, 0]),
    ((1, 1), [0]),
])
def test_nearest_literals(size, index):
    """Nearest enlargement repeats these pixels, on both axes alike."""
    line = torch.arange(float(size[0]))
    up = resize_to((line[:, None] * 10 + line)[None, None], (size[1], size[1]))
    index = torch.tensor(index)
    assert torch.equal(up[0, 0], (index[:, None] * 10 + index).float())


def test_nearest_rule():
    """The source of pixel i is floor(i * in / out), for all level sizes."""
    for size in range(1, 200):
        small = -(-size // 2)
        up = resize_to(torch.arange(float(small)).view(1, 1, 1, -1), (1, size))
        expected = [i * small // size for i in range(size)]
        assert up.flatten().tolist() == expected


@pytest.mark.parametrize('size, target', [
    ((16, 16), (8, 8)),
    ((15, 17), (8, 9)),
    ((16, 24), (4, 6)),
    ((33, 20), (5, 3)),
    ((1, 8), (1, 4)),
    ((5, 1), (3, 1)),
    ((1, 16), (1, 4)),
    ((6, 8), (6, 4)),
    ((9, 4), (3, 4)),
])
def test_shrink_pools_each_axis(size, target):
    """The stride of an axis is floor((size - 1) / target) + 1."""
    x = torch.randn(2, 3, *size) - 3
    stride = [(n - 1) // t + 1 for n, t in zip(size, target)]
    expected = same_pool(x.numpy(), stride)
    assert expected.shape[2:] == target
    np.testing.assert_array_equal(resize_to(x, target).numpy(), expected)


@pytest.mark.parametrize('size, target', [
    ((1, 4), (1, 8)),
    ((3, 1), (5, 1)),
    ((4, 2), (4, 3)),
])
def test_enlarge_keeps_an_equal_axis(size, target):
    """Each axis is enlarged by itself, an equal one not at all."""
    x = torch.randn(2, 3, *size)
    rows, cols = ([i * n // t for i in range(t)] for n, t in zip(size, target))
    assert torch.equal(resize_to(x, target), x[:, :, rows][:, :, :, cols])


def test_same_size_is_untouched():
    """Features of the right size pass through."""
    x = torch.randn(1, 2, 5, 7)
    assert resize_to(x, (5, 7)) is x


def test_any_ratio_fits():
    """The wanted size comes out, also where no stride leads to it."""
    x = torch.arange(17.0).view(1, 1, 1, 17)
    # Stride 1 leaves 17 of 10, of which every 1.7th is taken.
    assert resize_to(
        x, (1, 10)).flatten().tolist() == [0, 1, 3, 5, 6, 8, 10, 11, 13, 15]
    # Windows of 4 at stride 3, of 16, give 2, 5, 8, 11, 14 and 15.
    assert resize_to(x[..., :16],
                     (1, 5)).flatten().tolist() == [2, 5, 8, 11, 14]
    assert resize_to(torch.zeros(1, 1, 50, 60), (20, 15)).shape[2:] == (20, 15)


def test_separable_conv_is_a_factored_conv():
    """Depthwise without bias, then pointwise with bias."""
    conv = SeparableConv2d(4, 6).double()
    x = torch.randn(2, 4, 5, 7, dtype=torch.double)
    kernel = conv.pointwise.weight * conv.depthwise.weight.transpose(0, 1)
    expected = F.conv2d(x, kernel, conv.pointwise.bias, padding=1)
    torch.testing.assert_close(conv(x), expected)
    assert [k for k, _ in conv.named_parameters()
            ] == ['depthwise.weight', 'pointwise.weight', 'pointwise.bias']


class Block(nn.Module):
    """Everything that a second forward pass could disturb."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.frozen = nn.BatchNorm2d(3).eval()
        self.drop = DropPath(0.5)

    def forward(self, x):
        return x + self.drop(self.frozen(self.norm(self.conv(x)).relu()))


def test_recompute_changes_nothing():
    """Loss, gradients and statistics are those of an ordinary step."""
    plain, saving = Block(), None
    plain.frozen.running_mean.uniform_()
    saving = copy.deepcopy(plain)
    image = torch.randn(16, 3, 6, 6)
    losses = []
    for block, run in ((plain, plain), (saving,
                                        lambda x: recompute(saving, x))):
        torch.manual_seed(1)
        x = image.clone().requires_grad_()
        loss = run(x).square().mean()
        loss.backward()
        losses.append((loss, x.grad))
        assert block.norm.num_batches_tracked == 1
        assert block.norm.track_running_stats
    torch.testing.assert_close(*losses, rtol=0, atol=0)
    for (name, a), b in zip(plain.named_parameters(), saving.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0, msg=name)
    for name, buffer in plain.state_dict().items():
        assert torch.equal(buffer, saving.state_dict()[name]), name
    assert plain.norm.running_mean.abs().sum() > 0
    assert saving.frozen.num_batches_tracked == 0
