"""Makes the plain network of a trained detector.

It only reads attributes and tensors, so it does not import MMDetection.
"""
from typing import Optional

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .network import ACTIVATIONS, Conv, PlainNetwork

# Where each class belongs whose computation the plain network repeats.
PARTS = dict(
    EfficientDet='',
    EfficientNet='backbone',
    BiFPN='neck',
    EfficientDetHead='bbox_head')
INNER = {
    'AdaptiveAvgPool2d', 'BatchNorm2d', 'BiFPNLayer', 'Conv2d',
    'Conv2dAdaptivePadding', 'ConvModule', 'DropPath', 'FusionNode',
    'GroupNorm', 'Hardswish', 'Identity', 'InvertedResidual', 'ModuleDict',
    'ModuleList', 'ReLU', 'ReLU6', 'SELayer', 'SeparableConv2d', 'Sequential',
    'SiLU', 'Sigmoid', 'Swish', 'SyncBatchNorm', '_BatchNormXd'
}
PROJECTS = ('torch.nn.modules.', 'mmcv.', 'mmdet.', 'mmengine.',
            f'{__package__.partition(".")[0]}.')
OTHERS = ('data_preprocessor', 'bbox_head.loss_')  # compute nothing here


def plain_network(detector: nn.Module, even: bool = False) -> PlainNetwork:
    """The plain network of a detector, with copies of its weights.

    Args:
        detector (EfficientDet): In any mode; it is not changed.
        even (bool): The form for export, for inputs whose sides are multiples
            of 128, or 256 for six levels; see :class:`PlainNetwork`. Defaults
            to False.

    Raises:
        ValueError: If an option of the detector has no plain form.
    """
    network = PlainNetwork(**describe(detector), even=even)
    network.to(next(detector.parameters()))  # device and precision
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
    for plain, convs, norms, predictor in ((network.cls_net, head.cls_convs,
                                            head.cls_norms, head.conv_cls),
                                           (network.reg_net, head.reg_convs,
                                            head.reg_norms, head.conv_reg)):
        for conv, depthwise in zip([*convs, predictor], plain.depthwise):
            fold(depthwise, conv.depthwise)
        for levels, conv, level_norms in zip(plain.pointwise, convs, norms):
            for pointwise, norm in zip(levels, level_norms):
                fold(pointwise, conv.pointwise, norm)
        fold(plain.predictor, predictor.pointwise)
    return network


def describe(detector: nn.Module) -> dict:
    """The arguments of :class:`PlainNetwork`, all of which JSON can hold."""
    for name, module in detector.named_modules():
        kind = type(module)
        known = (PARTS.get(kind.__name__) == name or name and kind.__name__
                 in INNER) and kind.__module__.startswith(PROJECTS)
        if not known and not name.startswith(OTHERS):
            raise ValueError(f'{name or "the detector"} of type {kind} has no '
                             'plain form')
    backbone, neck, head = detector.backbone, detector.neck, detector.bbox_head
    if neck.num_outs != head.num_levels:
        raise ValueError(f'the neck has {neck.num_outs} levels and the head '
                         f'{head.num_levels}')
    levels = [backbone.out_indices[i] for i in neck.used_inputs]
    if levels != list(range(levels[0], levels[0] + len(levels))):
        raise ValueError(f'levels {levels} of the backbone, of which some are '
                         'left out, have no plain form')
    nodes = [node for layer in neck.layers for node in layer.nodes]
    if neck.add_extra_convs or any(not hasattr(node.conv, 'depthwise')
                                   or node.fusion.startswith('channel_')
                                   for node in nodes):
        raise ValueError('add_extra_convs, separable_conv=False and the '
                         "'channel_' fusions of BiFPN have no plain form")
    return dict(
        in_channels=backbone.stem.conv.in_channels,
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
        out_blocks=[backbone.level_ends[level] for level in levels],
        act=_name(backbone.stem.activate),
        graph=neck.layers[0].graph,
        weights=[[[1.0] * len(inputs) if node.fusion == 'sum' else
                  node.normalized_weights().tolist()
                  for node, (_, inputs) in zip(layer.nodes, layer.graph)]
                 for layer in neck.layers],
        channels=neck.out_channels,
        num_levels=neck.num_outs,
        neck_act=_name(nodes[0].act),
        head_act=_name(head.act),
        neck_group_norm=_group_norm(nodes[0].norm),
        head_group_norm=_group_norm(head.cls_norms[0][0])
        if head.stacked_convs else None,
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


@torch.no_grad()
def fold(plain: Conv, conv: nn.Conv2d, norm: Optional[nn.Module] = None):
    """Copies a convolution and its norm, in double precision if folded."""
    weight = conv.weight.double()
    bias = weight.new_zeros(len(weight)) if conv.bias is None \
        else conv.bias.double()
    if isinstance(norm, nn.GroupNorm) and hasattr(plain, 'norm'):
        plain.norm.load_state_dict(norm.state_dict())
    elif norm is None or isinstance(norm, nn.Identity):
        pass
    elif (not isinstance(norm, _BatchNorm) or norm.weight is None
          or norm.running_var is None):
        raise ValueError(f'the norm {norm} has no plain form')
    else:
        scale = norm.weight.double() / (norm.running_var.double() +
                                        norm.eps).sqrt()
        weight = weight * scale.view(-1, 1, 1, 1)
        bias = (bias - norm.running_mean) * scale + norm.bias
    plain.conv.weight.copy_(weight)
    if plain.conv.bias is not None:
        plain.conv.bias.copy_(bias)
