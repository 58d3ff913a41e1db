"""BiFPN: weighted bi-directional feature pyramid (arXiv 1911.09070, sec. 3).

Behaviour of google/automl ``efficientdet/tf2/{fpn_configs, efficientdet_keras}
.py``. One layer for five levels, with the numbers of its nodes; levels are
counted from the finest, so that 0 is P3::

    P7   4 ----------------------> 12
          \\                        ^
    P6   3 ---> 5 -----------> 11 -+
                 \\              ^
    P5   2 -----> 6 -------> 10 +
                   \\         ^
    P4   1 -------> 7 --> 9 -+
                     \\    ^
    P3   0 ---------> 8 -+

The middle levels' last nodes also read the level's input (1 -> 9, ...).
"""
from typing import List, Optional, Sequence, Tuple, Union

from mmengine.model import BaseModule
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor, nn

from ..registry import MODELS
from .fusion import FUSIONS, FusionNode, conv_norm
from .layers import (BN_CFG, SWISH_CFG, freeze_statistics, max_pool_same,
                     recompute, size_of)

EXTRA_CONVS = (False, True, 'on_input', 'on_output')


def bifpn_graph(num_levels: int) -> List[Tuple[int, List[int]]]:
    """The fusion nodes of one BiFPN layer.

    Args:
        num_levels (int): Number of pyramid levels, at least 2.

    Returns:
        list[tuple]: ``(level, inputs)`` of each node in the order in which
        they run. Inputs are indices into the list that starts with the
        layer's inputs, fine to coarse, and grows by each node's output.
    """
    latest = {level: [level] for level in range(num_levels)}
    graph = []

    def add(level: int, inputs: List[int]) -> None:
        latest[level].append(num_levels + len(graph))
        graph.append((level, inputs))

    for level in reversed(range(num_levels - 1)):  # top-down path
        add(level, [latest[level][-1], latest[level + 1][-1]])
    for level in range(1, num_levels):  # bottom-up path
        add(level, [*latest[level], latest[level - 1][-1]])
    return graph


class BiFPNLayer(BaseModule):
    """One top-down and one bottom-up path over all levels.

    Args:
        in_channels (Sequence[int]): Width of each level's input.
        out_channels (int): Width of every output.
        node_args: The others of :class:`FusionNode`.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int,
                 *node_args) -> None:
        super().__init__()
        self.graph = bifpn_graph(len(in_channels))
        channels = list(in_channels)
        self.nodes = nn.ModuleList()
        for _, inputs in self.graph:
            self.nodes.append(
                FusionNode([channels[i] for i in inputs], out_channels,
                           *node_args))
            channels.append(out_channels)

    def forward(self, feats: Sequence[Tensor]) -> Tuple[Tensor, ...]:
        """Returns one fused feature map for each of ``feats``."""
        sizes = [size_of(feat) for feat in feats]
        feats = list(feats)
        for node, (level, inputs) in zip(self.nodes, self.graph):
            feats.append(node([feats[i] for i in inputs], sizes[level]))
        return tuple(feats[-len(sizes):])


@MODELS.register_module()
class BiFPN(BaseModule):
    """Bi-directional feature pyramid network, in place of any ``FPN``.

    Levels above the backbone's are made from its last one: a 1x1 convolution
    and a norm where the width changes, then 3x3 SAME max-pooling; each
    further level is pooled from the one below it.

    Neighbouring levels may have any ratio of sizes, also another one on each
    axis, as long as both axes go the same way.

    Args:
        in_channels (Sequence[int]): Widths of the backbone's outputs.
        out_channels (int): Width of all levels inside and after the neck.
        num_outs (int): Number of levels to return, at least 2.
        start_level (int): First of the inputs to use. Defaults to 0.
        end_level (int): Last of the inputs to use, inclusive; -1 for the
            last. Defaults to -1.
        stack_times (int): Number of BiFPN layers. Defaults to 3.
        fusion (str): 'fast_normalized' (the default; D0-D5), 'softmax',
            'sum' (D6, D7, D7x, Lite) or 'unbounded' (paper, section 3.3);
            'channel_fast_normalized' and 'channel_softmax' have a weight for
            each channel (official code).
        add_extra_convs (bool | str): How further levels are made, as in
            ``FPN``: False (the default) by pooling, 'on_input' or True by 3x3
            convolutions of stride 2 instead, 'on_output' by such convolutions
            of the last output, which then are not fused.
        relu_before_extra_convs (bool): Puts a ReLU between these
            convolutions, as ``FPN`` does. Defaults to False.
        separable_conv (bool): Depthwise-separable 3x3 convolutions in the
            layers, else full ones. Defaults to True.
        norm_cfg (dict, optional): Defaults to batch norm with TensorFlow's
            constants; None for no norm.
        act_cfg (dict, optional): Defaults to SiLU (swish); None for none.
        norm_eval (bool): Keeps batch norms in evaluation mode while training.
            Defaults to False.
        with_cp (bool): Recomputes the layers in the backward pass to save
            memory. Defaults to False.
        init_cfg (dict, optional): With ``None``, the official initialisers.

    Raises:
        ValueError: If an option is unknown or the levels do not fit.
    """

    def __init__(self,
                 in_channels: Sequence[int],
                 out_channels: int,
                 num_outs: int,
                 start_level: int = 0,
                 end_level: int = -1,
                 stack_times: int = 3,
                 fusion: str = 'fast_normalized',
                 add_extra_convs: Union[bool, str] = False,
                 relu_before_extra_convs: bool = False,
                 separable_conv: bool = True,
                 norm_cfg: Optional[dict] = BN_CFG,
                 act_cfg: Optional[dict] = SWISH_CFG,
                 norm_eval: bool = False,
                 with_cp: bool = False,
                 init_cfg: Optional[dict] = None) -> None:
        super().__init__(init_cfg)
        if not isinstance(in_channels, (list, tuple)):
            raise ValueError(f'in_channels={in_channels!r} must be a list of '
                             "the widths of the backbone's outputs")
        counts = [('in_channels', n) for n in in_channels]
        counts += [('out_channels', out_channels), ('num_outs', num_outs),
                   ('stack_times', stack_times)]
        for name, value in counts:
            if not isinstance(value, int) or value < 1:
                raise ValueError(f'{name}={value!r} must be a whole number '
                                 'of at least 1')
        num_ins = len(in_channels)
        last = num_ins - 1 if end_level == -1 else end_level
        if fusion not in FUSIONS:
            raise ValueError(f'fusion={fusion!r} must be one of {FUSIONS}')
        if add_extra_convs not in EXTRA_CONVS:
            raise ValueError(f'add_extra_convs={add_extra_convs!r} must be '
                             f'one of {EXTRA_CONVS}')
        if not 0 <= start_level <= last < num_ins:
            raise ValueError(
                f'start_level={start_level} and end_level={end_level} must '
                f'name a range of the {num_ins} inputs {list(in_channels)}')
        used = list(in_channels)[start_level:last + 1]
        on_output = add_extra_convs == 'on_output'
        if len(used) < 2 and (on_output or last != num_ins - 1):
            raise ValueError(
                f'the only input, {start_level} of {list(in_channels)}, has '
                'nothing to be fused with. Use more inputs, or the last one '
                'with further levels from add_extra_convs=False or '
                "'on_input'")
        extra = num_outs - len(used)
        if num_outs < 2 or extra < 0 or (extra and last != num_ins - 1):
            allowed = f'exactly {len(used)}' if last != num_ins - 1 \
                else f'at least {max(len(used), 2)}'
            raise ValueError(
                f'num_outs={num_outs} does not fit: inputs {start_level} to '
                f'{last} of {list(in_channels)} are used, so num_outs must '
                f'be {allowed}')
        self.in_channels = list(in_channels)
        self.out_channels = out_channels
        self.num_outs = num_outs
        self.start_level = start_level
        self.last_level = last
        self.add_extra_convs = add_extra_convs
        self.relu_before_extra_convs = relu_before_extra_convs
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        self.extra_levels = nn.ModuleList()
        width = out_channels if on_output else used[-1]
        for _ in range(extra):
            kernel = dict(
                kernel_size=3, stride=2, padding=1) if add_extra_convs \
                else dict(kernel_size=1)
            needed = add_extra_convs or width != out_channels
            self.extra_levels.append(
                conv_norm(width, out_channels, norm_cfg, **kernel
                          ) if needed else nn.Identity())
            width = out_channels
        fused = used if on_output else used + [out_channels] * extra
        self.layers = nn.ModuleList()
        for _ in range(stack_times):
            self.layers.append(
                BiFPNLayer(fused, out_channels, fusion, norm_cfg, act_cfg,
                           separable_conv))
            fused = [out_channels] * len(fused)

    def init_weights(self) -> None:
        """Draws all kernels from Glorot's uniform distribution."""
        if self.init_cfg:
            return super().init_weights()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self._is_init = True

    def train(self, mode: bool = True) -> 'BiFPN':
        """Switches the mode, except for norms that stay in evaluation."""
        super().train(mode)
        if mode and self.norm_eval:
            freeze_statistics(self)
        return self

    def forward(self, inputs: Sequence[Tensor]) -> Tuple[Tensor, ...]:
        """Fuses the backbone's features.

        Args:
            inputs (Sequence[Tensor]): One ``(N, C_i, H_i, W_i)`` for each of
                ``in_channels``, fine to coarse.

        Returns:
            tuple[Tensor]: ``num_outs`` maps ``(N, out_channels, H_i, W_i)``.

        Raises:
            ValueError: If number or widths of the inputs are wrong, if from
                one level to another one axis grows and the other shrinks, or
                if levels are too small.
        """
        widths = [x.shape[1] for x in inputs]
        if widths != self.in_channels:
            raise ValueError(
                f'BiFPN got {len(widths)} feature maps of {widths} channels, '
                f'but in_channels={self.in_channels}. Write in_channels as '
                "the backbone's out_indices give them")
        feats = list(inputs[self.start_level:self.last_level + 1])
        sizes = [size_of(x) for x in feats]
        _check_sizes(sizes, self.start_level)
        if self.training and feats[0].shape[0] == 1:
            self._check_batch_norm(sizes)
        on_output = self.add_extra_convs == 'on_output'
        if not on_output:
            self._add_levels(feats)
        with_cp = self.with_cp and self.training
        for layer in self.layers:
            feats = recompute(layer, feats) if with_cp else layer(feats)
        feats = list(feats)
        if on_output:
            self._add_levels(feats)
        return tuple(feats)

    def _check_batch_norm(self, sizes: List[tuple]) -> None:
        """Raises a ValueError where one image has one pixel to train on."""
        sizes = list(sizes)
        for _ in self.extra_levels:
            sizes.append(tuple(-(-n // 2) for n in sizes[-1]))
        # Synchronised batch norm may see other images.
        if (1, 1) in sizes and any(norm.training for norm in self.modules()
                                   if isinstance(norm, _BatchNorm)
                                   and not isinstance(norm, nn.SyncBatchNorm)):
            level = self.start_level + sizes.index((1, 1))
            raise ValueError(
                f'level {level} has 1x1 pixels and the batch one image, too '
                f'few to train batch norm. All levels: {sizes}. Enlarge the '
                'images or the batch, or take group norm or norm_eval=True')

    def _add_levels(self, feats: List[Tensor]) -> None:
        for i, extra_level in enumerate(self.extra_levels):
            x = feats[-1]
            if self.relu_before_extra_convs and self.add_extra_convs and i:
                x = x.relu()
            x = extra_level(x)
            if not self.add_extra_convs:
                # An axis of one pixel cannot shrink further.
                x = max_pool_same(x, [2 if n > 1 else 1 for n in size_of(x)])
            feats.append(x)


def _check_sizes(sizes: List[tuple], start_level: int) -> None:
    """Raises a ValueError unless neighbours can be resized to each other."""
    for i, (height, width) in enumerate(sizes):
        if not height or not width:
            raise ValueError(
                f'input {start_level + i} of the neck is empty: '
                f'{height}x{width} pixels of {sizes}. Enlarge the images')
    for i, (a, b) in enumerate(zip(sizes, sizes[1:])):
        if (a[0] - b[0]) * (a[1] - b[1]) < 0:
            raise ValueError(
                f'levels {start_level + i} and {start_level + i + 1} have '
                f'{a[0]}x{a[1]} and {b[0]}x{b[1]} pixels: from one to the '
                'other one axis would have to grow and the other to shrink. '
                f'All levels: {sizes}')
