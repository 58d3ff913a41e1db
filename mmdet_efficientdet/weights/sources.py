"""Reads files of weights in any known format; no code in them is executed."""
import dataclasses
import gzip
import hashlib
import re
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass, field
from math import sqrt
from os.path import normpath
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Tuple

import torch
from safetensors import safe_open
from torch import Tensor

from ..utils import printable, reading, shown
from .conventions import meta_of
from .tensorflow import EMA_SUFFIX, check_size, read_bundle, read_keras

# The end of the name of a part of a TensorFlow checkpoint.
PART = re.compile(r'\.(index|meta|data-\d{5}-of-\d{5})$')
_ADVICE = ('. Code in a file is never executed. If you trained the weights '
           "yourself, save plain data: their state_dict, and 'cfg' and "
           "'dataset_meta' of the meta")


@dataclass
class Source:
    """The tensors of a file and what else it contains.

    Args:
        tensors (Mapping): Name to tensor; arrays become tensors.
        meta (dict): The ``meta`` of a checkpoint of MMDetection.
        ratio_major (bool): Whether its anchors are in the order of
            MMDetection's generator. The meta then has their aspect pairs.
        checkpoint (dict): Everything in a torch file.
        path (str): As it was given.
        sha256 (str): Of the file, or of all files of a checkpoint.
    """
    tensors: Mapping[str, Tensor]
    meta: dict = field(default_factory=dict)
    ratio_major: bool = False
    checkpoint: dict = field(default_factory=dict)
    path: str = ''
    sha256: str = ''

    def __post_init__(self) -> None:
        """Refuses names that would control the terminal they are shown in."""
        for name in self.tensors:
            if not name.isprintable():
                raise ValueError(f'the file holds a tensor named {shown(name)}'
                                 ', which has control characters')
        self.tensors = {
            name: torch.as_tensor(value)
            for name, value in self.tensors.items()
        }


def open_source(path: str) -> Source:
    """Reads a file of weights in any known format.

    Args:
        path (str): A torch file, safetensors, a Keras ``.h5``, or a
            TensorFlow checkpoint: its prefix, one of its files, its folder or
            an archive of its folder.

    Raises:
        ValueError: If the file is missing, empty, damaged, in no known format
            or contains more than data.
    """
    file, prefix = Path(path), Path(PART.sub('', str(path)))
    if Path(f'{prefix}.index').is_file() or not file.is_file():
        prefix = _find_prefix(prefix)
        digest = sha256_of(*_files(prefix))
        source = Source(read_bundle(str(prefix)))
    else:
        digest = sha256_of(file)
        check_integrity(file)
        source = _reader_of(file)(str(path))
    return dataclasses.replace(source, path=str(path), sha256=digest)


def _reader_of(file: Path) -> Callable[[str], Source]:
    """The function that reads a file, chosen by its first bytes."""
    with file.open('rb') as opened:
        start = opened.read(512)
    if not start:
        raise ValueError(f'{file} is empty')
    for pattern, reader in _READERS.items():
        if re.match(pattern, start, re.DOTALL):
            return reader
    kind = 'a web page, not weights' if b'<' in start.lstrip()[:1] else \
        'in no known format'
    raise ValueError(
        f'{file} is {kind}. Known formats are torch files, safetensors, Keras '
        '.h5 and TensorFlow checkpoints')


def check_integrity(path: Path) -> None:
    """Compares the checksums in gzip archives and zip files.

    Neither torch nor tarfile does. Torch files are zip files, except those of
    torch < 1.6, which have no checksum.

    Raises:
        ValueError: If the contents are not those that were written.
    """
    if not path.is_file():
        return
    with reading(path), path.open('rb') as opened:
        start = opened.read(4)
        opened.seek(0)
        if start[:2] == b'\x1f\x8b':
            with gzip.open(opened) as file:
                while file.read(1 << 20):
                    check_size('its contents', file.tell(), path)
        elif start == b'PK\x03\x04':
            with zipfile.ZipFile(opened) as file:
                size = sum(entry.file_size for entry in file.infolist())
                check_size('its contents', size, path)
                damaged = file.testzip()
            if damaged:
                raise ValueError(f'the checksum of {damaged!r} differs')


def sha256_of(*paths: Path) -> str:
    """The SHA-256 of files one after the other."""
    digest = hashlib.sha256()
    check_size(str(paths[0]), sum(path.stat().st_size for path in paths))
    for path in paths:
        with path.open('rb') as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _find_prefix(source: Path) -> Path:
    """The checkpoint at a prefix, or the only one below a folder."""
    if Path(f'{source}.index').is_file():
        return source
    if not source.is_dir():
        raise ValueError(f'{source} does not exist, nor does {source}.index')
    found = sorted(path.with_suffix('') for path in source.rglob('*.index'))
    if len(found) != 1:
        names = [str(path.relative_to(source)) for path in found]
        raise ValueError(f'{source} holds {len(found)} TensorFlow checkpoints '
                         f'{names}; give the prefix of one')
    return found[0]


def _files(prefix: Path) -> List[Path]:
    """The index and the data files of one checkpoint."""
    return sorted(path for path in prefix.parent.iterdir()
                  if path.suffix != '.meta'
                  and PART.sub('', path.name) == prefix.name != path.name)


def _read_archive(path: str) -> Source:
    """The tensors of a packed TensorFlow checkpoint."""
    # The tensors are mapped from files, whose contents stay on disk until the
    # tensors are gone, although the folder is deleted at once.
    with tempfile.TemporaryDirectory() as folder:
        with reading(path), tarfile.open(path) as archive:
            members = [
                member for member in archive
                if member.isfile() and PART.search(member.name)
                and not member.name.endswith('.meta')
            ]
            if not members:
                raise ValueError('it holds no TensorFlow checkpoint')
            names = {normpath(member.name) for member in members}
            if len(names) < len(members):
                raise ValueError('it holds files of one name')
            size = sum(member.size for member in members)
            check_size('its contents', size, path)
            # The filter refuses paths that lead out of the folder.
            archive.extractall(folder, members, filter='data')
        return Source(read_bundle(str(_find_prefix(Path(folder)))))


def _read_keras(path: str) -> Source:
    return Source(read_keras(path))


def _read_safetensors(path: str) -> Source:
    with reading(path), safe_open(path, framework='pt') as file:
        return Source({name: file.get_tensor(name) for name in file.keys()})


def _read_torch(path: str) -> Source:
    with reading(path, _ADVICE):
        data = torch.load(path, map_location='cpu', weights_only=True)
    if not isinstance(data, dict):
        raise ValueError(f'{path} holds {type(data).__name__}, not weights')
    tensors, size = {}, 0
    for suffix, state_dict in zip(('', EMA_SUFFIX), _state_dicts(data)):
        for key, value in state_dict.items():
            if not isinstance(key, str):
                raise ValueError(f'{path} holds no state dict: {key!r} is not '
                                 'the name of a tensor')
            if not isinstance(value, Tensor):
                continue
            if value.is_meta:
                raise ValueError(f'{path} holds no data of {printable(key)}')
            # A few numbers in the file may be repeated to any size.
            size += value.numel() * value.element_size()
            check_size(f'{path} up to {printable(key)}', size, path)
            key = key.removeprefix('module.') + suffix
            if key in tensors:
                raise ValueError(f'{path} holds {printable(key)} twice')
            tensors[key] = value
    if not tensors:
        raise ValueError(f'{path} holds no tensors')
    meta = meta_of(data)
    config = meta.get('cfg') if isinstance(meta.get('cfg'), str) else ''
    # What the project converted from TensorFlow has TensorFlow's anchors.
    ratio_major = 'EfficientDetSepBNHead' in config and 'YXYX' not in config
    if ratio_major:
        # (width, height) of its ratios 1, 0.5 and 2
        pairs = [(1.0, 1.0), (sqrt(2), sqrt(0.5)), (sqrt(0.5), sqrt(2))]
        meta = dict(meta, aspect_pairs=pairs)
    return Source(tensors, meta, ratio_major, data)


def _state_dicts(data: dict) -> Tuple[dict, dict]:
    """The weights in a torch file and their moving averages, if any."""
    candidates = (data.get('state_dict'), data.get('model'), data)
    weights = next(part for part in candidates if isinstance(part, dict))
    if isinstance(data.get('state_dict_ema'), dict):  # of timm and effdet
        return weights, data['state_dict_ema']
    if isinstance(data.get('ema_state_dict'), dict):
        # mmengine exchanges the two when it saves.
        raw = dict(data['ema_state_dict'])
        raw.pop('steps', None)
        return raw, weights
    return weights, {}


# Pattern of the first bytes, and the function that reads such files.
_READERS: Dict[bytes, Callable[[str], Source]] = {
    rb'\x1f\x8b|.{257}ustar': _read_archive,
    rb'\x89HDF\r\n\x1a\n': _read_keras,
    rb'.{7}\0\{': _read_safetensors,
    rb'PK\x03\x04|\x80': _read_torch
}
