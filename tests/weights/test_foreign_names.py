"""All tensors of D0 under the names of two other projects.

Written without the tables of the package. Those of
Yet-Another-EfficientDet-Pytorch are from the state dicts and names that users
quote in its issues 121, 215, 222, 291, 354, 412, 591 and 720. Those of
mmdet's project are from its modules, and its backbone is the one that mmdet
installs.
"""
import pytest
import torch
from helpers.models import shapes_of
from helpers.tensorflow_files import levels_of
from mmdet.registry import MODELS

from mmdet_efficientdet.weights.layouts import LAYOUTS
from mmdet_efficientdet.weights.matching import match

NORM = ('weight', 'bias', 'running_mean', 'running_var')
# The nodes of a BiFPN layer in the order in which they are computed: level,
# and whether on the way down to P3 or up again.
NODES = ((6, 1), (5, 1), (4, 1), (3, 1), (4, 2), (5, 2), (6, 2), (7, 2))


def tensors(ours, theirs, leaves=NORM):
    return {f'{ours}.{leaf}': f'{theirs}.{leaf}' for leaf in leaves}


def separable(ours, theirs, wrapper):
    """A depthwise convolution without bias, and a pointwise one with it."""
    names = {}
    for name, leaves in (('depthwise', NORM[:1]), ('pointwise', NORM[:2])):
        names.update(
            tensors(ours + name, f'{theirs}{name}_conv{wrapper}', leaves))
    return names


def zylo117_backbone():
    start = 'backbone_net.model.'
    names = {
        **tensors('backbone.stem.conv', f'{start}_conv_stem.conv', NORM[:1]),
        **tensors('backbone.stem.bn', f'{start}_bn0')
    }
    parts = [('expand_conv', '_expand_conv', '_bn0'),
             ('depthwise_conv', '_depthwise_conv', '_bn1'),
             ('linear_conv', '_project_conv', '_bn2')]  # yapf: disable
    for i in range(16):
        ours, theirs = f'backbone.blocks.{i}.', f'{start}_blocks.{i}.'
        for name, conv, norm in parts[i == 0:]:  # the first does not expand
            names.update(
                tensors(f'{ours}{name}.conv', f'{theirs}{conv}.conv',
                        NORM[:1]))
            names.update(tensors(f'{ours}{name}.bn', theirs + norm))
        for number, name in enumerate(('_se_reduce', '_se_expand'), 1):
            names.update(
                tensors(f'{ours}se.conv{number}.conv', f'{theirs}{name}.conv',
                        NORM[:2]))
    return names


def mmdet_backbone():
    """Our names are those of the host's blocks, counted through."""
    state_dict = MODELS.build(
        dict(type='mmdet.EfficientNet', arch='b0',
             out_indices=(3, 4, 5))).state_dict()
    blocks = list(
        dict.fromkeys(
            tuple(key.split('.')[1:3]) for key in state_dict
            if not key.startswith('layers.0.')))
    names = {}
    for key in state_dict:
        _, layer, place, *rest = key.split('.')
        ours = ['stem', place, *rest] if layer == '0' else [
            'blocks', str(blocks.index((layer, place))), *rest
        ]
        if rest[-1] != 'num_batches_tracked':
            names['.'.join(['backbone', *ours])] = f'backbone.{key}'
    return names


def neck(start, wrapper, conv, norm, second):
    """Names of the neck.

    Args:
        start (str): Before the number of a layer.
        wrapper (str): What a convolution is called inside a block.
        conv, norm (str): Parts of a projection to the width of the neck.
        second (str): The end of the names of the second projections.
    """
    names = {}
    projections = {
        'extra_levels.0': 'p5_to_p6' + ('.0' if second[1] == 'l' else ''),
        'layers.0.nodes.1.resamples.0': 'p5_down_channel',
        'layers.0.nodes.2.resamples.0': 'p4_down_channel',
        'layers.0.nodes.3.resamples.0': 'p3_down_channel',
        'layers.0.nodes.4.resamples.0': 'p4' + second,
        'layers.0.nodes.5.resamples.0': 'p5' + second
    }
    for ours, theirs in projections.items():
        theirs = f'{start}0.{theirs}'
        names.update(tensors(f'neck.{ours}.conv', theirs + conv, NORM[:2]))
        names.update(tensors(f'neck.{ours}.norm', theirs + norm))
    for layer in range(3):
        for i, (level, path) in enumerate(NODES):
            ours = f'neck.layers.{layer}.nodes.{i}.'
            way = {1: 'up', 2: 'down'}[path]
            theirs = f'{start}{layer}.conv{level}_{way}.'
            names.update(separable(f'{ours}conv.', theirs, wrapper))
            names.update(tensors(f'{ours}norm', f'{theirs}bn'))
            names[f'{ours}fusion_weights'] = f'{start}{layer}.p{level}_w{path}'
    return names


def zylo117():
    names = {
        **zylo117_backbone(),
        **neck('bifpn.', '.conv', '.0.conv', '.1', '_down_channel_2')
    }
    for net, word in (('cls', 'classifier'), ('reg', 'regressor')):
        for i in range(3):
            names.update(
                separable(f'bbox_head.{net}_convs.{i}.',
                          f'{word}.conv_list.{i}.', '.conv'))
            for level in range(5):
                names.update(
                    tensors(f'bbox_head.{net}_norms.{i}.{level}',
                            f'{word}.bn_list.{level}.{i}'))
        names.update(
            separable(f'bbox_head.conv_{net}.', f'{word}.header.', '.conv'))
    return names


def mmdet():
    names = {
        **mmdet_backbone(),
        **neck('neck.bifpn.', '', '.down_conv', '.bn', '_level_connection')
    }
    for net in ('cls', 'reg'):
        for i in range(3):
            names.update(
                separable(f'bbox_head.{net}_convs.{i}.',
                          f'bbox_head.{net}_conv_list.{i}.', ''))
            for level in range(5):
                names.update(
                    tensors(f'bbox_head.{net}_norms.{i}.{level}',
                            f'bbox_head.{net}_bn_list.{i}.{level}'))
        names.update(
            separable(f'bbox_head.conv_{net}.', f'bbox_head.{net}_header.',
                      ''))
    return names


@pytest.mark.parametrize('names, title', [
    (zylo117, 'Yet-Another-EfficientDet-Pytorch'),
    (mmdet, "mmdet's projects/EfficientDet"),
])
def test_all_tensors_of_d0(names, title):
    """Each goes to its place, and none is left over or missing."""
    names = names()
    shapes = shapes_of('d0')
    assert names.keys() == shapes.keys()
    assert len(set(names.values())) == len(names)
    layout, = [layout for layout in LAYOUTS if layout.title == title]
    for ours, theirs in names.items():
        assert layout.names(ours,
                            *levels_of('d0')) == [layout.normalized(theirs)
                                                  ], ours
    theirs = {
        names[key]: torch.full(shape, float(i))
        for i, (key, shape) in enumerate(shapes.items())
    }
    found = match(theirs, shapes, *levels_of('d0'))
    assert found.layout is layout
    for i, (key, value) in enumerate(found.state_dict().items()):
        assert (value == i).all(), key
