"""EfficientNet B0-B7 and EfficientNet-Lite0-4 (arXiv 1905.11946).

They behave as google/automl ``efficientdet/backbone``: SAME padding, a squeeze
ratio relative to the block's input, and a survival probability that falls
linearly with the block's index.
"""
import math
from typing import List, Optional, Sequence, Tuple

import torch
from mmcv.cnn import ConvModule
from mmdet.models.layers import InvertedResidual
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..registry import MODELS
from .layers import BN_CFG, ConvInitMixin, NormEvalMixin, recompute
from .strict_loading import StrictLoading

# Rows of the stages of B0: repeats, kernel, stride, expansion, channels.
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40),
          (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
          (1, 3, 1, 6, 320))  # yapf: disable
LEVELS = (1, 2, 3, 4, 5)
SAME_CONV = dict(type='Conv2dAdaptivePadding')  # TensorFlow's SAME padding

# Width and depth coefficients of B0-B7. Lite0-Lite4 have those of B0-B4.
COEFFICIENTS = ((1.0, 1.0), (1.0, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8),
                (1.6, 2.2), (1.8, 2.6), (2.0, 3.1))
ARCHS = {f'b{i}': pair for i, pair in enumerate(COEFFICIENTS)}
ARCHS |= {f'lite{i}': ARCHS[f'b{i}'] for i in range(5)}


def _round_channels(channels: float) -> int:
    """Rounds to a multiple of 8, never below 90 % of the exact width."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def block_table(arch: str) -> Tuple[int, List[dict]]:
    """The stem's width and one row for every block of an architecture.

    Args:
        arch (str): A key of ``ARCHS``.

    Returns:
        tuple: Channels of the stem, and a list of dicts with ``kernel_size``,
        ``stride``, ``expansion``, ``in_channels``, ``out_channels`` and
        ``stage`` (row, repeat) of each block.

    Raises:
        KeyError: If the architecture is unknown.
    """
    if arch not in ARCHS:
        raise KeyError(f'unknown EfficientNet {arch!r}; known: {list(ARCHS)}')
    width, depth = ARCHS[arch]
    lite = arch.startswith('lite')
    stem = 32 if lite else _round_channels(32 * width)  # Lite fixes the stem
    blocks, channels = [], stem
    for row, (repeats, kernel, stride, expansion, out) in enumerate(STAGES):
        # Lite also fixes the depth of the first and the last stage.
        if not (lite and row in (0, len(STAGES) - 1)):
            repeats = math.ceil(repeats * depth)
        for repeat in range(repeats):
            blocks.append(
                dict(
                    stage=(row, repeat),
                    kernel_size=kernel,
                    stride=stride if repeat == 0 else 1,
                    expansion=expansion,
                    in_channels=channels,
                    out_channels=_round_channels(out * width)))
            channels = blocks[-1]['out_channels']
    return stem, blocks


def build_block(row: dict, with_se: bool, act_cfg: dict,
                **kwargs) -> InvertedResidual:
    """One block.

    Args:
        row (dict): Row of :func:`block_table`.
        with_se (bool): Whether the block has squeeze-and-excitation.
        act_cfg (dict): Config of the activations.
        kwargs: Further arguments of MMDetection's ``InvertedResidual``.
    """
    mid_channels = row['in_channels'] * row['expansion']
    # The squeeze is a quarter of the block's *input*.
    se_cfg = dict(
        channels=mid_channels,
        ratio=4 * row['expansion'],
        act_cfg=(act_cfg, dict(type='Sigmoid')))
    return InvertedResidual(
        row['in_channels'],
        row['out_channels'],
        mid_channels,
        row['kernel_size'],
        row['stride'],
        se_cfg=se_cfg if with_se else None,
        with_expand_conv=row['expansion'] != 1,
        # At stride 1 SAME padding is the ordinary symmetric one.
        conv_cfg=SAME_CONV if row['stride'] > 1 else None,
        act_cfg=act_cfg,
        **kwargs)


@MODELS.register_module()
class EfficientNet(StrictLoading, ConvInitMixin, NormEvalMixin, BaseModule):
    """EfficientNet without its classifier.

    Level ``i`` is the last feature map before the resolution falls below
    ``1 / 2**i`` of the input. Levels 1-5 of B0 have 16, 24, 40, 112 and 320
    channels. The input may have any size; each level has half the size of the
    previous one, rounded up.

    Args:
        arch (str): 'b0' ... 'b7' or 'lite0' ... 'lite4'. The Lite networks
            have no squeeze-and-excitation. Defaults to 'b0'.
        out_indices (Sequence[int]): Levels to return, of 1 to 5. Blocks above
            the highest are not built. Defaults to (3, 4, 5).
        frozen_stages (int): Freezes the stem (0) or the stem and all blocks
            up to this level (1-5), including their batch norms. Defaults to
            -1: nothing.
        drop_path_rate (float, optional): In training, block ``i`` of ``n`` is
            dropped with probability ``drop_path_rate * i / n``. Defaults to
            the official 0.2, but 0 for b0.
        norm_cfg (dict): Defaults to batch norm with TensorFlow's constants.
        act_cfg (dict, optional): Defaults to SiLU (swish), ReLU6 for Lite.
        norm_eval (bool): Keeps all batch norms in evaluation mode while
            training. Defaults to False.
        with_cp (bool): Recomputes the blocks in the backward pass to save
            memory. Defaults to False.
        in_channels (int): Of the images. Weights for 3 are summed to load
            them for 1. Defaults to 3.
        init_cfg (dict, optional): Defaults to the official initialisers.

    Raises:
        KeyError: If ``arch`` is unknown.
        ValueError: If ``out_indices`` or ``frozen_stages`` is out of range.
    """

    def __init__(self,
                 arch: str = 'b0',
                 out_indices: Sequence[int] = (3, 4, 5),
                 frozen_stages: int = -1,
                 drop_path_rate: Optional[float] = None,
                 norm_cfg: dict = BN_CFG,
                 act_cfg: Optional[dict] = None,
                 norm_eval: bool = False,
                 with_cp: bool = False,
                 in_channels: int = 3,
                 init_cfg: Optional[dict] = None) -> None:
        super().__init__(init_cfg)
        stem, blocks = block_table(arch)
        if not out_indices or not set(out_indices) <= set(LEVELS):
            raise ValueError(f'out_indices={out_indices} must be levels out '
                             f'of {", ".join(map(str, LEVELS))}')
        if frozen_stages not in (-1, 0, *LEVELS):
            raise ValueError(f'frozen_stages={frozen_stages} must be -1 '
                             '(nothing), 0 (the stem) or a level of '
                             f'{LEVELS[0]} to {LEVELS[-1]}')
        lite = arch.startswith('lite')
        act_cfg = dict(act_cfg or dict(type='ReLU6' if lite else 'SiLU'))
        if act_cfg['type'] == 'SiLU':  # in place, training copies its input
            act_cfg.setdefault('inplace', False)
        if drop_path_rate is None:
            drop_path_rate = 0.0 if arch == 'b0' else 0.2
        self.arch = arch
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        # A level ends before the block that reduces the resolution.
        strides = [row['stride'] for row in blocks[1:]] + [2]
        ends = [i for i, stride in enumerate(strides) if stride > 1]
        self.level_ends = dict(zip(LEVELS, ends))
        self.num_all_blocks = len(blocks)
        num_blocks = self.level_ends[max(out_indices)] + 1
        self.out_channels = tuple(blocks[self.level_ends[i]]['out_channels']
                                  for i in out_indices)
        cfgs = dict(norm_cfg=norm_cfg, act_cfg=act_cfg)
        self.stem = ConvModule(
            in_channels, stem, 3, 2, conv_cfg=SAME_CONV, **cfgs)
        self.blocks = nn.ModuleList(
            build_block(
                row,
                not lite,
                drop_path_rate=drop_path_rate * i / len(blocks),
                **cfgs) for i, row in enumerate(blocks[:num_blocks]))
        for module in self._frozen_modules():
            module.requires_grad_(False)

    def _frozen_modules(self) -> List[nn.Module]:
        if self.frozen_stages < 0:
            return []
        last = self.level_ends.get(self.frozen_stages, -1)
        return [self.stem, *self.blocks[:last + 1]]

    def init_kernel(self, conv: nn.Conv2d) -> None:
        """Draws from He's normal distribution by fan-out.

        The fan-out is counted within a group, also for depthwise kernels.
        """
        fan_out = math.prod(conv.kernel_size)
        fan_out *= conv.out_channels // conv.groups
        nn.init.normal_(conv.weight, 0, math.sqrt(2 / fan_out))

    def adapt_weights(self, state_dict: dict, prefix: str) -> None:
        """Sums the stem of a color image for a gray one, as timm does.

        Raises:
            ValueError: If the channels differ in another way.
        """
        key, own = f'{prefix}stem.conv.weight', self.stem.conv.in_channels
        given = getattr(state_dict.get(key), 'shape', ())[1:2]
        if given == (3, ) and own == 1:
            state_dict[key] = state_dict[key].sum(1, keepdim=True)
        elif given not in ((), (own, )):
            raise ValueError(
                f'the weights are for images of {given[0]} channels, but the '
                f'backbone has in_channels={own}. Only weights for 3 can be '
                'loaded for 1; for others set model.backbone.init_cfg=None')

    def is_leftover_key(self, key: str) -> bool:
        """Whether a checkpoint's key belongs to a block that is not built."""
        parts = key.split('.')
        return (parts[0] == 'blocks' and parts[1].isdigit()
                and len(self.blocks) <= int(parts[1]) < self.num_all_blocks)

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Returns the features ``(N, C_i, H / 2**i, W / 2**i)`` of the levels.

        Args:
            x (Tensor): Images ``(N, in_channels, H, W)``, normalised.
        """
        if self.training and x.device.type == 'cpu':
            # All layers keep this format. A training step took 0.68 of the
            # time.
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.stem(x)
        outs = {}
        for i, block in enumerate(self.blocks):
            with_cp = self.with_cp and self.training
            x = recompute(block, x) if with_cp else block(x)
            outs[i] = x
        return tuple(outs[self.level_ends[i]] for i in self.out_indices)

    def train(self, mode: bool = True) -> 'EfficientNet':
        """Sets the mode; frozen parts stay in evaluation."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self
