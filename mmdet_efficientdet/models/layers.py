"""What the host has no part for: TensorFlow's layers as EfficientDet uses."""
from contextlib import contextmanager, nullcontext
from typing import Callable, Optional, Tuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from mmcv.cnn import build_norm_layer
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor, nn

# TensorFlow's decay 0.99 is PyTorch's momentum 0.01; eps 1e-3 is ten to a
# hundred times the usual value, and converted weights need it.
BN_CFG = dict(type='BN', momentum=0.01, eps=1e-3)
SWISH_CFG = dict(type='SiLU')


def build_norm(norm_cfg: Optional[dict], channels: int) -> nn.Module:
    """A norm for ``channels``, or nothing for ``norm_cfg=None``."""
    return build_norm_layer(norm_cfg, channels)[1] if norm_cfg \
        else nn.Identity()


def freeze_statistics(module: nn.Module) -> None:
    """Puts all batch norms in ``module`` into evaluation mode."""
    for child in module.modules():
        # _BatchNorm covers SyncBN and what mmengine reverts it to.
        if isinstance(child, _BatchNorm):
            child.eval()


class SeparableConv2d(nn.Module):
    """Depthwise 3x3 convolution followed by a pointwise one, stride 1.

    The depthwise half has no bias and the pointwise half has one, also where
    a batch norm follows: the official network stores it there.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, 3, 1, 1, groups=in_channels, bias=False)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to ``(N, out_channels, H, W)``."""
        return self.pointwise(self.depthwise(x))


def size_of(x: Tensor) -> Tuple[int, int]:
    """Height and width, as numbers also while a graph is traced."""
    height, width = x.shape[-2:]
    return int(height), int(width)


def max_pool_same(x: Tensor, stride: tuple) -> Tensor:
    """Max-pools to ``ceil(size / stride)`` with TensorFlow's SAME padding.

    The window is ``stride + 1`` wide, as everywhere in the official network,
    and 1 on an axis of stride 1. Padding is minus infinity and lies mostly
    after the end; zero would win against features that are negative.

    Args:
        x (Tensor): Features ``(N, C, H, W)``.
        stride (tuple[int]): Stride ``(vertical, horizontal)``.
    """
    kernel = [s + 1 if s > 1 else 1 for s in stride]
    padding = []
    for size, k, s in zip(size_of(x), kernel, stride):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        padding = [total // 2, total - total // 2] + padding
    return F.max_pool2d(F.pad(x, padding, value=float('-inf')), kernel, stride)


def resize_to(x: Tensor, size: tuple) -> Tensor:
    """Resizes features to another level: max-pool down, nearest up.

    Each axis goes its own way, so an axis of one pixel stays while the other
    is pooled (the official code refuses that case). Of a ratio that no stride
    gives, such as 17 to 10, the rest is left to the interpolation; adaptive
    pooling cannot be exported.

    Args:
        x (Tensor): Features ``(N, C, H, W)``.
        size (tuple[int]): Wanted ``(height, width)``.

    Raises:
        ValueError: If one axis must grow and the other shrink.
    """
    now, size = size_of(x), tuple(size)
    if now == size:
        return x
    grows = [n < s for n, s in zip(now, size)]
    if any(grows) and any(n > s for n, s in zip(now, size)):
        raise ValueError(
            f'cannot resize features of size {now} to a level of size {size}: '
            'one axis would have to grow and the other to shrink. From one '
            'level to the next both axes must go the same way')
    if not any(grows):
        stride = []
        for n, s in zip(now, size):
            exact = (n - 1) // s + 1
            stride.append(exact if -(-n // exact) == s else (n - 1) // (s - 1))
        x = max_pool_same(x, stride)
        if size_of(x) == size:
            return x
    return F.interpolate(x, size=size, mode='nearest')


@contextmanager
def _spare_statistics(module: nn.Module):
    """Lets batch norms update copies of their statistics, to be dropped."""
    buffers = [(norm, name, buffer) for norm in module.modules()
               if isinstance(norm, _BatchNorm)
               for name, buffer in norm.named_buffers(recurse=False)]
    for norm, name, buffer in buffers:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in buffers:
            setattr(norm, name, buffer)


@torch.compiler.disable
def recompute(function: Callable, *args, norms: Optional[nn.Module] = None):
    """Runs ``function`` without keeping activations for the backward pass.

    The second forward pass, which recomputes them, leaves the statistics of
    batch norms alone, so that they are updated once per step as without
    checkpointing. ``torch.compile`` cannot look into it.

    Args:
        function (Callable): A module, or a function that runs ``norms``.
        args: Its arguments.
        norms (nn.Module, optional): Holds the batch norms that run. Defaults
            to ``function``.
    """
    norms = function if norms is None else norms
    return torch.utils.checkpoint.checkpoint(
        function,
        *args,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _spare_statistics(norms)))
