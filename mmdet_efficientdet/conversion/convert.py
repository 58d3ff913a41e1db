"""Turns files of published weights into checkpoints of ours."""
import copy
import os
from pathlib import Path
from typing import Dict, List, Mapping, Tuple

import torch
from mmdet.datasets import CocoDataset
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from ..scaling import SCALING, scale_config
from ..utils import register_all_modules
from .sources import open_source
from .tensors import UNUSED_IDS, convert, select_coco_classes

_BIAS = 'bbox_head.conv_cls.pointwise.bias'


def convert_file(path: str,
                 config: Config,
                 num_classes: int = 80,
                 averages: bool = True) -> dict:
    """Converts a file of published weights to a checkpoint of our model.

    Args:
        path (str): The file, in any format that ``open_source`` knows and
            any of ``LAYOUTS``.
        config (Config): Config of the size; it is not changed.
        num_classes (int): 80, or 90 to keep the slots of COCO ids that no
            object has. Defaults to 80.
        averages (bool): Whether to prefer moving averages of the weights
            where there are any. Defaults to True.

    Returns:
        dict: ``state_dict``, and ``meta`` with ``cfg`` (text of the config),
        ``dataset_meta`` (class names), ``source`` (``file``, ``sha256`` and
        the lines of a ``receipt``), ``aspect_pairs``, ``mean`` and ``std``;
        plain types and tensors only.

    Raises:
        ValueError: If the file cannot be read, or does not fit the config;
            where it fits another size, the message names that.
    """
    register_all_modules(init_default_scope=False)
    config = copy.deepcopy(config)
    config.model.backbone.init_cfg = None
    config.model.bbox_head.num_classes = num_classes
    model = _build(config)
    with open_source(str(path)) as (tensors, digest):
        try:
            state_dict, receipt = _convert_for(tensors, model, averages)
        except ValueError as error:
            sizes = _fitting_sizes(tensors, config)
            hint = f'\nThe weights are of {" or ".join(sizes)}; give the ' \
                'config of that size' if sizes else ''
            raise ValueError(f'{error}{hint}') from error
    anchors = model.bbox_head.prior_generator
    given = len(state_dict[_BIAS]) // anchors.num_base_priors[0]
    if given == 90 and num_classes == 80:
        state_dict = select_coco_classes(state_dict)
        receipt.append('classes: 80 of 90 slots, bit for bit')
    elif given != num_classes:
        raise ValueError(
            f'{path} predicts {given} classes; only heads of COCO with 80 or '
            '90 can be converted, to 90 only from 90')
    preprocessor = config.model.data_preprocessor
    return dict(
        meta=dict(
            cfg=config.pretty_text,
            dataset_meta=dict(classes=_class_names(num_classes)),
            source=dict(file=Path(path).name, sha256=digest, receipt=receipt),
            aspect_pairs=[list(pair) for pair in anchors.aspect_pairs],
            mean=list(preprocessor.mean),
            std=list(preprocessor.std)),
        state_dict=state_dict)


def _build(config: Config) -> nn.Module:
    """The model without memory for its weights."""
    scope = DefaultScope.overwrite_default_scope('mmdet_efficientdet')
    with scope, torch.device('meta'):
        return MODELS.build(config.model)


def _convert_for(tensors: Mapping, model: nn.Module,
                 averages: bool) -> Tuple[Dict[str, Tensor], List[str]]:
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    return convert(tensors, shapes, model.backbone.arch,
                   model.bbox_head.num_levels, averages)


def _fitting_sizes(tensors: Mapping, config: Config) -> List[str]:
    """The sizes that the weights do fit."""
    sizes = []
    for size in SCALING:
        other = copy.deepcopy(config)
        scale_config(other, size)
        try:
            _convert_for(tensors, _build(other), averages=False)
        except ValueError:
            continue
        sizes.append(size)
    return sizes


def _class_names(num_classes: int) -> List[str]:
    """Names of COCO's classes, or of all its 90 ids."""
    names = list(CocoDataset.METAINFO['classes'])
    if num_classes == 80:
        return names
    return [
        f'unused {i}' if i in UNUSED_IDS else names.pop(0)
        for i in range(1, 91)
    ]


def save(checkpoint: dict, path: str) -> None:
    """Writes a checkpoint at once or not at all, the same bytes each time."""
    target = Path(path)
    temporary = target.with_name(f'.{target.name}.{os.getpid()}')
    try:
        with temporary.open('wb') as file:  # a path would get into the file
            torch.save(checkpoint, file)
        os.replace(temporary, target)
    except OSError as error:
        raise ValueError(f'cannot write {path}: {error}') from error
    finally:
        temporary.unlink(missing_ok=True)
