"""effdet as an oracle: the same network, and our keys for its weights."""
import re

import effdet
from effdet.config import get_efficientdet_config
from effdet_bridge import effdet_network, random_weights

from mmdet_efficientdet.weights.schemes import convert_imagenet_backbone

_RULES = [
    (r'^fpn\.resample\.3\.conv\.', 'neck.extra_levels.0.'),
    (r'^fpn\.cell\.(\d+)\.fnode\.(\d+)\.', r'neck.layers.\1.nodes.\2.'),
    (r'combine\.edge_weights$', 'fusion_weights'),
    (r'after_combine\.conv\.conv_dw\.', 'conv.depthwise.'),
    (r'after_combine\.conv\.conv_pw\.', 'conv.pointwise.'),
    (r'after_combine\.conv\.bn\.', 'norm.'),
    (r'^class_net\.', 'bbox_head.cls_'),
    (r'^box_net\.', 'bbox_head.reg_'),
    (r'(cls|reg)_predict\.', r'conv_\1.'),
    (r'_conv_rep\.', '_convs.'),
    (r'_bn_rep\.(\d+)\.(\d+)\.bn\.', r'_norms.\1.\2.'),
    (r'\bconv_dw\.', 'depthwise.'),
    (r'\bconv_pw\.', 'pointwise.'),
]


def build(name: str, image_size):
    """effdet's network with random weights, none of them trivial."""
    model = effdet_network(name, image_size)
    model.load_state_dict(random_weights(name), assign=True)
    return model


def with_classes(weights: dict, num_classes: int) -> dict:
    """effdet's weights with the first classes only of COCO's 90 slots."""
    return {
        key:
        value.unflatten(0, (9, 90))[:, :num_classes].flatten(0, 1).clone()
        if key.startswith('class_net.predict.conv_pw.') else value
        for key, value in weights.items()
    }


def anchors(name: str, image_size):
    """effdet's anchors (x1, y1, x2, y2), all levels."""
    config = get_efficientdet_config(f'tf_efficientdet_{name}')
    config.image_size = tuple(image_size)
    boxes = effdet.anchors.Anchors.from_config(config).boxes
    return boxes[:, [1, 0, 3, 2]]


def convert(state_dict: dict, arch: str) -> dict:
    """effdet's state dict under our keys, for a backbone ``arch``."""
    backbone = {
        k[len('backbone.'):]: v
        for k, v in state_dict.items() if k.startswith('backbone.')
    }
    converted = {
        f'backbone.{k}': v
        for k, v in convert_imagenet_backbone(backbone, arch).items()
    }
    for key, value in state_dict.items():
        if key.startswith('backbone.'):
            continue
        # The resampling of an edge is named by input there, by edge here.
        match = re.search(r'combine\.resample\.(\d+)\.conv\.', key)
        if match:
            key = key.replace(match.group(0), 'resamples.0.')
        for pattern, replacement in _RULES:
            key = re.sub(pattern, replacement, key)
        key = re.sub(r'((resamples|extra_levels)\.0\.)bn\.', r'\1norm.', key)
        if key.startswith('bbox_head.conv_reg.pointwise'):
            # (ty, tx, th, tw) of each anchor to (dx, dy, dw, dh)
            value = value.unflatten(0, (-1, 4))[:, [1, 0, 3, 2]].flatten(0, 1)
        assert key not in converted, key
        converted[key] = value
    return converted
