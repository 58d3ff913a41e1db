"""Published weights by name, wherever mmengine takes a checkpoint.

``effdet://tf_efficientdet_d0`` or ``automl://efficientdet-d0`` is downloaded
to ``torch.hub.get_dir()/mmdet_efficientdet``, checked and converted to a
checkpoint for the 80 classes of COCO. ``published.yml`` lists all names.

With ``MMDET_EFFICIENTDET_WEIGHTS=/folder`` in the environment the files are
taken from that folder, and nothing is downloaded. A file may be pinned:
``automl://efficientdet-d2#sha256=<at least 8 digits>``.
"""
import difflib
import logging
import re
from dataclasses import dataclass, fields
from functools import lru_cache, reduce
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import numpy as np
import yaml
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.runner.checkpoint import CheckpointLoader

from .fetching import fetch
from .scaling import scale_config
from .utils import config_file


@dataclass(frozen=True)
class PublishedFile:
    """One file of ``published.yml``, where the fields are explained."""
    scheme: str
    name: str
    size: str
    file: str
    origin: str
    addresses: Tuple[str, ...]
    licence: str
    mean: list
    std: list
    aspect_pairs: list
    resize: str
    how_sure: Dict[str, str]
    pad_value: float = 0.0
    image_size: Optional[int] = None
    bytes: Optional[int] = None
    sha256: str = ''
    ap: Optional[float] = None
    test_dev: Optional[float] = None
    unusable: str = ''

    @property
    def path(self) -> str:
        """What is written into a config."""
        return f'{self.scheme}://{self.name}'

    @property
    def known_hash(self) -> str:
        """SHA-256, or the start of it that its name ends with, or ''."""
        short = re.search(r'-([0-9a-f]{8})\.pth$', self.file)
        return self.sha256 or (short.group(1) if short else '')

    @property
    def local_names(self) -> List[str]:
        """Where it may lie in a folder: at its path, or under its bare name.

        Of several files of one name only the first may lie under it.
        """
        name = Path(self.file).name
        owner = next(e for e in manifest().values()
                     if Path(e.file).name == name)
        names = [self.file, name] if owner == self else [self.file]
        return list(dict.fromkeys(names))


@lru_cache(maxsize=None)
def manifest() -> Dict[str, PublishedFile]:
    """All published files by ``scheme://name``."""
    text = Path(__file__).with_suffix('.yml').read_text()
    own = {field.name for field in fields(PublishedFile)}
    entries = [
        PublishedFile(
            name=name,
            **{key: group[key]
               for key in own & group.keys()},
            **file) for group in yaml.safe_load(text)
        for name, file in group['files'].items()
    ]
    return {entry.path: entry for entry in entries}


def find(path: str) -> Tuple[PublishedFile, str]:
    """The file that a path names, and the hash to which it is pinned.

    Raises:
        ValueError: If the name is unknown, or its file cannot be used; the
            message suggests the nearest names.
    """
    name, mark, pin = path.partition('#sha256=')
    if mark and not re.fullmatch('[0-9a-f]{8,64}', pin):
        raise ValueError(f'{path!r}: write 8 to 64 small hexadecimal digits '
                         'behind #sha256=')
    entries = manifest()
    if name not in entries:
        near = _nearest(name)
        raise ValueError(
            f'{name!r} is no published file that is known here. '
            f'{"Nearest are " + ", ".join(near) + ". " if near else ""}All '
            f'names stand in {Path(__file__).with_suffix(".yml")}')
    if entries[name].unusable:
        raise ValueError(f'{name} cannot be used: {entries[name].unusable}')
    return entries[name], pin


def _nearest(path: str) -> List[str]:
    """Names that differ little, in any scheme."""

    def letters(path: str) -> str:
        return re.sub('[^a-z0-9]', '', path.lower().partition('://')[2])

    entries = {entry: letters(entry) for entry in manifest()}
    near = difflib.get_close_matches(
        letters(path), set(entries.values()), 5, 0.7)
    return [
        entry for match in near for entry, name in entries.items()
        if name == match
    ]


def config_of(entry: PublishedFile) -> Config:
    """The shipped config of the size, changed to what this file wants."""
    config = Config.fromfile(config_file(entry.size))
    if entry.image_size:
        scale_config(config, entry.size, entry.image_size)
    config.merge_from_dict(_settings(entry))
    return config


def _settings(entry: PublishedFile) -> dict:
    """Values that depend on the file, under their names in a config."""
    preprocessor = 'model.data_preprocessor'
    settings = {
        f'{preprocessor}.mean': entry.mean,
        f'{preprocessor}.std': entry.std,
        'model.bbox_head.anchor_generator.aspect_pairs': entry.aspect_pairs
    }
    if entry.pad_value:
        settings[f'{preprocessor}.pad_value'] = entry.pad_value
    return settings


def _log_differences(entry: PublishedFile) -> None:
    """Names the settings that the shipped config of the size has not."""
    shipped = Config.fromfile(config_file(entry.size))
    options = []
    for key, value in _settings(entry).items():
        own = reduce(lambda node, part: node.get(part), key.split('.'),
                     shipped)
        if own is None or not np.array_equal(own, value):
            options.append(f"'{key}={value}'".replace(' ', ''))
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


@CheckpointLoader.register_scheme(prefixes=('effdet://', 'automl://'))
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
    from .conversion.convert import convert_file  # imports the models

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
    _log_differences(entry)
    return checkpoint
