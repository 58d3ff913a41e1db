"""Small detectors of the shipped configs, and batches for them."""
from functools import lru_cache

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import DefaultScope, init_default_scope
from mmengine.structures import InstanceData
from oracles.official_sizes import TABLE

from .tiny_data import CONFIGS

SIZES = {
    name:
    CONFIGS / (f'efficientdet_{name}_8xb16-'
               f'{600 if name in ("d7", "d7x") else 300}e_coco.py')
    for name in TABLE
}


@lru_cache
def shapes_of(name, num_classes=90):
    """Shapes of a size's tensors without batch counters; not to be changed."""
    config = Config.fromfile(SIZES[name]).model
    config.backbone.init_cfg = None
    config.bbox_head.num_classes = num_classes
    scope = DefaultScope.overwrite_default_scope('mmdet')
    with scope, torch.device('meta'):
        state_dict = MODELS.build(config).state_dict()
    return {
        key: tuple(value.shape)
        for key, value in state_dict.items()
        if not key.endswith('num_batches_tracked')
    }


def batch(*shapes, num_classes=80):
    """Random images (height, width) with two boxes each."""
    samples = []
    for height, width in shapes:
        boxes = torch.tensor([[4., 4, 36, 40], [20, 10, width, height]])
        samples.append(
            DetDataSample(
                gt_instances=InstanceData(
                    bboxes=boxes, labels=torch.tensor([0, num_classes - 1])),
                metainfo=dict(
                    img_shape=(height, width),
                    ori_shape=(2 * height, 2 * width),
                    scale_factor=(0.5, 0.5))))
    images = [
        torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
        for shape in shapes
    ]
    return dict(inputs=images, data_samples=samples)


def new_model(config):
    """A detector of two classes for small images, without ImageNet weights."""
    init_default_scope('mmdet')
    config.model.data_preprocessor.pad_size_divisor = 128
    config.model.bbox_head.num_classes = 2
    config.model.backbone.init_cfg = None
    model = MODELS.build(config.model)
    model.init_weights()
    return model.train()


def sizes_in(config):
    """All (key, value) of image sizes in the pipelines of a config."""
    found = []

    def walk(node):
        if isinstance(node, dict):
            if node.get('type') == 'mmdet_efficientdet.ResizeCrop':
                found.append(node['image_size'])
            node = list(node.values())
        if isinstance(node, (list, tuple)):
            for item in node:
                walk(item)

    walk(config)
    return found
