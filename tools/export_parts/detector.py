"""The detector that is exported, and the settings of its input."""
from pathlib import Path
from typing import Optional, Sequence, Tuple

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmdet_efficientdet.deploy.settings import DetectorSettings
from mmdet_efficientdet.models.anchors import AnchorGenerator
from mmdet_efficientdet.registry import MODELS, TASK_UTILS
from mmdet_efficientdet.scaling import MIN_SIDE, SCALING
from mmdet_efficientdet.utils import plain_data, printable
from mmdet_efficientdet.weights.conventions import (check_unique, class_names,
                                                    differing_options,
                                                    read_conventions)
from mmdet_efficientdet.weights.published import find
from mmdet_efficientdet.weights.schemes import load_entry
from mmdet_efficientdet.weights.sources import open_source

from .support import CUSTOM


def check_model(config: Config) -> None:
    """Refuses what runtimes would not compute as the config says.

    Raises:
        ValueError: If the model is no EfficientDet, or its input is not RGB
            with a mean and a deviation.
    """
    model = config.get('model', {})
    head = model.get('bbox_head') or {}
    if not str(model.get('type')).endswith('EfficientDet') or not (
        {'backbone', 'neck', 'data_preprocessor'} <= model.keys()
            and head.get('anchor_generator')):
        raise ValueError(
            f'the model of the config is {model.get("type")}, but only an '
            'EfficientDet with backbone, neck, bbox_head.anchor_generator and '
            'data_preprocessor can be exported')
    preprocessor = model.data_preprocessor
    for name in ('mean', 'std'):
        if len(preprocessor.get(name) or ()) != 3:
            raise ValueError(
                f'data_preprocessor.{name} is {preprocessor.get(name)}, but '
                'must be three numbers; [0, 0, 0] and [1, 1, 1] do not '
                'normalize')
    if not preprocessor.get('bgr_to_rgb', False):
        raise ValueError('data_preprocessor.bgr_to_rgb is False, but exported '
                         'files take RGB images; use bgr_to_rgb=True')


def anchor_generator(config: Config) -> AnchorGenerator:
    """The anchor generator of a config.

    Raises:
        ValueError: If it is another class, whose arguments the readers of
            :class:`DetectorSettings` do not know.
    """
    init_default_scope('mmdet')
    generator = TASK_UTILS.build(config.model.bbox_head.anchor_generator)
    if type(generator) is not AnchorGenerator:
        raise ValueError(
            f'bbox_head.anchor_generator is {type(generator)}, but only '
            'mmdet_efficientdet.AnchorGenerator can be exported')
    return generator


def size_of(config: Config) -> str:
    """The size of a config's model, a key of ``SCALING``, or 'custom'."""
    model = config.model
    scale = anchor_generator(config).octave_base_scale
    for name, row in SCALING.items():
        if (row.backbone, row.bifpn_channels, row.bifpn_layers,
                row.head_layers, row.num_levels,
                row.anchor_scale) == (model.backbone.get('arch'),
                                      model.neck.out_channels,
                                      model.neck.stack_times,
                                      model.bbox_head.stacked_convs,
                                      model.bbox_head.num_levels, scale):
            return name
    return CUSTOM


def load(config: Config, checkpoint: str, classes: Optional[Sequence[str]]):
    """The detector in evaluation mode, with the names of its classes.

    Args:
        config (Config): Of an EfficientDet.
        checkpoint (str): A file or a name such as
            effdet://tf_efficientdet_d0. Only its tensors and plain data are
            read, and nothing but the published names is downloaded.
        classes (Sequence[str], optional): Names to use instead of those in
            the checkpoint.

    Returns:
        tuple: The detector, the names, and the SHA-256 of the file.

    Raises:
        ValueError: If one of both cannot be read, they do not fit, or the
            checkpoint was trained with other settings than the config's.
    """
    init_default_scope('mmdet')
    if '://' in checkpoint:
        data = load_entry(find(checkpoint))  # refuses all other addresses
        digest, meta = data['meta']['source']['sha256'], data['meta']
    elif not Path(checkpoint).is_file():
        raise ValueError(f'the checkpoint {checkpoint} does not exist')
    else:
        source = open_source(checkpoint)
        data, digest, meta = source.checkpoint, source.sha256, source.meta
    read_conventions(meta)
    options = differing_options(meta, config.model)
    if options:
        raise ValueError(
            'the checkpoint was trained with other settings than those of '
            f'the config; write into the config: {" ".join(options)}')
    config.model.backbone.init_cfg = None
    detector = MODELS.build(config.model).eval()
    detector.load_state_dict(data.get('state_dict', data))
    names = check_names(
        classes or class_names(meta), detector.bbox_head.cls_out_channels)
    return detector, names, digest


def check_names(names: Optional[Sequence[str]], number: int) -> list:
    """Class names that a labels file can hold, one a line.

    Raises:
        ValueError: If they are no such names, or not as many as outputs.
    """
    if not names or len(names) != number:
        raise ValueError(f'the head has {number} classes, and the checkpoint '
                         f'names {len(names or ())}; train it with '
                         'classes=[...] in its config, or give --classes')
    check_unique(names)
    for name in names:
        if not isinstance(name, str) or not name.strip() \
                or not name.isprintable() or name != name.strip():
            raise ValueError(
                f'the class name {printable(repr(name))} cannot be a line of '
                'a labels file: it must have visible characters, none of them '
                'a line break or control, and no space at its ends; rename it '
                'with --classes')
    return list(names)


def input_settings(config: Config, names: Sequence[str], resize: str,
                   image_size: Optional[Sequence[int]]) -> DetectorSettings:
    """What runtimes need to know.

    Args:
        config (Config): Of the detector.
        names (Sequence[str]): Of the classes.
        resize (str): 'pad' or 'stretch'.
        image_size (Sequence[int], optional): Height and width. Defaults to
            the config's ``pad_size_divisor``.

    Raises:
        ValueError: If no size is known, it is too small, or the padding is
            not the mean color.
    """
    preprocessor = config.model.data_preprocessor
    size = image_size or preprocessor.get('pad_size_divisor', 1)
    size = [size] * 2 if isinstance(size, int) else list(size)
    if min(size) < MIN_SIDE or len(size) != 2:
        raise ValueError(f'the input of {size} pixels cannot be exported; '
                         f'give --size HEIGHT WIDTH of at least {MIN_SIDE}')
    padding = preprocessor.get('pad_value', 0)
    if resize == 'pad' and padding:
        raise ValueError(
            f'data_preprocessor.pad_value is {padding}, but exported files '
            'are padded with the mean color, which is 0; use --resize stretch')
    return DetectorSettings(size, list(preprocessor.mean),
                            list(preprocessor.std), names, resize,
                            plain_data(vars(anchor_generator(config))))


def anchors_of(detector, network, image_size: Tuple[int, int]) -> torch.Tensor:
    """The anchors ``(A, 4)`` of a size, xyxy in pixels of the input."""
    maps, _ = network(torch.zeros(1, 3, *image_size))
    return torch.cat(
        detector.bbox_head.prior_generator.grid_priors(
            [x.shape[-2:] for x in maps], tuple(image_size)))
