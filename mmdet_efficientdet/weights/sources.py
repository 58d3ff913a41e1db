"""Reads files of weights in any known format; no code in them is executed."""
import gzip
import hashlib
import re
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from os.path import normpath
from pathlib import Path
from typing import Dict, List, Mapping, Sequence, Tuple

import torch
from torch import Tensor

from ..utils import import_package, printable, shorten, shown
from .tensorflow import EMA_SUFFIX, check_size, read_bundle, read_keras

# The end of the name of a part of a TensorFlow checkpoint.
PART = re.compile(r'\.(index|meta|data-\d{5}-of-\d{5})$')


@dataclass
class Source:
    """The tensors of a file and what else it contains.

    Args:
        tensors (Mapping): Name to tensor.
        sha256 (str): Of the file, or of all files of a checkpoint.
        meta (dict): The ``meta`` of a checkpoint of MMDetection.
        ratio_major (bool): Whether its anchors are in the order of
            MMDetection's generator.
        checkpoint (dict): Everything in a torch file.
    """
    tensors: Mapping
    sha256: str
    meta: dict = field(default_factory=dict)
    ratio_major: bool = False
    checkpoint: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses names that would control the terminal they are shown in."""
        for name in self.tensors:
            if not name.isprintable():
                raise ValueError(f'the file holds a tensor named {shown(name)}'
                                 ', which has control characters')


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
    source = Path(path)
    start = b''
    if source.is_file():
        with source.open('rb') as file:
            start = file.read(512)
        if not start:
            raise ValueError(f'{path} is empty')
        digest = sha256_of(source)
    check_integrity(source)
    prefix = Path(PART.sub('', str(path)))
    if not start or Path(f'{prefix}.index').is_file():
        prefix = _find_prefix(prefix)
        digest = sha256_of(*_files(prefix))
        return Source(read_bundle(str(prefix)), digest)
    if start[:2] == b'\x1f\x8b' or start[257:262] == b'ustar':
        tensors = _read_archive(source)
    elif start[:8] == b'\x89HDF\r\n\x1a\n':
        tensors = read_keras(str(path))
    elif start[8:9] == b'{' and start[7:8] == b'\0':
        tensors = _read_safetensors(path)
    elif start[:4] == b'PK\x03\x04' or start[:1] == b'\x80':
        return _read_torch(path, digest)
    else:
        kind = 'a web page, not weights' if b'<' in start.lstrip()[:1] else \
            'in no known format'
        raise ValueError(
            f'{path} is {kind}. Known formats are torch files, safetensors, '
            'Keras .h5 and TensorFlow checkpoints')
    return Source(tensors, digest)


def check_integrity(path: Path) -> None:
    """Compares the checksums in gzip archives and zip files.

    Neither torch nor tarfile does. Torch files are zip files, except those of
    torch < 1.6, which have no checksum.

    Raises:
        ValueError: If the contents are not those that were written.
    """
    if not path.is_file():
        return
    with path.open('rb') as file:
        start = file.read(4)
    try:
        if start[:2] == b'\x1f\x8b':
            with gzip.open(path) as file:
                while file.read(1 << 20):
                    check_size('its contents', file.tell(), path)
        elif start == b'PK\x03\x04':
            with zipfile.ZipFile(path) as file:
                size = sum(entry.file_size for entry in file.infolist())
                check_size('its contents', size, path)
                damaged = file.testzip()
            if damaged:
                raise ValueError(f'the checksum of {damaged!r} differs')
    except Exception as error:  # gzip, zlib and zipfile raise their own
        raise ValueError(f'{path} is damaged or cut off: '
                         f'{printable(str(error))}') from error


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


def _read_archive(source: Path) -> Mapping:
    """The tensors of a packed TensorFlow checkpoint."""
    # The tensors are mapped from files, whose contents stay on disk until the
    # tensors are gone, although the folder is deleted at once.
    with tempfile.TemporaryDirectory() as folder:
        try:
            with tarfile.open(source) as archive:
                members = [
                    member for member in archive
                    if member.isfile() and PART.search(member.name)
                    and not member.name.endswith('.meta')
                ]
                if not members:
                    raise ValueError(
                        f'{source} holds no TensorFlow checkpoint')
                names = {normpath(member.name) for member in members}
                if len(names) < len(members):
                    raise ValueError(f'{source} holds files of one name')
                size = sum(member.size for member in members)
                check_size(str(source), size, source)
                # The filter refuses paths that lead out of the folder.
                archive.extractall(folder, members, filter='data')
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise ValueError(
                f'{source} cannot be unpacked: it is damaged or cut off, or '
                f'the disk is full: {printable(str(error))}') from error
        return read_bundle(str(_find_prefix(Path(folder))))


def _read_safetensors(path: str) -> Dict[str, Tensor]:
    safetensors = import_package('safetensors', path)
    try:
        with safetensors.safe_open(path, framework='pt') as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(f'{path} is damaged or cut off: '
                         f'{printable(str(error))}') from error


def _read_torch(path: str, digest: str) -> Source:
    try:
        data = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # pickle, zip and torch raise their own
        raise ValueError(
            f'{path} is damaged, or contains more than weights, which is '
            'never executed. If you trained it yourself, save plain data: its '
            "state_dict, and 'cfg' and 'dataset_meta' of its meta. "
            f'{printable((str(error) or repr(error)).splitlines()[0])}'
        ) from error
    if not isinstance(data, dict):
        raise ValueError(f'{path} holds {type(data).__name__}, not weights')
    meta, size = meta_of(data), 0
    config = meta.get('cfg') if isinstance(meta.get('cfg'), str) else ''
    # What the project converted from TensorFlow has TensorFlow's anchors.
    ratio_major = 'EfficientDetSepBNHead' in config and 'YXYX' not in config
    tensors = {}
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
    return Source(tensors, digest, meta, ratio_major, data)


def meta_of(checkpoint: dict) -> dict:
    """The ``meta`` of a checkpoint, or {} if it has none or it is no dict."""
    meta = checkpoint.get('meta')
    return meta if isinstance(meta, dict) else {}


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


def class_names(meta: dict) -> List[str]:
    """The class names in the ``meta`` of a checkpoint, if any.

    Raises:
        ValueError: If they are not a list of different texts.
    """
    given = meta.get('dataset_meta')
    names = given.get('classes') if isinstance(given, dict) else given
    if names is None:
        return []
    if (names is given or not isinstance(names, (list, tuple))
            or not all(isinstance(name, str) for name in names)):
        raise ValueError(
            f"meta['dataset_meta'] of the checkpoint is {shown(given)}, but "
            "must be a dict with a list of texts as 'classes', the class "
            'names')
    check_unique(names)
    return list(names)


def check_unique(names: Sequence[str]) -> None:
    """Raises a ValueError that names a class name that occurs twice."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f'the class name {twice[0]!r} occurs twice in '
                         f'{shorten(names)}; names must be unique')


def origin_of(meta: dict) -> dict:
    """The origin that the converter has noted in a ``meta``, or {}.

    Raises:
        ValueError: If it is not what the converter writes.
    """
    origin = meta.get('source')
    if origin is None:
        return {}
    for key, kind in dict(file=str, sha256=str, receipt=list).items():
        value = origin.get(key) if isinstance(origin, dict) else None
        if not (isinstance(value, kind)
                and all(isinstance(part, str) for part in value)):
            raise ValueError(
                f"meta['source'][{key!r}] of the checkpoint is {shown(value)},"
                f' but must be a {"list of texts" * (kind is list) or "text"}')
    return {key: origin[key] for key in ('file', 'sha256', 'receipt')}
