"""The settings of a released detector, from its config."""
from dataclasses import asdict
from typing import Sequence

from export_parts.detector import input_settings
from mmengine.config import Config

from mmdet_efficientdet.utils import plain_data

KNOWN = {'nms_pre', 'nms', 'max_per_img', 'score_thr'}
# Transforms of a test pipeline that change nothing of the image
NEUTRAL = ('LoadImageFromFile', 'LoadAnnotations', 'PackDetInputs')


def detector_settings(config: Config, names: Sequence[str]) -> dict:
    """What ``load_detector`` needs to do as the config does.

    Args:
        config (Config): Of the training; its test pipeline is followed.
        names (Sequence[str]): Of the classes.

    Raises:
        ValueError: If the pipeline or the head has what it cannot do.
    """
    settings = asdict(input_settings(config, names, 'pad', None))
    padded, resized = settings['image_size'], resize_of(config)
    if resized.get('image_size', padded) != padded:
        raise ValueError(
            f'ResizeCrop fits images into {resized["image_size"]}, but they '
            f'are padded to multiples of {padded}; set '
            'data_preprocessor.pad_size_divisor to the same size')
    settings.update(resized)
    test_cfg = plain_data(dict(config.model.get('test_cfg') or {}))
    others = test_cfg.keys() - KNOWN
    if others:
        raise ValueError(f'test_cfg has {sorted(others)}, which a release '
                         f'cannot follow; it can {sorted(KNOWN)}')
    settings['test_cfg'] = test_cfg
    return settings


def resize_of(config: Config) -> dict:
    """How the test pipeline fits an image to the input."""
    dataset = config.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    steps = [
        dict(step, type=str(step['type']).rpartition('.')[2])
        for step in dataset.pipeline
    ]
    steps = [step for step in steps if step['type'] not in NEUTRAL]
    step = steps[0] if len(steps) == 1 else {}
    given = {k: v for k, v in step.items() if k != 'type'}
    if step.get('type') == 'ResizeCrop':
        side = given.pop('image_size')
        given.pop('to_float32', None)
        if tuple(given.pop('ratio_range', (1, 1))) == (1, 1) and \
                given.pop('half_pixel_centers', True) and not given:
            side = [side] * 2 if isinstance(side, int) else list(side)
            return dict(resize='pad', image_size=side)
    factor = given.pop('scale_factor', None)
    if step.get('type') == 'Resize' and isinstance(
            factor, (int, float)) and given == dict(keep_ratio=True):
        return dict(resize='factor', factor=factor)
    raise ValueError(
        f'the test pipeline has {steps}, which a release cannot follow. It '
        'can ResizeCrop(image_size=...) with half_pixel_centers, and '
        'Resize(scale_factor=NUMBER, keep_ratio=True)')
