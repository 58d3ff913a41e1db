"""BiFPN in the host's detectors, and our backbone and head in RetinaNet."""
import copy
from functools import lru_cache

import pytest
import torch
from helpers.models import batch
from helpers.tiny_data import CONFIGS
from mmdet.models.detectors import TwoStageDetector
from mmdet.models.necks import FPN
from mmdet.registry import MODELS
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmdet_efficientdet.models import BiFPN

FOLDER = CONFIGS.parent / 'bifpn'
P2_P6 = (4, 8, 16, 32, 64)
P3_P5 = (8, 16, 32)
P3_P6 = (8, 16, 32, 64)
P3_P7 = (8, 16, 32, 64, 128)
# Width and strides of the levels that each head expects.
LEVELS = {
    'atss_r50_bifpn_1x_coco': (256, P3_P7),
    'cascade-rcnn_r50_bifpn_1x_coco': (256, P2_P6),
    'centernet-update_r50_bifpn_8xb8-amp-lsj-200e_coco': (256, P3_P7),
    'deformable-detr_r50_bifpn_16xb2-50e_coco': (256, P3_P6),
    'dino-4scale_r50_bifpn_8xb2-12e_coco': (256, P3_P6),
    'efficientdet-head_r50_fpn_1x_coco': (256, P3_P7),
    'faster-rcnn_r50_bifpn_1x_coco': (256, P2_P6),
    'fcos_r50-caffe_bifpn_gn-head_1x_coco': (256, P3_P7),
    'gfl_r50_bifpn_1x_coco': (256, P3_P7),
    'mask-rcnn_r50_bifpn_1x_coco': (256, P2_P6),
    'retinanet_convnext-t_bifpn_1x_coco': (256, P3_P7),
    'retinanet_effb3_bifpn_8xb4-crop896-1x_coco': (256, P3_P7),
    'retinanet_efficientnet-b0_bifpn_1x_coco': (256, P3_P7),
    'retinanet_efficientnet-b0_fpn_1x_coco': (256, P3_P7),
    'retinanet_r50_bifpn_1x_coco': (256, P3_P7),
    'retinanet_swin-t-p4-w7_bifpn_1x_coco': (256, P3_P7),
    'rtmdet_tiny_bifpn_8xb32-300e_coco': (96, P3_P5),
    'tood_r50_bifpn_1x_coco': (256, P3_P7),
    'yolox_tiny_bifpn_8xb8-300e_coco': (96, P3_P5),
}
# One of each kind, for `make quick`
QUICK = ('efficientdet-head_r50_fpn_1x_coco', 'mask-rcnn_r50_bifpn_1x_coco',
         'retinanet_r50_bifpn_1x_coco', 'rtmdet_tiny_bifpn_8xb32-300e_coco')
# For the time that the tests take; widths of BiFPN's levels stay.
SMALL = dict(
    stacked_convs=1,
    fc_out_channels=32,
    feedforward_channels=32,
    num_layers=1,
    num_convs=1,
    num=32,
    nms_pre=50,
    max_per_img=50,
    num_queries=50)
SHALLOW = dict(
    SwinTransformer=dict(depths=(1, 1, 1, 1)),
    ConvNeXt=dict(
        arch=dict(depths=(1, 1, 1, 1), channels=(96, 192, 384, 768))))


def shrink(node):
    """Sets what ``SMALL`` names wherever it stands in a model's config."""
    for key, value in node.items():
        if key in SMALL:
            node[key] = SMALL[key]
        elif isinstance(value, list):
            for item in value:
                if isinstance(item, dict):
                    shrink(item)
        elif isinstance(value, dict):
            shrink(value)


@lru_cache
def config_of(name):
    """The config of a file, not to be changed."""
    return Config.fromfile(FOLDER / f'{name}.py')


def build(name):
    """The detector of a config, less deep, without pretrained weights."""
    model = copy.deepcopy(config_of(name).model)
    shrink(model)
    backbone = model.backbone
    if backbone.type == 'ResNet':
        # A quarter of the widths of R50
        backbone.depth = 18
        model.neck.in_channels = [n // 4 for n in model.neck.in_channels]
    backbone.update(SHALLOW.get(backbone.type.split('.')[-1], {}))
    if 'rpn_head' in model:
        # All anchors: of the upper levels' few none might be drawn, or all
        # might cross the border.
        model.train_cfg.rpn.sampler.num = 10000
        model.train_cfg.rpn.allowed_border = -1
    # Runner does so, too, where there is one process.
    return revert_sync_batchnorm(MODELS.build(model))


def small_batch(model, side):
    """What the model gets of two small images."""
    data = batch((side, side), (side * 3 // 4, side))
    for sample in data['data_samples'] if model.with_mask else ():
        height, width = sample.img_shape
        sample.gt_instances.masks = BitmapMasks(
            torch.ones(2, height, width, dtype=torch.uint8).numpy(), height,
            width)
    preprocessor = model.data_preprocessor
    preprocessor.batch_augments = None  # would enlarge the images
    return preprocessor(data, training=True)


def test_all_configs_are_listed():
    """No config is lost, and none is new."""
    assert sorted(path.stem for path in FOLDER.glob('*.py')) == list(LEVELS)


@pytest.mark.slow
@pytest.mark.parametrize('name', LEVELS)
def test_few_lines_over_the_host(name):
    """A config takes all from the host but for parts of the network."""
    text = (FOLDER / f'{name}.py').read_text()
    assert len(text.splitlines()) <= 28
    config = copy.deepcopy(config_of(name))
    host = Config.fromstring(text.split('\n')[0], '.py')
    assert ('_bifpn' in name) == (
        config.model.neck.type == 'mmdet_efficientdet.BiFPN')
    if name.startswith('efficientdet-head'):  # has no assigner to set
        assert config.model.pop('train_cfg', 0) is None
        host.model.pop('train_cfg')
    for ours, theirs in ((config, host), (config.model, host.model)):
        changed = {
            key
            for key in set(ours) | set(theirs)
            if ours.get(key) != theirs.get(key)
        }
        assert changed <= {
            'model', 'backbone', 'neck', 'bbox_head', 'custom_imports',
            'checkpoint', 'optim_wrapper', 'default_hooks'
        }


@pytest.mark.parametrize('name', LEVELS)
def test_fusion_weights_decay_like_norms(name):
    """A base that spares the norms from decay spares them, too."""
    config = copy.deepcopy(config_of(name))
    config.optim_wrapper.type = 'OptimWrapper'
    neck = nn.ModuleDict(dict(neck=MODELS.build(config.model.neck)))
    groups = build_optim_wrapper(neck, config.optim_wrapper).param_groups
    decay = {
        key: group['weight_decay']
        for key, weight in neck.named_parameters()
        for group in groups if any(weight is p for p in group['params'])
    }
    assert len(decay) == len(list(neck.parameters()))
    fusion, norms = ({v
                      for k, v in decay.items() if k.endswith(end)}
                     for end in ('fusion_weights', 'norm.weight'))
    assert fusion == norms if '_bifpn' in name else not fusion


def levels_of_the_head(model):
    """Strides that the host's heads have noted down; None if they have not."""
    head = model.rpn_head if isinstance(model, TwoStageDetector) \
        else model.bbox_head
    generator = getattr(head, 'prior_generator', None)
    strides = getattr(generator, 'strides', None)
    return strides and tuple(stride for stride, _ in strides)


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in LEVELS
])
def test_detector(name):
    """Levels are those the head expects, and it trains the whole neck."""
    width, strides = LEVELS[name]
    model = build(name)
    assert isinstance(model.neck, BiFPN) == ('_bifpn' in name)
    assert levels_of_the_head(model) in (strides, None)
    side = max(64, strides[-1])
    data = small_batch(model.train(), side)
    feats = model.extract_feat(data['inputs'])
    assert [x.shape for x in feats] == [
        (2, width, side // stride, side // stride) for stride in strides
    ]

    MessageHub.get_current_instance().update_info('epoch', 0)  # for TOOD
    losses, logged = model.parse_losses(model(**data, mode='loss'))
    assert len(logged) > 2
    assert all(loss.isfinite() for loss in logged.values())
    losses.backward()
    gradients = {
        key: weight.grad
        for key, weight in model.neck.named_parameters()
        if isinstance(model.neck, FPN) or 'fusion_weights' in key
    }
    assert gradients
    for key, gradient in gradients.items():
        assert gradient is not None, key
        assert gradient.isfinite().all() and gradient.any(), key

    with torch.no_grad():
        results = model.eval()(**data, mode='predict')
    for result in results:
        assert result.pred_instances.bboxes.isfinite().all()
