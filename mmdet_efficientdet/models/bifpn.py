"""BiFPN: weighted bi-directional feature pyramid (arXiv 1911.09070, sec. 3).

It behaves as google/automl ``efficientdet/tf2/{fpn_configs,
efficientdet_keras}.py``. The picture numbers the nodes of one layer of five
levels. Levels are counted from the finest, so level 0 is P3::

    P7   4 ----------------------> 12
          \\                        ^
    P6   3 ---> 5 -----------> 11 -+
                 \\              ^
    P5   2 -----> 6 -------> 10 +
                   \\         ^
    P4   1 -------> 7 --> 9 -+
                     \\    ^
    P3   0 ---------> 8 -+

The last node of each middle level also reads that level's input (1 -> 9, ...).
"""
from typing import List, Optional, Sequence, Tuple, Union

from mmengine.model import BaseModule
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor, nn

from ..registry import MODELS
from .fusion import FUSIONS, FusionNode, conv_norm
from .layers import (BN_CFG, SWISH_CFG, ConvInitMixin, NormEvalMixin,
                     max_pool_same, recompute, size_of)
from .settings import require

EXTRA_CONVS = (False, True, 'on_input', 'on_output')


def bifpn_graph(num_levels: int) -> List[Tuple[int, List[int]]]:
    """The fusion nodes of one BiFPN layer.

    Args:
        num_levels (int): Number of pyramid levels, at least 2.

    Returns:
        list[tuple]: ``(level, inputs)`` of each node, in the order in which
        the nodes run. ``inputs`` are indices into a list that starts with the
        layer's inputs, fine to coarse; each node appends its output.
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
        node_args: Further arguments of :class:`FusionNode`.
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


def _check_options(in_channels, out_channels, num_outs, stack_times, fusion,
                   add_extra_convs) -> None:
    """Raises a ValueError for an argument that is wrong by itself."""
    require(
        isinstance(in_channels, (list, tuple)), f'in_channels={in_channels!r}',
        "a list of the widths of the backbone's outputs")
    counts = [('in_channels', width) for width in in_channels]
    counts += [('out_channels', out_channels), ('num_outs', num_outs),
               ('stack_times', stack_times)]
    for name, value in counts:
        require(
            isinstance(value, int) and value >= 1, f'{name}={value!r}',
            'a whole number of at least 1')
    require(fusion in FUSIONS, f'fusion={fusion!r}', f'one of {FUSIONS}')
    require(add_extra_convs in EXTRA_CONVS,
            f'add_extra_convs={add_extra_convs!r}', f'one of {EXTRA_CONVS}')


def _used_inputs(in_channels: Sequence[int], num_outs: int, start_level: int,
                 end_level: int, on_output: bool) -> range:
    """Indices of the inputs to use, from which the outputs can be made."""
    inputs = list(in_channels)
    last = len(inputs) - 1 if end_level == -1 else end_level
    require(0 <= start_level <= last < len(inputs),
            f'start_level={start_level} and end_level={end_level}',
            f'a range of the {len(inputs)} inputs {inputs}')
    used = range(start_level, last + 1)
    extendable = last == len(inputs) - 1
    if len(used) == 1 and (on_output or not extendable):
        raise ValueError(
            f'the only input, {start_level} of {inputs}, has nothing to be '
            'fused with. Use more inputs, or the last one with further levels '
            "from add_extra_convs=False or 'on_input'")
    least = max(len(used), 2)
    require(
        num_outs >= least if extendable else num_outs == least,
        f'num_outs={num_outs}', f'{"at least" if extendable else "exactly"} '
        f'{least}, since inputs {start_level} to {last} of {inputs} are used')
    return used


@MODELS.register_module()
class BiFPN(ConvInitMixin, NormEvalMixin, BaseModule):
    """Bi-directional feature pyramid network; it can replace any ``FPN``.

    The first level above the backbone's is made from its last level: by a 1x1
    convolution and a norm, if the width changes, and 3x3 SAME max-pooling.
    Each further level is pooled from the one below it. Neighbouring levels may
    differ by any ratio of sizes, even by a different one on each axis, as long
    as both axes grow or both shrink.

    Args:
        in_channels (Sequence[int]): Widths of the backbone's outputs.
        out_channels (int): Width of all levels inside and after the neck.
        num_outs (int): Number of levels to return, at least 2.
        start_level (int): First input to use. Defaults to 0.
        end_level (int): Last input to use. Defaults to -1, the last one.
        stack_times (int): Number of BiFPN layers. Defaults to 3.
        fusion (str): 'fast_normalized' (the default; D0-D5), 'softmax',
            'sum' (D6, D7, D7x, Lite) or 'unbounded' (paper, section 3.3);
            'channel_fast_normalized' and 'channel_softmax' have one weight
            per channel (official code).
        add_extra_convs (bool | str): How further levels are made, as in
            ``FPN``: False (the default) by pooling, 'on_input' or True by 3x3
            convolutions of stride 2. With 'on_output' these convolutions
            start from the last output, and their levels are not fused.
        relu_before_extra_convs (bool): Puts a ReLU between these
            convolutions, as ``FPN`` does. Defaults to False.
        separable_conv (bool): Whether the 3x3 convolutions of the layers are
            depthwise separable. Defaults to True.
        norm_cfg (dict, optional): Defaults to batch norm with TensorFlow's
            constants; None for no norm.
        act_cfg (dict, optional): Defaults to SiLU (swish); None for none.
        norm_eval (bool): Keeps batch norms in evaluation mode while training.
            Defaults to False.
        with_cp (bool): Recomputes the layers in the backward pass to save
            memory. Defaults to False.
        identity_init (bool): Starts the pointwise convolutions of the layers
            as the identity, with which short trainings learn faster. Needs
            ``separable_conv``; ``init_cfg`` takes its place. Defaults to
            False, the official start.
        init_cfg (dict, optional): Defaults to the official initialisers.

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
                 identity_init: bool = False,
                 init_cfg: Optional[dict] = None) -> None:
        super().__init__(init_cfg)
        _check_options(in_channels, out_channels, num_outs, stack_times,
                       fusion, add_extra_convs)
        require(separable_conv or not identity_init,
                f'identity_init={identity_init}',
                'False with separable_conv=False')
        on_output = add_extra_convs == 'on_output'
        self.used_inputs = _used_inputs(in_channels, num_outs, start_level,
                                        end_level, on_output)
        self.in_channels = list(in_channels)
        self.out_channels = out_channels
        self.num_outs = num_outs
        self.add_extra_convs = add_extra_convs
        self.relu_before_extra_convs = relu_before_extra_convs
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        self.identity_init = identity_init
        widths = [in_channels[level] for level in self.used_inputs]
        self.extra_levels = nn.ModuleList()
        kernel = (3, 2, 1) if add_extra_convs else (1, )  # stride and padding
        width = out_channels if on_output else widths[-1]
        for _ in range(num_outs - len(widths)):
            self.extra_levels.append(
                conv_norm(width, out_channels, norm_cfg, *kernel)
                if add_extra_convs or width != out_channels else nn.Identity())
            width = out_channels
            widths += [] if on_output else [width]
        self.layers = nn.ModuleList()
        for _ in range(stack_times):
            self.layers.append(
                BiFPNLayer(widths, out_channels, fusion, norm_cfg, act_cfg,
                           separable_conv))
            widths = [out_channels] * len(widths)

    def init_kernel(self, conv: nn.Conv2d) -> None:
        """Draws from Glorot's uniform distribution."""
        nn.init.xavier_uniform_(conv.weight)

    def hidden_convs(self) -> List[nn.Module]:
        """Those of the fusion nodes."""
        return [node.conv for layer in self.layers for node in layer.nodes]

    def forward(self, inputs: Sequence[Tensor]) -> Tuple[Tensor, ...]:
        """Fuses the backbone's features.

        Args:
            inputs (Sequence[Tensor]): One ``(N, C_i, H_i, W_i)`` for each of
                ``in_channels``, fine to coarse.

        Returns:
            tuple[Tensor]: ``num_outs`` maps ``(N, out_channels, H_i, W_i)``.

        Raises:
            ValueError: If number, widths or sizes of the inputs are wrong.
        """
        widths = [x.shape[1] for x in inputs]
        if widths != self.in_channels:
            raise ValueError(
                f'BiFPN got {len(widths)} feature maps of {widths} channels, '
                f'but in_channels={self.in_channels}. Set in_channels to the '
                "widths that the backbone's out_indices give")
        feats = [inputs[level] for level in self.used_inputs]
        sizes = [size_of(x) for x in feats]
        _check_sizes(sizes, self.used_inputs[0])
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
        """Raises a ValueError if batch norm would train on a single pixel."""
        sizes = list(sizes)
        for _ in self.extra_levels:
            sizes.append(tuple(-(-n // 2) for n in sizes[-1]))
        # Synchronised batch norm may see other images.
        if (1, 1) in sizes and any(norm.training for norm in self.modules()
                                   if isinstance(norm, _BatchNorm)
                                   and not isinstance(norm, nn.SyncBatchNorm)):
            level = self.used_inputs[0] + sizes.index((1, 1))
            raise ValueError(
                f'level {level} has 1x1 pixels and the batch has one image, '
                f'too few to train batch norm. All levels: {sizes}. Enlarge '
                'the images or the batch, or use group norm or norm_eval=True')

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
    for level, (height, width) in enumerate(sizes, start_level):
        if not height * width:
            raise ValueError(
                f'input {level} of the neck is empty: {height}x{width} pixels '
                f'of {sizes}. Enlarge the images')
    for level, (a, b) in enumerate(zip(sizes, sizes[1:]), start_level):
        if (a[0] - b[0]) * (a[1] - b[1]) < 0:
            raise ValueError(
                f'levels {level} and {level + 1} have {a[0]}x{a[1]} and '
                f'{b[0]}x{b[1]} pixels: from one to the other one axis would '
                f'have to grow and the other to shrink. All levels: {sizes}')
