"""Opens files of weights, whatever their format; nothing is executed."""
import hashlib
import re
import tarfile
import tempfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, Iterator, List, Mapping

import torch
from torch import Tensor

from .tensorflow import EMA_SUFFIX, read_bundle, read_keras

# The end of the name of a part of a TensorFlow checkpoint.
PART = re.compile(r'\.(index|meta|data-\d{5}-of-\d{5})$')


@dataclass
class Source:
    """Tensors of a file, and what else it tells.

    Args:
        tensors (Mapping): Name to tensor.
        sha256 (str): Of the file, or of all files of a checkpoint.
        meta (dict): What files of MMDetection and of ours tell of themselves.
        ratio_major (bool): Whether its anchors are in the order of
            MMDetection's generator.
        checkpoint (dict): All of a torch file, as it is.
    """
    tensors: Mapping
    sha256: str
    meta: dict = field(default_factory=dict)
    ratio_major: bool = False
    checkpoint: dict = field(default_factory=dict)


def class_names(meta: dict) -> List[str]:
    """The names of a checkpoint's classes; none where it does not tell."""
    names = meta.get('dataset_meta')
    names = names.get('classes') if isinstance(names, dict) else None
    return list(names or ())


@contextmanager
def open_source(path: str) -> Iterator[Source]:
    """Opens a file of weights, whatever its format.

    Args:
        path (str): A torch file, safetensors, a Keras ``.h5``, or a
            TensorFlow checkpoint: its prefix, one of its files, its folder or
            the packed folder.

    Yields:
        Source: Its tensors are valid inside the context.

    Raises:
        ValueError: If the file is missing, empty, damaged, of no known format
            or holds more than data.
    """
    source = Path(path)
    start = b''
    if source.is_file():
        with source.open('rb') as file:
            start = file.read(512)
        if not start:
            raise ValueError(f'{path} is empty')
    prefix = Path(PART.sub('', str(path)))
    if not start or Path(f'{prefix}.index').is_file():
        prefix = _find_prefix(prefix)
        yield Source(read_bundle(str(prefix)), _digest(_files(prefix)))
    elif start[:2] == b'\x1f\x8b' or start[257:262] == b'ustar':
        with tempfile.TemporaryDirectory() as folder:
            _unpack(source, folder)
            prefix = _find_prefix(Path(folder))
            yield Source(read_bundle(str(prefix)), _digest([source]))
    elif start[:8] == b'\x89HDF\r\n\x1a\n':
        yield Source(read_keras(str(path)), _digest([source]))
    elif start[8:9] == b'{' and start[7:8] == b'\0':
        yield Source(_read_safetensors(path), _digest([source]))
    elif start[:4] == b'PK\x03\x04' or start[:1] == b'\x80':
        yield _read_torch(path, _digest([source]))
    else:
        kind = 'a web page, not weights' if b'<' in start.lstrip()[:1] else \
            'in no known format'
        raise ValueError(
            f'{path} is {kind}. Known are torch files, safetensors, Keras .h5 '
            'and TensorFlow checkpoints')


def _unpack(source: Path, folder: str) -> None:
    try:
        with tarfile.open(source) as archive:
            members = [
                member for member in archive
                if member.isfile() and PART.search(member.name)
                and not member.name.endswith('.meta')
            ]
            if not members:
                raise ValueError(f'{source} holds no TensorFlow checkpoint')
            # The filter refuses paths that lead out of the folder.
            archive.extractall(folder, members, filter='data')
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f'{source} cannot be unpacked: it is damaged or cut off, or the '
            f'disk is full: {error}') from error


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
    """The index and the files of data of one checkpoint."""
    return sorted(path for path in prefix.parent.iterdir()
                  if path.suffix != '.meta'
                  and PART.sub('', path.name) == prefix.name != path.name)


def _digest(files: List[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open('rb') as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _read_safetensors(path: str) -> Dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError(f'{path} needs the package safetensors: pip install '
                         'safetensors') from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f'{path} is damaged or cut off: {error}') from error


def _read_torch(path: str, sha256: str) -> Source:
    try:
        data = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # pickle, zip and torch raise their own
        raise ValueError(
            f'{path} is damaged, or holds more than weights, which are never '
            'executed. Of a training of your own save plain data: its '
            "state_dict, and of its meta the entries 'cfg' and "
            f"'dataset_meta'. {(str(error) or repr(error)).splitlines()[0]}"
        ) from error
    if not isinstance(data, dict):
        raise ValueError(f'{path} holds {type(data).__name__}, not weights')
    meta = data.get('meta') if isinstance(data.get('meta'), dict) else {}
    config = str(meta.get('cfg', ''))
    # What the project converted from TensorFlow has TensorFlow's anchors.
    ratio_major = 'EfficientDetSepBNHead' in config and 'YXYX' not in config
    state_dict, averages = data, {}
    for key in ('state_dict', 'model'):
        if isinstance(data.get(key), dict):
            state_dict = data[key]
            break
    if isinstance(data.get('state_dict_ema'), dict):  # of timm and effdet
        averages = data['state_dict_ema']
    elif isinstance(data.get('ema_state_dict'), dict):
        # mmengine exchanges the two when it saves.
        averages, state_dict = state_dict, {
            key: value
            for key, value in data['ema_state_dict'].items() if key != 'steps'
        }
    tensors = {}
    for suffix, part in (('', state_dict), (EMA_SUFFIX, averages)):
        for key, value in part.items():
            if not isinstance(key, str):
                raise ValueError(f'{path} holds no state dict: {key!r} is no '
                                 'name of a tensor')
            if not isinstance(value, Tensor):
                continue
            key = key.removeprefix('module.') + suffix
            if key in tensors:
                raise ValueError(f'{path} holds {key} twice')
            tensors[key] = value
    if not tensors:
        raise ValueError(f'{path} holds no tensors')
    return Source(tensors, sha256, meta, ratio_major, data)
