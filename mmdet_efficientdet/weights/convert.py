"""Converts files of published weights to checkpoints of our model."""
import copy
import os
from functools import partial
from pathlib import Path
from typing import Dict, List, Tuple

import torch
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from ..models.efficientdet import CLASS_PREDICTOR
from ..registry import MODELS
from ..scaling import BACKBONES, SCALING, scale_config
from ..utils import write_file
from .conventions import adopt_conventions, class_names, conventions, origin_of
from .layouts import Layout
from .matching import match
from .sources import Source, open_source

_BIAS = f'{CLASS_PREDICTOR}.bias'
COCO = list(CocoDataset.METAINFO['classes'])
# The official heads have a slot for each category id from 1. No object of COCO
# has one of these ids.
SLOTS = COCO[:]
for _id in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83):
    SLOTS.insert(_id - 1, f'unused {_id}')
_COUNTS = NUM_CLASSES, NUM_SLOTS = len(COCO), len(SLOTS)  # 80 and 90


def convert_file(path: str,
                 config: Config,
                 num_classes: int = NUM_CLASSES,
                 averages: bool = True) -> dict:
    """Converts a file of published weights to a checkpoint of our model.

    Args:
        path (str): The file, in any format that ``open_source`` reads and
            any layout of ``LAYOUTS`` or ``BACKBONES``.
        config (Config): Config of the size; it is not changed.
        num_classes (int): For a head with COCO's 90 slots: 80 keeps those of
            the classes, 90 keeps all. Other heads keep their classes.
            Defaults to 80.
        averages (bool): Whether to prefer moving averages of the weights.
            Defaults to True.

    Returns:
        dict: ``state_dict`` and ``meta``, of plain types and tensors only.
        ``meta`` has ``cfg`` (text of the config), ``dataset_meta`` (class
        names), ``source`` (``file``, ``sha256``, and ``receipt``, a list of
        lines) and the conventions of the config or, for a checkpoint of this
        package, its own. For a backbone alone, the state dict is that of
        ``EfficientNet``, to be used as ``init_cfg=dict(type='Pretrained',
        checkpoint=...)``, and ``meta`` has only ``source``.

    Raises:
        ValueError: If the file cannot be read or does not fit the config. If
            it fits another size, the message names that size.
    """
    if num_classes not in _COUNTS:
        raise ValueError(f'num_classes={num_classes} must be in {_COUNTS}')
    return convert(open_source(path), config, num_classes, averages)


def convert(source: Source,
            config: Config,
            num_classes: int = NUM_CLASSES,
            averages: bool = True) -> dict:
    """As :func:`convert_file`, for what has been read of a file."""
    meta = source.meta
    names, kept = class_names(meta), origin_of(meta)
    config, model = adapt(config, meta)
    state_dict, receipt = _rename(source, model, config, averages)
    path = Path(source.path)
    if path.suffix in ('.h5', '.safetensors'):
        receipt.append('damage: this format has no checksums; compare the '
                       'SHA-256')
    origin = dict(file=path.name, sha256=source.sha256, receipt=receipt)
    if _BIAS not in state_dict:
        backbone = {
            key.removeprefix('backbone.'): value
            for key, value in state_dict.items()
        }
        return dict(meta=dict(source=origin), state_dict=backbone)
    origin = kept or origin  # a converted file keeps its origin
    num_anchors = model.bbox_head.num_base_priors
    given = len(state_dict[_BIAS]) / num_anchors
    if not names:
        names = _names_for(given, config)
        origin['receipt'].append('class names: of the config, since the file '
                                 'has none')
    if len(names) != given:
        raise ValueError(
            f'{path} predicts {given:g} classes, whose names must come from '
            f'the config, which has {len(names)}: scale_config(_base_, '
            "'<size>', classes=['<name>', ...])")
    if {*COCO} <= {*names} and {num_classes, len(names)} == {*_COUNTS}:
        if num_classes == NUM_SLOTS:
            raise ValueError(
                f"{path} predicts COCO's {len(names)} classes, from which the "
                f'{num_classes} slots cannot be made')
        origin['receipt'].append(f'classes: {num_classes} of {len(names)} '
                                 'slots, bit-identical')
        state_dict = select_coco_classes(state_dict, num_anchors)
        names = COCO[:]
    config.model.bbox_head.num_classes = len(names)
    new = dict(
        cfg=config.pretty_text,
        dataset_meta=dict(classes=names),
        source=origin,
        **conventions(config.model))
    if isinstance(meta.get('published'), dict):
        new['published'] = meta['published']
    return dict(meta=new, state_dict=state_dict)


def adapt(config: Config, meta: dict) -> Tuple[Config, nn.Module]:
    """A copy of a config for weights that exist, and its model.

    Args:
        config (Config): Config of a detector; it is not changed.
        meta (dict): Of the checkpoint, whose conventions the copy gets.

    Returns:
        tuple: The copy, and the model without memory for its weights.

    Raises:
        ValueError: If the config is not of an EfficientDet, or a convention
            is not allowed.
    """
    if not str(config.get('model', {}).get('type')).endswith('EfficientDet'):
        raise ValueError(
            f'the config {config.filename} is not of an EfficientDet; use '
            'configs/efficientdet/efficientdet_<size>_8xb16-300e_coco.py, or '
            'your own config based on it')
    config = copy.deepcopy(config)
    config.model.backbone.init_cfg = None
    adopt_conventions(config, meta)
    return config, build_on_meta(config)


def build_on_meta(config: Config) -> nn.Module:
    """The model of a config, without memory for its weights."""
    scope = DefaultScope.overwrite_default_scope('mmdet_efficientdet')
    with scope, torch.device('meta'):
        return MODELS.build(config.model)


def _rename(source: Source, model: nn.Module, config: Config,
            averages: bool) -> Tuple[Dict[str, Tensor], List[str]]:
    """Our state dict and a receipt, or an error that names the right size."""
    found = match(source.tensors, *model_signature(model), averages)
    if found.error:
        sizes = _fitting_sizes(source, found.layout, config, averages)
        raise ValueError(
            f'The weights are of {" or ".join(sizes)}; give the config of '
            f'that size. With this one: {found.error}' if sizes else found.
            error)
    state_dict = found.state_dict(source.ratio_major)
    if source.ratio_major:
        found.receipt.append(
            "anchors: order and aspect pairs of MMDetection's")
    twins = [
        size for size, row in SCALING.items()
        if (row.backbone, row.bifpn_channels) == (model.backbone.arch,
                                                  model.neck.out_channels)
    ]
    if len(twins) > 1 and _BIAS in state_dict:
        scale = config.model.bbox_head.anchor_generator.octave_base_scale
        found.receipt.append(
            f'size: {" and ".join(twins)} have the same tensors; check that '
            f'the anchor scale of the config, {scale}, is right')
    return state_dict, found.receipt


def _fitting_sizes(source: Source, layout: Layout, config: Config,
                   averages: bool) -> List[str]:
    """The sizes whose model, or backbone, the weights fit."""
    sizes = []
    sides = {n for x in source.tensors.values() for n in x.shape}
    for size, row in SCALING.items():
        if not sides.issuperset(BACKBONES[row.backbone][0]):
            continue  # spares building most of the models
        other = copy.deepcopy(config)
        scale_config(other, size)
        signature = model_signature(build_on_meta(other))
        if not match(source.tensors, *signature, averages, layout).error:
            sizes.append(size)
    return sizes


def model_signature(model: nn.Module) -> Tuple[Dict[str, Tuple], str, int]:
    """Shapes by name, architecture of the backbone and number of levels."""
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    return shapes, model.backbone.arch, model.bbox_head.num_levels


def _names_for(num_classes: float, config: Config) -> List[str]:
    """The class names of the config's data or of COCO."""
    dataset = config.get('test_dataloader', {}).get('dataset', {})
    names = dataset.get('metainfo', {}).get('classes', COCO)
    if len(names) != num_classes:
        names = dict(zip(_COUNTS, (COCO, SLOTS))).get(num_classes, names)
    return list(names)


def select_coco_classes(state_dict: Dict[str, Tensor],
                        num_anchors: int) -> Dict[str, Tensor]:
    """Keeps the 80 used of the 90 slots of a COCO head, bit-identical.

    Slot ``c`` belongs to category id ``c + 1``.
    """
    rows = [SLOTS.index(name) for name in COCO]
    return {
        key:
        value.unflatten(0, (num_anchors, NUM_SLOTS))[:, rows].flatten(0, 1)
        if key.startswith(CLASS_PREDICTOR) else value
        for key, value in state_dict.items()
    }


def save(checkpoint: dict, path: str) -> None:
    """Writes a checkpoint completely or not at all, reproducibly.

    Raises:
        ValueError: If it cannot be written. No part of it is left.
    """
    target = Path(os.path.realpath(path))
    try:
        if not target.parent.is_dir():
            raise OSError('its folder does not exist')
        if target.exists() and not target.is_file():
            raise OSError('it exists and is not a file')
        if target.is_file() and not target.stat().st_mode & 0o222:
            raise PermissionError('the file is read-only')
        # torch writes the name of a path into the file, but not of a stream.
        write_file(target, partial(torch.save, checkpoint))
    except (OSError, RuntimeError) as error:  # torch's, on a full disk
        raise ValueError(f'cannot write {path}: {error}') from error
