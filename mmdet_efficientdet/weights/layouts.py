"""The names of our tensors in the files of other projects.

A layout maps the names of our modules to those of another project. ``{0}``,
``{1}``, ... are the numbers in our name, in their order. The other fields,
such as ``{stage}``, are computed in :func:`.naming.name_fields`.
"""
from typing import Dict, Iterator

from .naming import Layout

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


def _backbone(project: str, prefix: str = '') -> Dict[str, str]:
    """Our modules of the backbone and those of one project."""
    header, *rows = _split(_BACKBONES)
    names = {row[0]: row[header.index(project)] for row in rows}
    block = names.pop('BLOCK')
    return {
        'backbone.' + ours.replace('BLOCK', 'blocks.{}'):
        prefix + (block + theirs if 'BLOCK' in ours else theirs)
        for ours, theirs in names.items()
    }


def _detector(backbone: Dict[str, str], cls: str, reg: str,
              rows: str) -> Dict[str, str]:
    """Our modules of a detector and those of one project.

    Args:
        backbone (dict): Of that project.
        cls (str): Its word for the class net.
        reg (str): Its word for the box net.
        rows (str): "ours theirs", where NODE is the start of the name of a
            BiFPN node, and NET is replaced by the words for both nets.
    """
    modules = dict(backbone)
    for ours, theirs in _split(rows):
        ours = ours.replace('NODE', 'neck.layers.{}.nodes.{}')
        for net, word in (('cls', cls), ('reg', reg)):
            modules[ours.replace('NET', net)] = theirs.replace('NET', word)
    return modules


TF_VARIABLES = _backbone('tf_variables', 'efficientnet-{arch}/')

_EFFDET = _detector(
    _backbone('timm', 'backbone.'), 'class', 'box', """
neck.extra_levels.{}.conv         fpn.resample.3.conv.conv
neck.extra_levels.{}.norm         fpn.resample.3.conv.bn
NODE.fusion_weights               fpn.cell.{0}.fnode.{1}.combine.edge_weights
NODE.resamples.{}.conv            fpn.cell.{0}.fnode.{1}.combine.resample.{source}.conv.conv
NODE.resamples.{}.norm            fpn.cell.{0}.fnode.{1}.combine.resample.{source}.conv.bn
NODE.conv.depthwise               fpn.cell.{0}.fnode.{1}.after_combine.conv.conv_dw
NODE.conv.pointwise               fpn.cell.{0}.fnode.{1}.after_combine.conv.conv_pw
NODE.norm                         fpn.cell.{0}.fnode.{1}.after_combine.conv.bn
bbox_head.NET_convs.{}.depthwise  NET_net.conv_rep.{0}.conv_dw
bbox_head.NET_convs.{}.pointwise  NET_net.conv_rep.{0}.conv_pw
bbox_head.NET_norms.{}.{}         NET_net.bn_rep.{0}.{1}.bn
bbox_head.conv_NET.depthwise      NET_net.predict.conv_dw
bbox_head.conv_NET.pointwise      NET_net.predict.conv_pw
""")  # yapf: disable
_LEVEL_FIRST = _detector(_EFFDET, 'class', 'box',
                         'bbox_head.NET_norms.{}.{} NET_net.bn_rep.{1}.{0}')

LAYOUTS = (
    Layout(
        'TensorFlow variables', _detector(TF_VARIABLES, 'class', 'box', """
neck.extra_levels.{}.conv         resample_p6/conv2d
neck.extra_levels.{}.norm         resample_p6/bn
NODE.fusion_weights               fpn_cells/cell_{0}/fnode{1}/WSM
NODE.resamples.{}.conv            fpn_cells/cell_{0}/fnode{1}/resample_{2}_{source}_{count}/conv2d
NODE.resamples.{}.norm            fpn_cells/cell_{0}/fnode{1}/resample_{2}_{source}_{count}/bn
NODE.conv.depthwise               fpn_cells/cell_{0}/fnode{1}/op_after_combine{count}/conv
NODE.conv.pointwise               fpn_cells/cell_{0}/fnode{1}/op_after_combine{count}/conv
NODE.norm                         fpn_cells/cell_{0}/fnode{1}/op_after_combine{count}/bn
bbox_head.NET_convs.{}.depthwise  NET_net/NET-{0}
bbox_head.NET_convs.{}.pointwise  NET_net/NET-{0}
bbox_head.NET_norms.{}.{}         NET_net/NET-{0}-bn-{level}
bbox_head.conv_NET.depthwise      NET_net/NET-predict
bbox_head.conv_NET.pointwise      NET_net/NET-predict
"""),
        tensorflow=True,
        prefix='model/'),
    Layout(
        'TensorFlow objects', _detector(
            _backbone('tf_objects', 'backbone/'), 'class', 'box', """
neck.extra_levels.{}.conv         resample_layers/{0}/conv2d
neck.extra_levels.{}.norm         resample_layers/{0}/bn
NODE.fusion_weights               fpn_cells/cells/{0}/fnodes/{1}/WSM
NODE.resamples.{}.conv            fpn_cells/cells/{0}/fnodes/{1}/resample_layers/{2}/conv2d
NODE.resamples.{}.norm            fpn_cells/cells/{0}/fnodes/{1}/resample_layers/{2}/bn
NODE.conv.depthwise               fpn_cells/cells/{0}/fnodes/{1}/op_after_combine/conv_op
NODE.conv.pointwise               fpn_cells/cells/{0}/fnodes/{1}/op_after_combine/conv_op
NODE.norm                         fpn_cells/cells/{0}/fnodes/{1}/op_after_combine/bn
bbox_head.NET_convs.{}.depthwise  NET_net/conv_ops/{0}
bbox_head.NET_convs.{}.pointwise  NET_net/conv_ops/{0}
bbox_head.NET_norms.{}.{}         NET_net/bns/{0}/{1}
bbox_head.conv_cls.depthwise      class_net/classes
bbox_head.conv_cls.pointwise      class_net/classes
bbox_head.conv_reg.depthwise      box_net/boxes
bbox_head.conv_reg.pointwise      box_net/boxes
"""),
        tensorflow=True,
        suffix='/.ATTRIBUTES/VARIABLE_VALUE',
        prefix='model/'),  # if the detector is an attribute of what is saved
    Layout('effdet', _EFFDET),
    Layout('effdet, norms level first', _LEVEL_FIRST),
    Layout(
        'Yet-Another-EfficientDet-Pytorch', _detector(
            _backbone('efficientnet_pytorch', 'backbone_net.model.'),
            'classifier', 'regressor', """
neck.extra_levels.{}.conv         bifpn.0.p5_to_p6.0
neck.extra_levels.{}.norm         bifpn.0.p5_to_p6.1
NODE.fusion_weights               bifpn.{0}.p{level}_w{path}
NODE.resamples.{}.conv            bifpn.{0}.p{level}_down_channel{again}.0
NODE.resamples.{}.norm            bifpn.{0}.p{level}_down_channel{again}.1
NODE.conv.depthwise               bifpn.{0}.conv{level}_{way}.depthwise_conv
NODE.conv.pointwise               bifpn.{0}.conv{level}_{way}.pointwise_conv
NODE.norm                         bifpn.{0}.conv{level}_{way}.bn
bbox_head.NET_convs.{}.depthwise  NET.conv_list.{0}.depthwise_conv
bbox_head.NET_convs.{}.pointwise  NET.conv_list.{0}.pointwise_conv
bbox_head.NET_norms.{}.{}         NET.bn_list.{1}.{0}
bbox_head.conv_NET.depthwise      NET.header.depthwise_conv
bbox_head.conv_NET.pointwise      NET.header.pointwise_conv
"""),
        inner_conv=True),
    Layout(
        "mmdet's projects/EfficientDet", _detector(
            _backbone('openmmlab', 'backbone.'), 'cls', 'reg', """
neck.extra_levels.{}.conv         neck.bifpn.0.p5_to_p6.0.down_conv
neck.extra_levels.{}.norm         neck.bifpn.0.p5_to_p6.0.bn
NODE.fusion_weights               neck.bifpn.{0}.p{level}_w{path}
NODE.resamples.{}.conv            neck.bifpn.{0}.p{level}_{channel}.down_conv
NODE.resamples.{}.norm            neck.bifpn.{0}.p{level}_{channel}.bn
NODE.conv.depthwise               neck.bifpn.{0}.conv{level}_{way}.depthwise_conv
NODE.conv.pointwise               neck.bifpn.{0}.conv{level}_{way}.pointwise_conv
NODE.norm                         neck.bifpn.{0}.conv{level}_{way}.bn
bbox_head.NET_convs.{}.depthwise  bbox_head.NET_conv_list.{0}.depthwise_conv
bbox_head.NET_convs.{}.pointwise  bbox_head.NET_conv_list.{0}.pointwise_conv
bbox_head.NET_norms.{}.{}         bbox_head.NET_bn_list.{0}.{1}
bbox_head.conv_NET.depthwise      bbox_head.NET_header.depthwise_conv
bbox_head.conv_NET.pointwise      bbox_head.NET_header.pointwise_conv
""")),
    Layout('mmdet_efficientdet', {}, y_first=False))  # yapf: disable

# ImageNet networks alone.
BACKBONES = (
    Layout(
        'backbone of timm', _backbone('timm'),
        classifier=r'(conv_head|bn2|classifier)\..*'),
    Layout(
        'backbone of efficientnet_pytorch', _backbone('efficientnet_pytorch'),
        classifier=r'(_conv_head|_bn1|_fc)\..*'),
    Layout(
        'backbone of MMDetection or MMPretrain', _backbone('openmmlab'),
        prefix='backbone.',
        classifier=r'(layers\.6|head|fc)\..*'),
    Layout(
        'backbone of TensorFlow variables', TF_VARIABLES, tensorflow=True,
        classifier=r'efficientnet-\w+/head/.*'))  # yapf: disable
