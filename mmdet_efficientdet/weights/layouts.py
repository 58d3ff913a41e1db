"""The names of our tensors in the files of other projects.

A layout maps the names of our modules to those of another project. ``{0}``,
``{1}``, ... are the numbers in our name, in their order. The other fields,
such as ``{stage}``, are computed in :func:`.naming.name_fields`.
"""
from typing import Dict, Iterator

from .naming import Layout, OwnLayout

# One column for each project. The names of a block start with the row BLOCK.
# efficientnet_pytorch also names those of efficientnet_lite_pytorch, and
# openmmlab those of MMDetection, MMPretrain and the older MMClassification.
_BACKBONES = """
ours                       timm                      efficientnet_pytorch  openmmlab                tf_objects        tf_variables
stem.conv                  conv_stem                 _conv_stem            layers.0.conv            _stem/_conv_stem  stem/conv2d
stem.bn                    bn1                       _bn0                  layers.0.bn              _stem/_bn         stem/tpu_batch_normalization
BLOCK                      blocks.{stage}.{repeat}.  _blocks.{0}.          layers.{layer}.{place}.  _blocks/{0}/      blocks_{0}/
BLOCK.expand_conv.conv     conv_pw                   _expand_conv          expand_conv.conv         _expand_conv      conv2d
BLOCK.expand_conv.bn       bn1                       _bn0                  expand_conv.bn           _bn0              tpu_batch_normalization
BLOCK.depthwise_conv.conv  conv_dw                   _depthwise_conv       depthwise_conv.conv      _depthwise_conv   depthwise_conv2d
BLOCK.depthwise_conv.bn    bn{bn_1}                  _bn1                  depthwise_conv.bn        _bn1              tpu_batch_normalization{norm_1}
BLOCK.se.conv1.conv        se.conv_reduce            _se_reduce            se.conv1.conv            _se/_se_reduce    se/conv2d
BLOCK.se.conv2.conv        se.conv_expand            _se_expand            se.conv2.conv            _se/_se_expand    se/conv2d_1
BLOCK.linear_conv.conv     {last}                    _project_conv         linear_conv.conv         _project_conv     conv2d{conv}
BLOCK.linear_conv.bn       bn{bn_2}                  _bn2                  linear_conv.bn           _bn2              tpu_batch_normalization{norm_2}
"""


def _split(rows: str) -> Iterator[list]:
    """The names in each row."""
    return map(str.split, rows.strip().splitlines())


def _backbone(project: str) -> Dict[str, str]:
    """Our modules of the backbone and those of one project."""
    header, *rows = _split(_BACKBONES)
    names = {row[0]: row[header.index(project)] for row in rows}
    block = names.pop('BLOCK')
    return {
        'backbone.' + ours.replace('BLOCK', 'blocks.{}'):
        block + theirs if 'BLOCK' in ours else theirs
        for ours, theirs in names.items()
    }


def _prefixed(prefix: str, modules: Dict[str, str]) -> Dict[str, str]:
    return {ours: prefix + theirs for ours, theirs in modules.items()}


def _neck(rows: str) -> Dict[str, str]:
    """Rows of "ours theirs", with NODE for the start of a node's name."""
    return {
        ours.replace('NODE', 'neck.layers.{}.nodes.{}'): theirs
        for ours, theirs in _split(rows)
    }


def _head(rows: str, cls: str, reg: str) -> Dict[str, str]:
    """Rows of "ours theirs", with NET for the class net or the box net."""
    return {
        f'bbox_head.{ours}'.replace('NET', net): theirs.replace('NET', word)
        for net, word in (('cls', cls), ('reg', reg))
        for ours, theirs in _split(rows)
    }


TIMM = _backbone('timm')
EFFICIENTNET_PYTORCH = _backbone('efficientnet_pytorch')
OPENMMLAB = _backbone('openmmlab')
TF_OBJECTS = _prefixed('backbone/', _backbone('tf_objects'))
TF_VARIABLES = _prefixed('efficientnet-{arch}/', _backbone('tf_variables'))

_EFFDET_NECK = _neck("""
neck.extra_levels.{}.conv  fpn.resample.3.conv.conv
neck.extra_levels.{}.norm  fpn.resample.3.conv.bn
NODE.fusion_weights        fpn.cell.{0}.fnode.{1}.combine.edge_weights
NODE.resamples.{}.conv     fpn.cell.{0}.fnode.{1}.combine.resample.{source}.conv.conv
NODE.resamples.{}.norm     fpn.cell.{0}.fnode.{1}.combine.resample.{source}.conv.bn
NODE.conv.depthwise        fpn.cell.{0}.fnode.{1}.after_combine.conv.conv_dw
NODE.conv.pointwise        fpn.cell.{0}.fnode.{1}.after_combine.conv.conv_pw
NODE.norm                  fpn.cell.{0}.fnode.{1}.after_combine.conv.bn
""")
_EFFDET_HEAD = _head("""
NET_convs.{}.depthwise NET_net.conv_rep.{0}.conv_dw
NET_convs.{}.pointwise NET_net.conv_rep.{0}.conv_pw
NET_norms.{}.{}        NET_net.bn_rep.{0}.{1}.bn
conv_NET.depthwise     NET_net.predict.conv_dw
conv_NET.pointwise     NET_net.predict.conv_pw
""", cls='class', reg='box')  # yapf: disable
_EFFDET = {**_prefixed('backbone.', TIMM), **_EFFDET_NECK, **_EFFDET_HEAD}
_LEVEL_FIRST = _head('NET_norms.{}.{} NET_net.bn_rep.{1}.{0}', 'class', 'box')

LAYOUTS = (
    Layout(
        'TensorFlow variables', {
            **TF_VARIABLES,
            **_neck("""
neck.extra_levels.{}.conv  resample_p6/conv2d
neck.extra_levels.{}.norm  resample_p6/bn
NODE.fusion_weights        fpn_cells/cell_{0}/fnode{1}/WSM
NODE.resamples.{}.conv     fpn_cells/cell_{0}/fnode{1}/resample_{2}_{source}_{count}/conv2d
NODE.resamples.{}.norm     fpn_cells/cell_{0}/fnode{1}/resample_{2}_{source}_{count}/bn
NODE.conv.depthwise        fpn_cells/cell_{0}/fnode{1}/op_after_combine{count}/conv
NODE.conv.pointwise        fpn_cells/cell_{0}/fnode{1}/op_after_combine{count}/conv
NODE.norm                  fpn_cells/cell_{0}/fnode{1}/op_after_combine{count}/bn
"""),
            **_head("""
NET_convs.{}.depthwise NET_net/NET-{0}
NET_convs.{}.pointwise NET_net/NET-{0}
NET_norms.{}.{}        NET_net/NET-{0}-bn-{level}
conv_NET.depthwise     NET_net/NET-predict
conv_NET.pointwise     NET_net/NET-predict
""", cls='class', reg='box')
        },
        tensorflow=True,
        prefix='model/'),
    Layout(
        'TensorFlow objects', {
            **TF_OBJECTS,
            **_neck("""
neck.extra_levels.{}.conv  resample_layers/{0}/conv2d
neck.extra_levels.{}.norm  resample_layers/{0}/bn
NODE.fusion_weights        fpn_cells/cells/{0}/fnodes/{1}/WSM
NODE.resamples.{}.conv     fpn_cells/cells/{0}/fnodes/{1}/resample_layers/{2}/conv2d
NODE.resamples.{}.norm     fpn_cells/cells/{0}/fnodes/{1}/resample_layers/{2}/bn
NODE.conv.depthwise        fpn_cells/cells/{0}/fnodes/{1}/op_after_combine/conv_op
NODE.conv.pointwise        fpn_cells/cells/{0}/fnodes/{1}/op_after_combine/conv_op
NODE.norm                  fpn_cells/cells/{0}/fnodes/{1}/op_after_combine/bn
"""),
            **_head("""
NET_convs.{}.depthwise NET_net/conv_ops/{0}
NET_convs.{}.pointwise NET_net/conv_ops/{0}
NET_norms.{}.{}        NET_net/bns/{0}/{1}
""", cls='class', reg='box'),
            'bbox_head.conv_cls.depthwise': 'class_net/classes',
            'bbox_head.conv_cls.pointwise': 'class_net/classes',
            'bbox_head.conv_reg.depthwise': 'box_net/boxes',
            'bbox_head.conv_reg.pointwise': 'box_net/boxes'
        },
        tensorflow=True,
        suffix='/.ATTRIBUTES/VARIABLE_VALUE',
        prefix='model/'),  # the detector may be an attribute of the saved
    Layout('effdet', _EFFDET),
    Layout('effdet, norms level first', {**_EFFDET, **_LEVEL_FIRST}),
    Layout(
        'Yet-Another-EfficientDet-Pytorch', {
            **_prefixed('backbone_net.model.', EFFICIENTNET_PYTORCH),
            **_neck("""
neck.extra_levels.{}.conv  bifpn.0.p5_to_p6.0
neck.extra_levels.{}.norm  bifpn.0.p5_to_p6.1
NODE.fusion_weights        bifpn.{0}.p{level}_w{path}
NODE.resamples.{}.conv     bifpn.{0}.p{level}_down_channel{again}.0
NODE.resamples.{}.norm     bifpn.{0}.p{level}_down_channel{again}.1
NODE.conv.depthwise        bifpn.{0}.conv{level}_{way}.depthwise_conv
NODE.conv.pointwise        bifpn.{0}.conv{level}_{way}.pointwise_conv
NODE.norm                  bifpn.{0}.conv{level}_{way}.bn
"""),
            **_head("""
NET_convs.{}.depthwise NET.conv_list.{0}.depthwise_conv
NET_convs.{}.pointwise NET.conv_list.{0}.pointwise_conv
NET_norms.{}.{}        NET.bn_list.{1}.{0}
conv_NET.depthwise     NET.header.depthwise_conv
conv_NET.pointwise     NET.header.pointwise_conv
""", cls='classifier', reg='regressor')
        },
        inner_conv=True),
    Layout(
        "mmdet's projects/EfficientDet", {
            **_prefixed('backbone.', OPENMMLAB),
            **_neck("""
neck.extra_levels.{}.conv  neck.bifpn.0.p5_to_p6.0.down_conv
neck.extra_levels.{}.norm  neck.bifpn.0.p5_to_p6.0.bn
NODE.fusion_weights        neck.bifpn.{0}.p{level}_w{path}
NODE.resamples.{}.conv     neck.bifpn.{0}.p{level}_{channel}.down_conv
NODE.resamples.{}.norm     neck.bifpn.{0}.p{level}_{channel}.bn
NODE.conv.depthwise        neck.bifpn.{0}.conv{level}_{way}.depthwise_conv
NODE.conv.pointwise        neck.bifpn.{0}.conv{level}_{way}.pointwise_conv
NODE.norm                  neck.bifpn.{0}.conv{level}_{way}.bn
"""),
            **_head("""
NET_convs.{}.depthwise bbox_head.NET_conv_list.{0}.depthwise_conv
NET_convs.{}.pointwise bbox_head.NET_conv_list.{0}.pointwise_conv
NET_norms.{}.{}        bbox_head.NET_bn_list.{0}.{1}
conv_NET.depthwise     bbox_head.NET_header.depthwise_conv
conv_NET.pointwise     bbox_head.NET_header.pointwise_conv
""", cls='cls', reg='reg')
        }),
    OwnLayout('mmdet_efficientdet', {}, y_first=False))  # yapf: disable

# ImageNet networks alone.
BACKBONES = (Layout(
    'backbone of timm', TIMM, classifier=r'(conv_head|bn2|classifier)\..*'),
             Layout(
                 'backbone of efficientnet_pytorch',
                 EFFICIENTNET_PYTORCH,
                 classifier=r'(_conv_head|_bn1|_fc)\..*'),
             Layout(
                 'backbone of MMDetection or MMPretrain',
                 OPENMMLAB,
                 prefix='backbone.',
                 classifier=r'(layers\.6|head|fc)\..*'),
             Layout(
                 'backbone of TensorFlow variables',
                 TF_VARIABLES,
                 tensorflow=True,
                 classifier=r'efficientnet-\w+/head/.*'))
