"""Layers of TensorFlow as EfficientDet uses them, and mixins of modules."""
from contextlib import contextmanager, nullcontext
from typing import Callable, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from mmcv.cnn import build_norm_layer
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor, nn

# TensorFlow's decay of 0.99 is a momentum of 0.01 in PyTorch. Its eps of 1e-3
# is a hundred times PyTorch's default, and converted weights need it.
BN_CFG = dict(type='BN', momentum=0.01, eps=1e-3)
SWISH_CFG = dict(type='SiLU')


def build_norm(norm_cfg: Optional[dict], channels: int) -> nn.Module:
    """A norm for ``channels``, or the identity for ``norm_cfg=None``."""
    return build_norm_layer(norm_cfg, channels)[1] if norm_cfg \
        else nn.Identity()


class NormEvalMixin:
    """Mixin of modules whose batch norms stay in evaluation mode on demand.

    With ``norm_eval=True`` they do so while the module trains.
    """

    norm_eval = False

    def train(self, mode: bool = True) -> nn.Module:
        """Sets the mode; batch norms obey ``norm_eval``."""
        super().train(mode)
        if self.norm_eval:
            for module in self.modules():
                # _BatchNorm covers SyncBN and what mmengine reverts it to.
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self


class ConvInitMixin:
    """Mixin of modules with their own initialiser of convolutions.

    With ``identity_init=True``, a pointwise convolution of ``hidden_convs``
    begins as the identity: a channel keeps its meaning through all layers.
    """

    identity_init = False

    def hidden_convs(self) -> Sequence['SeparableConv2d']:
        """Those from features to features of the same width."""
        return ()

    def init_kernel(self, conv: nn.Conv2d) -> None:
        """Draws the kernel of a convolution."""
        raise NotImplementedError

    def init_weights(self) -> None:
        """Follows ``init_cfg``, or draws all kernels and sets biases to 0."""
        if self.init_cfg:
            return super().init_weights()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                self.init_kernel(module)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.identity_init:
            for conv in self.hidden_convs():
                nn.init.dirac_(conv.pointwise.weight)
        self._is_init = True


class SeparableConv2d(nn.Module):
    """Depthwise 3x3 convolution followed by a pointwise one, stride 1.

    Only the pointwise convolution has a bias, even if a batch norm follows, as
    in the official network.
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
    """Height and width as integers, also while a graph is traced."""
    height, width = x.shape[-2:]
    return int(height), int(width)


def max_pool_same(x: Tensor, stride: tuple) -> Tensor:
    """Max-pools to ``ceil(size / stride)`` with TensorFlow's SAME padding.

    The window is ``stride + 1`` wide, as everywhere in the official network,
    and 1 on an axis of stride 1. The padding is minus infinity, since zeros
    would win against negative features; an odd one is larger at the end.

    Args:
        x (Tensor): Features ``(N, C, H, W)``.
        stride (tuple[int]): Stride ``(vertical, horizontal)``.
    """
    kernel = [s + 1 if s > 1 else 1 for s in stride]
    before = [
        max((-(-n // s) - 1) * s + k - n, 0) // 2
        for n, k, s in zip(size_of(x), kernel, stride)
    ]
    # The ceiling stands for the padding at the end, without a padded copy.
    return F.max_pool2d(x, kernel, stride, before, ceil_mode=True)


def resize_to(x: Tensor, size: tuple) -> Tensor:
    """Resizes features to another level: max-pool down, nearest up.

    Each axis is resized separately, so an axis of one pixel stays while the
    other one is pooled (the official code refuses this case). If no stride
    gives the ratio, as for 17 to 10, interpolation completes the resizing;
    adaptive pooling cannot be exported.

    Args:
        x (Tensor): Features ``(N, C, H, W)``.
        size (tuple[int]): Wanted ``(height, width)``. Both axes must grow, or
            both shrink, as :class:`BiFPN` checks.
    """
    now, size = size_of(x), tuple(size)
    if now == size:
        return x
    if all(n >= s for n, s in zip(now, size)):
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
    """Restores the statistics of all batch norms at the end."""
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

    The second forward pass, which recomputes the activations, does not change
    the statistics of batch norms. So they are updated once per step, as they
    are without recomputing. ``torch.compile`` does not trace this function.

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
