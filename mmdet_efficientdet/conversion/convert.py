"""Turns files of published weights into checkpoints of ours."""
import copy
import os
from contextlib import suppress
from math import sqrt
from pathlib import Path
from typing import Dict, List, Tuple

import torch
from mmdet.datasets import CocoDataset
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from ..hooks import PLACES, conventions
from ..models.efficientdet import CLASS_PREDICTOR
from ..scaling import SCALING, scale_config
from ..utils import register_all_modules
from .sources import Source, class_names, open_source
from .tensors import UNUSED_IDS, convert, match, select_coco_classes

_BIAS = f'{CLASS_PREDICTOR}.bias'


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
    if num_classes not in (80, 90):
        raise ValueError(f'num_classes={num_classes} must be 80 or 90')
    if not str(config.get('model', {}).get('type')).endswith('EfficientDet'):
        raise ValueError(
            f'the config {config.filename} is of no EfficientDet; take '
            'configs/efficientdet/efficientdet_<size>_8xb16-300e_coco.py, or '
            'one of yours that is based on it')
    register_all_modules(init_default_scope=False)
    config = copy.deepcopy(config)
    config.model.backbone.init_cfg = None
    with open_source(path) as source:
        if source.ratio_major:
            # (width, height) of MMDetection's ratios 1, 0.5 and 2
            source.meta = dict(
                source.meta,
                aspect_pairs=[(1.0, 1.0), (sqrt(2), sqrt(0.5)),
                              (sqrt(0.5), sqrt(2))])
        adopt_conventions(config,
                          dict(conventions(config.model), **source.meta))
        model = _build(config)
        state_dict, receipt = _convert(source, model, config, averages)
    origin = dict(file=Path(path).name, sha256=source.sha256, receipt=receipt)
    if _BIAS not in state_dict:
        return dict(
            meta=dict(source=origin),
            state_dict={
                key[len('backbone.'):]: value
                for key, value in state_dict.items()
            })
    num_anchors = model.bbox_head.num_base_priors
    given, rest = divmod(len(state_dict[_BIAS]), num_anchors)
    if rest:
        raise ValueError(f'{path} has {len(state_dict[_BIAS])} outputs of '
                         f'classes, not a multiple of {num_anchors} anchors')
    # A file of ours stays what it is, with its origin.
    kept = {
        key: source.meta[key]
        for key in ('source', 'published')
        if isinstance(source.meta.get(key), dict)
    }
    origin = kept.get('source', origin)
    if not class_names(source.meta):
        receipt.append('class names: of the config, since the file has none')
    names = _class_names(given, class_names(source.meta), config)
    is_coco = set(CocoDataset.METAINFO['classes']) <= set(names)
    if given == 90 and num_classes == 80 and is_coco:
        state_dict = select_coco_classes(state_dict, num_anchors)
        origin = dict(
            origin,
            receipt=[
                *origin['receipt'], 'classes: 80 of 90 slots, bit for bit'
            ])
        given, names = 80, list(CocoDataset.METAINFO['classes'])
    elif given == 80 and num_classes == 90 and is_coco:
        raise ValueError(f"{path} predicts COCO's 80 classes, of which the 90 "
                         'slots cannot be made')
    if len(names) != given:
        raise ValueError(
            f'{path} predicts {given} classes, whose names have to come from '
            f'the config, which has {len(names)}: scale_config(_base_, '
            "'<size>', classes=['<name>', ...])")
    config.model.bbox_head.num_classes = given
    meta = dict(
        cfg=config.pretty_text,
        dataset_meta=dict(classes=names),
        source=origin,
        **conventions(config.model))
    if 'published' in kept:
        meta['published'] = kept['published']
    return dict(meta=meta, state_dict=state_dict)


def adopt_conventions(config: Config, meta: dict) -> None:
    """Sets in a config what a checkpoint of ours tells of itself.

    Args:
        config (Config): Is changed.
        meta (dict): With any of ``conventions``, as ``convert_file`` writes
            them.
    """
    now = conventions(config.model)
    given = {key: meta[key] for key in PLACES if key in meta}
    for key, value in given.items():
        if key == 'aspect_pairs':  # as shipped, so that texts are equal
            value = [tuple(pair) for pair in value]
        elif value == now[key]:
            continue
        config.merge_from_dict({f'model.{PLACES[key]}': value})


def _build(config: Config) -> nn.Module:
    """The model without memory for its weights."""
    scope = DefaultScope.overwrite_default_scope('mmdet_efficientdet')
    with scope, torch.device('meta'):
        return MODELS.build(config.model)


def _outline(model: nn.Module) -> Tuple[Dict[str, Tuple], str, int]:
    """Shapes, architecture and number of levels."""
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    return shapes, model.backbone.arch, model.bbox_head.num_levels


def _convert(source: Source, model: nn.Module, config: Config,
             averages: bool) -> Tuple[Dict[str, Tensor], List[str]]:
    """Our state dict and a receipt, or an error that names the right size."""
    outline = _outline(model)
    try:
        error = match(source.tensors, *outline).error
    except ValueError as unknown:
        error = str(unknown)
    sizes = _fitting_sizes(source, config) if error else []
    if sizes:
        error = f'The weights are of {" or ".join(sizes)}; give the config ' \
            f'of that size. With this one: {error}'
    if error:
        raise ValueError(error)
    state_dict, receipt = convert(source.tensors, *outline, averages,
                                  source.ratio_major)
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


def _fitting_sizes(source: Source, config: Config) -> List[str]:
    """The sizes that the weights do fit; for a backbone its architecture."""
    sizes = []
    for size in SCALING:
        other = copy.deepcopy(config)
        scale_config(other, size)
        try:
            found = match(source.tensors, *_outline(_build(other)))
        except ValueError:
            continue
        if not found.error:
            sizes.append(size)
    return sizes


def _class_names(num_classes: int, given: List[str],
                 config: Config) -> List[str]:
    """Names from the file, from the config's data, or of COCO."""
    if given:
        return given
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


def save(checkpoint: dict, path: str) -> None:
    """Writes a checkpoint at once or not at all, the same bytes each time.

    Raises:
        ValueError: If it cannot be written; no part of it is left.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f'.{target.name}.{os.getpid()}')
    try:
        if target.exists() and not target.is_file():
            raise OSError('it exists and is no file')
        if target.is_file() and not target.stat().st_mode & 0o222:
            raise PermissionError('the file is read-only')
        with temporary.open('wb') as file:  # a path would get into the file
            torch.save(checkpoint, file)
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:  # torch's, on a full disk
        raise ValueError(f'cannot write {path}: {error}') from error
    finally:
        with suppress(OSError):  # nothing was made where nothing can be
            temporary.unlink()
