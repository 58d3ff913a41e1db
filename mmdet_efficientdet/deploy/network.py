"""The network of a trained detector in plain PyTorch, for inference only.

It computes what ``EfficientDet`` computes in evaluation mode, with fewer
operators: batch norms are folded into the convolutions before them, the head's
norms into one pointwise convolution for each level, and fusion weights are
numbers. It needs neither MMDetection nor MMCV, so everything that is deployed
is made from it.
"""
import json
from typing import Dict, List, Optional, Sequence, Tuple

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = dict(
    SiLU=F.silu, ReLU6=F.relu6, ReLU=F.relu, Hardswish=F.hardswish)


class Part(nn.Module):
    """A part of the network."""

    even = False  # whether the input's sides are multiples of its divisor


class Conv(Part):
    """A convolution with TensorFlow's SAME padding, then norm and activation.

    Args:
        in_channels (int): Width of the input.
        out_channels (int): Width of the output.
        kernel_size (int): 1, 3 or 5. Defaults to 1.
        stride (int): 1 or 2. Defaults to 1.
        depthwise (bool): Whether each channel has its own kernel. Defaults to
            False.
        bias (bool): Defaults to True.
        act (str, optional): A key of ``ACTIVATIONS``. Defaults to None.
        group_norm (Sequence, optional): Groups and eps of a group norm,
            which cannot be folded. Defaults to None.
    """

    def __init__(self,
                 in_channels: int,
                 out_channels: int,
                 kernel_size: int = 1,
                 stride: int = 1,
                 depthwise: bool = False,
                 bias: bool = True,
                 act: Optional[str] = None,
                 group_norm: Optional[Sequence] = None) -> None:
        super().__init__()
        groups = in_channels if depthwise else 1
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride,
                              kernel_size // 2, 1, groups, bias)
        self.act = ACTIVATIONS[act] if act else None
        if group_norm:
            groups, eps = group_norm
            self.norm = nn.GroupNorm(groups, out_channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C', ceil(H / stride), ceil(W / stride))``.
        """
        conv = self.conv
        weight, padding, convolve = conv.weight, conv.padding, F.conv2d
        traced = (
            self.even or torch.compiler.is_compiling()
            or torch.jit.is_tracing())
        if conv.stride[0] == 2:
            # Before an even size, SAME pads one pixel less than after it.
            top, left = (1, 1) if self.even else (1 - odd for odd in _odd(x))
            if conv.groups > 1 and not traced:
                # A row and a column of zeros save a padded copy of ``x``.
                weight = F.pad(weight, (left, 0, top, 0))
            elif top or left:
                end = padding[0]
                # ONNX Runtime joins padding by a given value to convolutions.
                x = F.pad(x, (end - left, end, end - top, end), value=0.0)
                padding = (0, 0)
        if not traced and _writes_much(x, conv):
            convolve = torch.mkldnn_convolution
        x = convolve(
            x,
            weight,
            conv.bias,
            stride=conv.stride,
            padding=padding,
            dilation=conv.dilation,
            groups=conv.groups)
        if hasattr(self, 'norm'):
            x = self.norm(x)
        return self.act(x, inplace=not self.even) if self.act else x


def _odd(x: Tensor) -> List[int]:
    """1 or 0 for height and width; numbers also where a graph is traced."""
    return [int(size % 2) for size in x.shape[-2:]]


def _writes_much(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether oneDNN is faster than PyTorch's choice for one thread.

    That is a product of matrices, which writes the result twice. The answer,
    and thus the rounding, is the same for all sizes of a batch.
    """
    pixels = x.shape[2] * x.shape[3]
    return (conv.kernel_size == (1, 1) and pixels * conv.out_channels >= 2**18
            and x.device.type == 'cpu' and x.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
            and torch.backends.mkldnn.enabled)


class Block(Part):
    """A block of EfficientNet: expand, depthwise, squeeze-and-excite, project.

    Args:
        in_channels (int): Width of the input.
        mid_channels (int): Width after the expansion; without one,
            ``in_channels``.
        out_channels (int): Width of the output.
        kernel_size (int): Of the depthwise convolution.
        stride (int): Of the depthwise convolution.
        squeeze (int): Width of the squeeze; 0 for none.
        act (str): A key of ``ACTIVATIONS``.
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int,
                 kernel_size: int, stride: int, squeeze: int,
                 act: str) -> None:
        super().__init__()
        if mid_channels != in_channels:
            self.expand = Conv(in_channels, mid_channels, act=act)
        self.depthwise = Conv(
            mid_channels, mid_channels, kernel_size, stride, True, act=act)
        if squeeze:
            self.squeeze = Conv(mid_channels, squeeze, act=act)
            self.excite = Conv(squeeze, mid_channels)
        self.project = Conv(mid_channels, out_channels)
        self.shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C', ceil(H / s), ceil(W / s))``."""
        y = self.expand(x) if hasattr(self, 'expand') else x
        y = self.depthwise(y)
        if hasattr(self, 'squeeze'):
            gate = self.excite(self.squeeze(y.mean((2, 3), keepdim=True)))
            y = y * gate.sigmoid() if self.even else y.mul_(gate.sigmoid_())
        y = self.project(y)
        if not self.shortcut:
            return y
        return y + x if self.even else y.add_(x)


def pool(x: Tensor, even: bool) -> Tensor:
    """3x3 max-pooling of stride 2, SAME, without a padded copy.

    An axis of one pixel stays one pixel. On two pixels, the kernel has two,
    because OpenVINO refuses a kernel larger than its input.
    """
    if even:
        return F.max_pool2d(x, 3, 2, ceil_mode=True)
    kernel = [2 if size == 2 else 3 for size in x.shape[-2:]]
    return F.max_pool2d(x, kernel, 2, _odd(x), ceil_mode=True)


class Node(Part):
    """A fusion node of BiFPN.

    Args:
        level (int): Level of the node.
        inputs (dict[int, tuple]): Index of each input in the list of features
            to its level, width and factor.
        channels (int): Width of the output.
        act (str, optional): A key of ``ACTIVATIONS``.
        group_norm (Sequence, optional): See :class:`Conv`.
    """

    def __init__(self, level: int, inputs: Dict[int, tuple], channels: int,
                 act: Optional[str], group_norm: Optional[Sequence]) -> None:
        super().__init__()
        self.level = level
        self.inputs = dict(inputs)
        self.act = ACTIVATIONS[act] if act else None
        self.resample = nn.ModuleList(
            nn.Identity() if width ==
            channels else Conv(width, channels, group_norm=group_norm)
            for _, width, _ in inputs.values())
        self.depthwise = Conv(channels, channels, 3, 1, True, bias=False)
        self.pointwise = Conv(channels, channels, group_norm=group_norm)

    def forward(self, feats: Sequence[Tensor],
                sizes: Sequence[Sequence[int]]) -> Tensor:
        """Fuses its inputs out of ``feats``.

        Args:
            feats (Sequence[Tensor]): Features ``(N, C_i, H_i, W_i)``.
            sizes (Sequence): Height and width of each level.
        """
        fused, add = None, torch.add if self.even else Tensor.add_
        for (index, (level, _,
                     weight)), resample in zip(self.inputs.items(),
                                               self.resample):
            x = resample(feats[index])
            if level < self.level:
                x = pool(x, self.even)
            elif level > self.level:
                size = (None, 2.0) if self.even else (sizes[self.level], )
                x = F.interpolate(x, *size)
            fused = x * weight if fused is None else add(
                fused, x, alpha=weight)
        if self.act:
            fused = self.act(fused, inplace=not self.even)
        return self.pointwise(self.depthwise(fused))


class Net(nn.Module):
    """The class or the box net, which all levels share.

    Args:
        channels (int): Width of the features.
        depth (int): Convolutions before the predictor.
        num_levels (int): Number of levels, each with a norm of its own.
        out_channels (int): Width of the predictions.
        act (str, optional): A key of ``ACTIVATIONS``.
        group_norm (Sequence, optional): See :class:`Conv`.
    """

    def __init__(self, channels: int, depth: int, num_levels: int,
                 out_channels: int, act: Optional[str],
                 group_norm: Optional[Sequence]) -> None:
        super().__init__()
        self.depthwise = nn.ModuleList(
            Conv(channels, channels, 3, 1, True, bias=False)
            for _ in range(depth + 1))
        self.pointwise = nn.ModuleList(
            nn.ModuleList(
                Conv(channels, channels, act=act, group_norm=group_norm)
                for _ in range(num_levels)) for _ in range(depth))
        self.predictor = Conv(channels, out_channels)

    def forward(self, feats: Sequence[Tensor]) -> List[Tensor]:
        """Predicts ``(N, out_channels, H_i, W_i)`` for each level."""
        outs = []
        for level, x in enumerate(feats):
            for depthwise, pointwise in zip(self.depthwise, self.pointwise):
                x = pointwise[level](depthwise(x))
            outs.append(self.predictor(self.depthwise[-1](x)))
        return outs


class PlainNetwork(Part):
    """EfficientDet from normalised images to the maps of its head.

    Args:
        in_channels (int): Channels of the images.
        stem (int): Width of the stem.
        blocks (Sequence[dict]): Arguments of each :class:`Block` but ``act``.
        out_blocks (Sequence[int]): Blocks whose outputs the neck uses.
        act (str): Activation of the backbone.
        graph (Sequence[tuple]): ``(level, inputs)`` of the nodes of a layer.
        weights (Sequence): Fusion weights of each node of each layer.
        channels (int): Width of neck and head.
        num_levels (int): Number of levels.
        neck_act, head_act (str, optional): Activations of neck and head.
        neck_group_norm, head_group_norm (Sequence, optional):
            See :class:`Conv`.
        depth (int): Convolutions of the head before the predictors.
        num_anchors (int): Anchors of a cell.
        num_classes (int): Number of classes.
        even (bool): The form for export, in which no operator depends on the
            input's size and none works in place. Then both sides of an input
            must be multiples of ``divisor``, 2 to the power of the highest
            level, such as 128. Defaults to False.
    """

    def __init__(self, *, even: bool = False, **settings) -> None:
        super().__init__()
        self.settings = settings
        self._build(**settings)
        strides = [block.depthwise.conv.stride[0] for block in self.blocks]
        self.divisor = 2**(1 + strides[:self.out_blocks[-1] + 1].count(2) +
                           len(self.extra_levels))
        for module in self.modules():
            module.even = even
        self.to(memory_format=torch.channels_last)
        self.eval().requires_grad_(False)

    def _build(self, *, in_channels: int, stem: int, blocks: Sequence[dict],
               out_blocks: Sequence[int], act: str,
               graph: Sequence[Tuple[int, list]], weights: Sequence,
               channels: int, num_levels: int, neck_act: Optional[str],
               head_act: Optional[str], neck_group_norm: Optional[Sequence],
               head_group_norm: Optional[Sequence], depth: int,
               num_anchors: int, num_classes: int) -> None:
        if not (2 <= num_levels <= 16 and 0 <= depth <= 16):
            raise ValueError(f'num_levels={num_levels} must be 2 to 16 and '
                             f'depth={depth} 0 to 16')
        self.stem = Conv(in_channels, stem, 3, 2, act=act)
        self.blocks = nn.ModuleList(Block(**row, act=act) for row in blocks)
        self.out_blocks = list(out_blocks)
        widths = [blocks[i]['out_channels'] for i in out_blocks]
        self.extra_levels = nn.ModuleList()
        width = widths[-1]
        for _ in range(num_levels - len(widths)):
            self.extra_levels.append(
                nn.Identity() if width == channels else Conv(
                    width, channels, group_norm=neck_group_norm))
            width = channels
            widths.append(width)
        self.layers = nn.ModuleList()
        levels = [*range(num_levels), *(level for level, _ in graph)]
        for layer in weights:
            widths += [channels] * len(graph)
            self.layers.append(
                nn.ModuleList(
                    Node(
                        level, {
                            i: (levels[i], widths[i], factor)
                            for i, factor in zip(inputs, factors)
                        }, channels, neck_act, neck_group_norm)
                    for (level, inputs), factors in zip(graph, layer)))
            widths = [channels] * num_levels
        self.cls_net, self.reg_net = (
            Net(channels, depth, num_levels, num_anchors * outputs, head_act,
                head_group_norm) for outputs in (num_classes, 4))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tuple[List[Tensor], List[Tensor]]:
        """Predicts class scores and boxes on every level.

        Args:
            images (Tensor): ``(N, in_channels, H, W)``, normalised, of any
                size unless the network is ``even``.

        Returns:
            tuple[list]: ``cls_scores``, logits ``(N, A * K, H_i, W_i)``, and
            ``bbox_preds``, deltas ``(N, A * 4, H_i, W_i)``.

        Raises:
            ValueError: If the network is ``even`` and a side does not fit.
        """
        if self.even and not torch.jit.is_tracing():
            height, width = images.shape[-2:]
            if height % self.divisor or width % self.divisor:
                raise ValueError(
                    f'the images have {height}x{width} pixels, but both sides '
                    f'must be multiples of {self.divisor} for a network with '
                    'even=True. Pad the images, or use even=False')
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        feats = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.out_blocks:
                feats.append(x)
        for extra_level in self.extra_levels:
            feats.append(pool(extra_level(feats[-1]), self.even))
        sizes = [x.shape[-2:] for x in feats]
        for nodes in self.layers:
            for node in nodes:
                feats.append(node(feats, sizes))
            feats = feats[-len(sizes):]
        return self.cls_net(feats), self.reg_net(feats)


def save_plain(network: PlainNetwork, path: str) -> None:
    """Writes a plain network into one safetensors file.

    The file holds the weights and, as JSON in its metadata, the arguments of
    :class:`PlainNetwork`. Reading it executes nothing.
    """
    weights = {k: v.contiguous() for k, v in network.state_dict().items()}
    metadata = dict(plain_network=json.dumps(network.settings))
    data = safetensors.torch.save(weights, metadata)
    with open(path, 'wb') as file:
        file.write(data)


def load_plain(path: str, even: bool = False) -> PlainNetwork:
    """Reads what :func:`save_plain` has written.

    Args:
        path (str): The file.
        even (bool): See :class:`PlainNetwork`. Defaults to False.

    Raises:
        ValueError: If the file is no plain network or its weights do not fit.
    """
    try:
        with safetensors.safe_open(path, 'pt') as file:
            settings = json.loads((file.metadata() or {})['plain_network'])
            weights = {key: file.get_tensor(key) for key in file.keys()}
        if len(settings['blocks']) > len(weights):
            raise ValueError('it has more blocks than weights')
        with torch.device('meta'):  # takes no memory, whatever the settings
            network = PlainNetwork(**settings, even=even)
        network.load_state_dict(weights, assign=True)
    except (safetensors.SafetensorError, ArithmeticError, LookupError,
            RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f'{path} is not a plain network that save_plain has '
                         f'written: {error}') from error
    return network.to(memory_format=torch.channels_last)
