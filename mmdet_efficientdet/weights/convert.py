"""Turns files of published weights into checkpoints of ours."""
import copy
import os
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Dict, List, Tuple

import torch
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from ..models.efficientdet import CLASS_PREDICTOR
from ..registry import MODELS
from ..scaling import SCALING, scale_config
from ..utils import write_file
from .conventions import adopt_conventions, conventions
from .matching import fill, match
from .sources import Source, class_names, open_source

_BIAS = f'{CLASS_PREDICTOR}.bias'
# Category ids of COCO that no object has; an output of 90 has a slot for
# each id from 1.
UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)


def convert_file(path: str,
                 config: Config,
                 num_classes: int = 80,
                 averages: bool = True) -> dict:
    """Converts a file of published weights to a checkpoint of our model.

    Args:
        path (str): The file, in any format that ``open_source`` knows and
            any layout of ``LAYOUTS`` and ``BACKBONES``.
        config (Config): Config of the size; it is not changed.
        num_classes (int): Of a head with COCO's 90 slots, 80 or all 90; heads
            of other classes stay as they are. Defaults to 80.
        averages (bool): Whether to prefer moving averages of the weights
            where there are any. Defaults to True.

    Returns:
        dict: ``state_dict``, and ``meta`` with ``cfg`` (text of the config),
        ``dataset_meta`` (class names), ``source`` (``file``, ``sha256`` and
        the lines of a ``receipt``) and ``conventions``, which are those of
        the config, and of a file of ours its own; plain types and tensors
        only. Of a backbone alone the state dict is that of ``EfficientNet``,
        for ``init_cfg=dict(type='Pretrained', checkpoint=...)``, and ``meta``
        has only ``source``.

    Raises:
        ValueError: If the file cannot be read, or does not fit the config;
            where it fits another size, the message names that.
    """
    with open_source(path) as source:
        return convert_source(source, path, config, num_classes, averages)


def convert_source(source: Source,
                   path: str,
                   config: Config,
                   num_classes: int = 80,
                   averages: bool = True) -> dict:
    """Converts an opened source as :func:`convert_file` does.

    Args:
        source (Source): Is not changed.
        path (str): Of its file.
        config, num_classes, averages: As in ``convert_file``.
    """
    if num_classes not in (80, 90):
        raise ValueError(f'num_classes={num_classes} must be 80 or 90')
    if not str(config.get('model', {}).get('type')).endswith('EfficientDet'):
        raise ValueError(
            f'the config {config.filename} is of no EfficientDet; take '
            'configs/efficientdet/efficientdet_<size>_8xb16-300e_coco.py, or '
            'one of yours that is based on it')
    config = copy.deepcopy(config)
    config.model.backbone.init_cfg = None
    meta = source.meta
    if source.ratio_major:
        # (width, height) of MMDetection's ratios 1, 0.5 and 2
        pairs = [(1.0, 1.0), (sqrt(2), sqrt(0.5)), (sqrt(0.5), sqrt(2))]
        meta = dict(meta, aspect_pairs=pairs)
    adopt_conventions(config, meta)
    model = build_on_meta(config)
    state_dict, receipt = _convert(source, model, config, averages)
    origin = dict(file=Path(path).name, sha256=source.sha256, receipt=receipt)
    if _BIAS not in state_dict:
        return dict(
            meta=dict(source=origin),
            state_dict={
                key.removeprefix('backbone.'): value
                for key, value in state_dict.items()
            })
    state_dict, names, lines = _settle_classes(state_dict,
                                               model.bbox_head.num_base_priors,
                                               path, class_names(meta), config,
                                               num_classes)
    if isinstance(meta.get('source'), dict):
        origin = meta['source']  # a file of ours stays what it is
    config.model.bbox_head.num_classes = len(names)
    new = dict(
        cfg=config.pretty_text,
        dataset_meta=dict(classes=names),
        source=dict(origin, receipt=[*origin['receipt'], *lines]),
        **conventions(config.model))
    if isinstance(meta.get('published'), dict):
        new['published'] = meta['published']
    return dict(meta=new, state_dict=state_dict)


def _settle_classes(
        state_dict: Dict[str, Tensor], num_anchors: int, path: str,
        known: List[str], config: Config,
        num_classes: int) -> Tuple[Dict[str, Tensor], List[str], List[str]]:
    """The state dict for the classes that are wanted, their names, a receipt.

    Args:
        state_dict (dict): Ours, with a head of the source's classes.
        num_anchors (int): At each place.
        path (str): Of the source, for messages.
        known (list[str]): The names that the source tells, if any.
        config (Config): Whose data name the classes otherwise.
        num_classes (int): As in :func:`convert_file`.
    """
    given, rest = divmod(len(state_dict[_BIAS]), num_anchors)
    if rest:
        raise ValueError(f'{path} has {len(state_dict[_BIAS])} outputs of '
                         f'classes, not a multiple of {num_anchors} anchors')
    lines = [] if known else [
        'class names: of the config, since the file has none'
    ]
    names = known or _names_for(given, config)
    coco = list(CocoDataset.METAINFO['classes'])
    is_coco = set(coco) <= set(names)
    if given == 90 and num_classes == 80 and is_coco:
        state_dict = select_coco_classes(state_dict, num_anchors)
        lines.append('classes: 80 of 90 slots, bit for bit')
        given, names = 80, coco
    elif given == 80 and num_classes == 90 and is_coco:
        raise ValueError(f"{path} predicts COCO's 80 classes, of which the 90 "
                         'slots cannot be made')
    if len(names) != given:
        raise ValueError(
            f'{path} predicts {given} classes, whose names have to come from '
            f'the config, which has {len(names)}: scale_config(_base_, '
            "'<size>', classes=['<name>', ...])")
    return state_dict, names, lines


def select_coco_classes(state_dict: Dict[str, Tensor],
                        num_anchors: int = 9) -> Dict[str, Tensor]:
    """Keeps the 80 used of the 90 slots of a COCO head.

    Slot ``c`` is category id ``c + 1``; what is kept is bit for bit the same.
    """
    ids = [i for i in range(1, 91) if i not in UNUSED_IDS]
    rows = torch.tensor(ids) - 1
    return {
        key:
        value.unflatten(0, (num_anchors, 90))[:, rows].flatten(0, 1)
        if key.startswith(CLASS_PREDICTOR) else value
        for key, value in state_dict.items()
    }


def _names_for(num_classes: int, config: Config) -> List[str]:
    """Names from the config's data, or of COCO."""
    coco = list(CocoDataset.METAINFO['classes'])
    dataset = config.get('test_dataloader', {}).get('dataset', {})
    names = list(dataset.get('metainfo', {}).get('classes', coco))
    if num_classes not in (80, 90) or len(names) == num_classes:
        return names
    if num_classes == 80:
        return coco
    return [
        f'unused {i}' if i in UNUSED_IDS else coco.pop(0)
        for i in range(1, 91)
    ]


def build_on_meta(config: Config) -> nn.Module:
    """The model of a config without memory for its weights."""
    scope = DefaultScope.overwrite_default_scope('mmdet_efficientdet')
    with scope, torch.device('meta'):
        return MODELS.build(config.model)


def outline(model: nn.Module) -> Tuple[Dict[str, Tuple], str, int]:
    """Shapes, architecture and number of levels."""
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    return shapes, model.backbone.arch, model.bbox_head.num_levels


def _convert(source: Source, model: nn.Module, config: Config,
             averages: bool) -> Tuple[Dict[str, Tensor], List[str]]:
    """Our state dict and a receipt, or an error that names the right size."""
    shapes, *numbers = outline(model)
    try:
        found = match(source.tensors, shapes, *numbers, averages)
        error = found.error
    except ValueError as unknown:
        error = str(unknown)
    sizes = _fitting_sizes(source, config, averages) if error else []
    if sizes:
        error = f'The weights are of {" or ".join(sizes)}; give the config ' \
            f'of that size. With this one: {error}'
    if error:
        raise ValueError(error)
    state_dict, receipt = fill(found, shapes,
                               source.ratio_major), found.receipt
    if source.ratio_major:
        receipt.append("anchors: order and aspect pairs of MMDetection's")
    twins = [
        size for size, row in SCALING.items()
        if (row.backbone, row.bifpn_channels) == (model.backbone.arch,
                                                  model.neck.out_channels)
    ]
    if len(twins) > 1 and _BIAS in state_dict:
        scale = config.model.bbox_head.anchor_generator.octave_base_scale
        receipt.append(
            f'size: {" and ".join(twins)} have the same tensors; whether the '
            f'anchor scale of the config, {scale}, is right cannot be seen')
    return state_dict, receipt


def _fitting_sizes(source: Source, config: Config,
                   averages: bool) -> List[str]:
    """The sizes that the weights do fit; for a backbone its architecture."""
    sizes = []
    for size in SCALING:
        other = copy.deepcopy(config)
        scale_config(other, size)
        try:
            found = match(source.tensors, *outline(build_on_meta(other)),
                          averages)
        except ValueError:
            continue
        if not found.error:
            sizes.append(size)
    return sizes


def save(checkpoint: dict, path: str) -> None:
    """Writes a checkpoint at once or not at all, the same bytes each time.

    Raises:
        ValueError: If it cannot be written; no part of it is left.
    """
    target = Path(os.path.realpath(path))
    try:
        if not target.parent.is_dir():
            raise OSError('its folder does not exist')
        if target.exists() and not target.is_file():
            raise OSError('it exists and is no file')
        if target.is_file() and not target.stat().st_mode & 0o222:
            raise PermissionError('the file is read-only')
        # torch writes the name of a path into the file, but not of a stream.
        write_file(target, partial(torch.save, checkpoint))
    except (OSError, RuntimeError) as error:  # torch's, on a full disk
        raise ValueError(f'cannot write {path}: {error}') from error
