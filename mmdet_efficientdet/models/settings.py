"""Refuses settings that a module would ignore or misread."""
from inspect import signature

import torch

from ..deploy.postprocess import suppress
from ..registry import MODELS, TASK_UTILS

TEST_KEYS = ('nms_pre', 'nms', 'max_per_img', 'score_thr', 'clip_boxes',
             'min_bbox_size')
NMS_KEYS = tuple(signature(suppress).parameters)[4:]
# What may stand for a part of the head, and where it is registered. Classes
# of others than MMDetection are not looked at.
PARTS = dict(
    anchor_generator=(TASK_UTILS, 'mmdet_efficientdet.AnchorGenerator'),
    bbox_coder=(TASK_UTILS, 'mmdet_efficientdet.AnchorBoxCoder'),
    loss_cls=(MODELS, 'FocalLoss or CrossEntropyLoss'),
    loss_bbox=(MODELS, 'SmoothL1Loss, L1Loss, BalancedL1Loss, MSELoss or, with'
               ' bbox_head.reg_decoded_bbox=True, an IoULoss'))


def require(condition: bool, given: str, allowed: str) -> None:
    """Raises a ValueError unless ``condition`` holds."""
    if not condition:
        raise ValueError(f'{given} must be {allowed}')


def check_head(train_cfg: dict, test_cfg: dict, parts: dict) -> None:
    """Checks the settings of the head before it is built.

    Args:
        train_cfg, test_cfg (dict): See ``EfficientDetHead``.
        parts (dict): Configs of the ``PARTS``, and ``reg_decoded_bbox``.

    Raises:
        ValueError: If a setting is unknown, or a part cannot be used.
    """
    require(not train_cfg, f'train_cfg={train_cfg} of EfficientDet',
            'None, since its targets have no settings')
    nms = test_cfg.get('nms', {})
    for name, cfg, known in (('test_cfg', test_cfg, TEST_KEYS),
                             ('test_cfg.nms', nms, NMS_KEYS)):
        good = isinstance(cfg, dict) and set(cfg) <= set(known)
        require(good, f'{name}={cfg}', f'a dict with only {", ".join(known)}')
    one = torch.ones(1, 1, 4)
    suppress(one, one[..., 0], one[..., 0], **nms)  # raises if it cannot
    for name, (registry, allowed) in PARTS.items():
        kind = parts[name]['type']
        if isinstance(kind, str):
            with registry.switch_scope_and_registry(None) as current:
                kind = current.get(kind)
        if kind and kind.__module__.startswith('mmdet.'):
            fits = kind.__name__ in allowed.replace(',', '').split()
            if 'IoULoss' in allowed and kind.__name__.endswith('IoULoss'):
                fits = parts.get('reg_decoded_bbox')
            require(fits, f'{name}={kind.__name__} of MMDetection', allowed)
    require(
        parts['loss_cls'].get('use_sigmoid'), f'loss_cls={parts["loss_cls"]}',
        'one with use_sigmoid=True, since no output is for the background')
