"""Weighted fusion of feature maps (arXiv 1911.09070, sec. 3.3)."""
from collections import OrderedDict
from typing import Optional, Sequence

import torch
from mmcv.cnn import build_activation_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

from .layers import SeparableConv2d, build_norm, resize_to

FUSIONS = ('fast_normalized', 'softmax', 'sum', 'unbounded',
           'channel_fast_normalized', 'channel_softmax')


def conv_norm(in_channels: int, out_channels: int, norm_cfg: Optional[dict],
              *conv_args) -> nn.Sequential:
    """A convolution with bias, and a norm; no activation.

    The norm makes the bias redundant, but the official network has it and its
    checkpoints contain it.

    Args:
        in_channels (int): Width of the input.
        out_channels (int): Width of the output.
        norm_cfg (dict, optional): Config of the norm.
        conv_args: Kernel size, stride and padding.
    """
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(in_channels, out_channels, *conv_args),
            norm=build_norm(norm_cfg, out_channels)))


class FusionNode(BaseModule):
    """Fuses features of several levels at one level.

    Every input is resized to the node's level. An input of a different width
    first passes its own 1x1 convolution and norm. The weighted sum is followed
    by the activation, a 3x3 convolution and a norm.

    Args:
        in_channels (Sequence[int]): Width of each input.
        out_channels (int): Width of the output.
        fusion, norm_cfg, act_cfg, separable_conv: See :class:`BiFPN`.
    """

    eps = 1e-4  # of the fast normalised fusion

    def __init__(self,
                 in_channels: Sequence[int],
                 out_channels: int,
                 fusion: str,
                 norm_cfg: Optional[dict],
                 act_cfg: Optional[dict],
                 separable_conv: bool = True) -> None:
        super().__init__()
        self.fusion = fusion
        if fusion != 'sum':
            shape = [len(in_channels)]
            if fusion.startswith('channel_'):
                shape.append(out_channels)
            self.fusion_weights = nn.Parameter(torch.ones(shape))
        self.resamples = nn.ModuleDict({
            str(edge):
            conv_norm(channels, out_channels, norm_cfg, 1)
            for edge, channels in enumerate(in_channels)
            if channels != out_channels
        })
        self.act = build_activation_layer(act_cfg) if act_cfg \
            else nn.Identity()
        self.conv = SeparableConv2d(out_channels, out_channels) \
            if separable_conv else nn.Conv2d(
                out_channels, out_channels, 3, padding=1)
        self.norm = build_norm(norm_cfg, out_channels)

    def normalized_weights(self) -> Tensor:
        """The factor of each input, ``(num_inputs, )``.

        The shape is ``(num_inputs, C)`` for the ``channel_`` fusions.
        """
        weights = self.fusion_weights
        if self.fusion.endswith('softmax'):
            return weights.softmax(0)
        if self.fusion.endswith('fast_normalized'):
            weights = weights.relu()
            return weights / (weights.sum(0) + self.eps)
        return weights

    def forward(self, inputs: Sequence[Tensor], size: tuple) -> Tensor:
        """Returns the fused features ``(N, out_channels, *size)``.

        Args:
            inputs (Sequence[Tensor]): Features ``(N, C_i, H_i, W_i)``.
            size (tuple[int]): Height and width of the node's level.
        """
        resized = []
        for edge, x in enumerate(inputs):
            if str(edge) in self.resamples:
                x = self.resamples[str(edge)](x)
            resized.append(resize_to(x, size))
        # Half precision overflows in sums and rounds weights to three digits.
        dtype = resized[0].dtype
        wide = torch.promote_types(dtype, torch.float32)
        if self.fusion != 'sum':
            weights = self.normalized_weights().to(wide)
            weights = weights.view(len(inputs), 1, -1, 1, 1)
            resized = [x * weight for x, weight in zip(resized, weights)]
        fused = self.act(sum(resized[1:], resized[0].to(wide)))
        return self.norm(self.conv(fused.to(dtype)))
