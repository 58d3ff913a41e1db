"""The network of a trained detector in plain PyTorch, for inference only.

It computes what ``EfficientDet`` computes in evaluation mode, with fewer
operators: batch norms are folded into the convolutions before them, the head's
norms into one pointwise convolution for each level, and fusion weights are
numbers. It needs neither MMDetection nor MMCV, so everything that is deployed
is made from it.
"""
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

ACTIVATIONS = dict(
    SiLU=F.silu, ReLU6=F.relu6, ReLU=F.relu, Hardswish=F.hardswish)


class Conv(nn.Module):
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
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            kernel_size // 2,
            groups=in_channels if depthwise else 1,
            bias=bias)
        self.act = ACTIVATIONS[act] if act else None
        if group_norm:
            groups, eps = group_norm
            self.norm = nn.GroupNorm(groups, out_channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C', ceil(H / stride), ceil(W / stride))``.
        """
        conv = self.conv
        height, width = x.shape[-2:]
        if conv.stride[0] == 2 and (height % 2 == 0 or width % 2 == 0):
            # Of an even size, SAME pads one pixel less before it.
            end = conv.kernel_size[0] // 2
            top, left = end - 1 + height % 2, end - 1 + width % 2
            x = F.conv2d(
                F.pad(x, (left, end, top, end)), conv.weight, conv.bias, 2, 0,
                1, conv.groups)
        else:
            x = conv(x)
        if hasattr(self, 'norm'):
            x = self.norm(x)
        return self.act(x, inplace=True) if self.act else x


class Block(nn.Module):
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
            y = y.mul_(gate.sigmoid_())
        y = self.project(y)
        return y.add_(x) if self.shortcut else y


def pool(x: Tensor) -> Tensor:
    """3x3 max-pooling of stride 2, SAME, without a padded copy.

    An axis of one pixel stays one pixel.
    """
    height, width = x.shape[-2:]
    return F.max_pool2d(x, 3, 2, (height % 2, width % 2), ceil_mode=True)


class Node(nn.Module):
    """A fusion node of BiFPN.

    Args:
        in_channels (Sequence[int]): Width of each input.
        channels (int): Width of the output.
        weights (Sequence[float]): Factor of each input.
        act (str, optional): A key of ``ACTIVATIONS``.
        group_norm (Sequence, optional): See :class:`Conv`.
    """

    def __init__(self, in_channels: Sequence[int], channels: int,
                 weights: Sequence[float], act: Optional[str],
                 group_norm: Optional[Sequence]) -> None:
        super().__init__()
        self.weights = tuple(weights)
        self.act = ACTIVATIONS[act] if act else None
        self.resample = nn.ModuleList(
            nn.Identity() if width == channels else Conv(
                width, channels, group_norm=group_norm)
            for width in in_channels)
        self.depthwise = Conv(channels, channels, 3, 1, True, bias=False)
        self.pointwise = Conv(channels, channels, group_norm=group_norm)

    def forward(self, inputs: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Fuses features at the level of ``size`` (height and width)."""
        fused = None
        for x, weight, resample in zip(inputs, self.weights, self.resample):
            x = resample(x)
            if x.shape[-2:] != size:
                larger = x.shape[-2] > size[0] or x.shape[-1] > size[1]
                x = pool(x) if larger else F.interpolate(x, size)
            if fused is None:
                fused = x * weight
            else:
                fused.add_(x, alpha=weight)
        if self.act:
            fused = self.act(fused, inplace=True)
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


class PlainNetwork(nn.Module):
    """EfficientDet from normalised images to the maps of its head.

    Args:
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
    """

    def __init__(self, *, stem: int, blocks: Sequence[dict],
                 out_blocks: Sequence[int], act: str,
                 graph: Sequence[Tuple[int, list]], weights: Sequence,
                 channels: int, num_levels: int, neck_act: Optional[str],
                 head_act: Optional[str], neck_group_norm: Optional[Sequence],
                 head_group_norm: Optional[Sequence], depth: int, num_anchors: int,
                 num_classes: int) -> None:
        super().__init__()
        self.stem = Conv(3, stem, 3, 2, act=act)
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
        self.graph = [(level, list(inputs)) for level, inputs in graph]
        self.num_levels = num_levels
        self.layers = nn.ModuleList()
        for layer in weights:
            nodes, widths = nn.ModuleList(), list(widths)
            for (_, inputs), factors in zip(graph, layer):
                nodes.append(
                    Node([widths[i] for i in inputs], channels, factors,
                         neck_act, neck_group_norm))
                widths.append(channels)
            self.layers.append(nodes)
            widths = [channels] * num_levels
        self.cls_net, self.reg_net = (
            Net(channels, depth, num_levels, num_anchors * outputs, head_act,
                head_group_norm) for outputs in (num_classes, 4))
        self.to(memory_format=torch.channels_last)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tuple[List[Tensor], List[Tensor]]:
        """Predicts class scores and boxes on every level.

        Args:
            images (Tensor): ``(N, 3, H, W)``, normalised, of any size.

        Returns:
            tuple[list]: ``cls_scores``, logits ``(N, A * K, H_i, W_i)``, and
            ``bbox_preds``, deltas ``(N, A * 4, H_i, W_i)``.
        """
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        feats = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.out_blocks:
                feats.append(x)
        for extra_level in self.extra_levels:
            feats.append(pool(extra_level(feats[-1])))
        sizes = [x.shape[-2:] for x in feats]
        for nodes in self.layers:
            for node, (level, inputs) in zip(nodes, self.graph):
                feats.append(node([feats[i] for i in inputs], sizes[level]))
            feats = feats[-self.num_levels:]
        return self.cls_net(feats), self.reg_net(feats)


def plain_network(detector: nn.Module) -> PlainNetwork:
    """The plain network of a detector, with copies of its weights.

    Args:
        detector (EfficientDet): In any mode; it is not changed.

    Raises:
        ValueError: If an option of the detector has no plain form.
    """
    network = PlainNetwork(**describe(detector)).to(
        next(detector.parameters()).device)
    backbone, neck, head = detector.backbone, detector.neck, detector.bbox_head
    fold(network.stem, backbone.stem.conv, backbone.stem.norm)
    for plain, block in zip(network.blocks, backbone.blocks):
        if block.with_expand_conv:
            fold(plain.expand, block.expand_conv.conv, block.expand_conv.norm)
        conv = block.depthwise_conv
        fold(plain.depthwise, conv.conv, conv.norm)
        if block.with_se:
            fold(plain.squeeze, block.se.conv1.conv)
            fold(plain.excite, block.se.conv2.conv)
        fold(plain.project, block.linear_conv.conv, block.linear_conv.norm)
    for plain, level in zip(network.extra_levels, neck.extra_levels):
        if not isinstance(level, nn.Identity):
            fold(plain, level.conv, level.norm)
    for nodes, layer in zip(network.layers, neck.layers):
        for plain, node in zip(nodes, layer.nodes):
            for edge, resample in node.resamples.items():
                fold(plain.resample[int(edge)], resample.conv, resample.norm)
            fold(plain.depthwise, node.conv.depthwise)
            fold(plain.pointwise, node.conv.pointwise, node.norm)
    for plain, convs, norms, predictor in (
        (network.cls_net, head.cls_convs, head.cls_norms, head.conv_cls),
        (network.reg_net, head.reg_convs, head.reg_norms, head.conv_reg)):
        for conv, depthwise in zip([*convs, predictor], plain.depthwise):
            fold(depthwise, conv.depthwise)
        for levels, conv, level_norms in zip(plain.pointwise, convs, norms):
            for pointwise, norm in zip(levels, level_norms):
                fold(pointwise, conv.pointwise, norm)
        fold(plain.predictor, predictor.pointwise)
    return network


def describe(detector: nn.Module) -> dict:
    """The arguments of :class:`PlainNetwork`, all of which JSON can hold."""
    backbone, neck, head = detector.backbone, detector.neck, detector.bbox_head
    nodes = [node for layer in neck.layers for node in layer.nodes]
    if neck.add_extra_convs or any(
            not hasattr(node.conv, 'depthwise')
            or node.fusion.startswith('channel_') for node in nodes):
        raise ValueError('add_extra_convs, separable_conv=False and the '
                         "'channel_' fusions of BiFPN have no plain form")
    return dict(
        stem=backbone.stem.conv.out_channels,
        blocks=[
            dict(
                in_channels=(block.expand_conv if block.with_expand_conv else
                             block.depthwise_conv).conv.in_channels,
                mid_channels=block.depthwise_conv.conv.in_channels,
                out_channels=block.linear_conv.conv.out_channels,
                kernel_size=block.depthwise_conv.conv.kernel_size[0],
                stride=block.depthwise_conv.conv.stride[0],
                squeeze=block.se.conv1.conv.out_channels
                if block.with_se else 0) for block in backbone.blocks
        ],
        out_blocks=[backbone.level_ends[i] for i in backbone.out_indices],
        act=_name(backbone.stem.activate),
        graph=neck.layers[0].graph,
        weights=[[
            [1.0] * len(inputs) if node.fusion == 'sum' else
            node.normalized_weights().tolist()
            for node, (_, inputs) in zip(layer.nodes, layer.graph)
        ] for layer in neck.layers],
        channels=neck.out_channels,
        num_levels=neck.num_outs,
        neck_act=_name(nodes[0].act),
        head_act=_name(head.act),
        neck_group_norm=_group_norm(nodes[0].norm),
        head_group_norm=_group_norm(head.cls_norms[0][0]),
        depth=head.stacked_convs,
        num_anchors=head.num_base_priors,
        num_classes=head.cls_out_channels)


def _name(act: nn.Module) -> Optional[str]:
    """The key of an activation."""
    name = type(act).__name__
    name = dict(Swish='SiLU', Identity=None).get(name, name)
    if name is not None and name not in ACTIVATIONS:
        raise ValueError(f'the activation {name} has no plain form; use one '
                         f'of {", ".join(ACTIVATIONS)}')
    return name


def _group_norm(norm: nn.Module) -> Optional[list]:
    """Groups and eps of a norm that stays, None if it is folded."""
    if isinstance(norm, nn.GroupNorm):
        return [norm.num_groups, norm.eps]
    if not isinstance(norm, (_BatchNorm, nn.Identity)):
        raise ValueError(f'the norm {type(norm).__name__} has no plain form')


@torch.no_grad()
def fold(plain: Conv, conv: nn.Conv2d, norm: Optional[nn.Module] = None):
    """Copies a convolution and its norm, in double precision if folded."""
    weight = conv.weight.double()
    bias = weight.new_zeros(len(weight)) if conv.bias is None \
        else conv.bias.double()
    if isinstance(norm, nn.GroupNorm):
        plain.norm.load_state_dict(norm.state_dict())
    elif isinstance(norm, _BatchNorm):
        scale = norm.weight.double() / (norm.running_var.double() +
                                        norm.eps).sqrt()
        weight = weight * scale.view(-1, 1, 1, 1)
        bias = (bias - norm.running_mean) * scale + norm.bias
    plain.conv.weight.copy_(weight)
    if plain.conv.bias is not None:
        plain.conv.bias.copy_(bias)
