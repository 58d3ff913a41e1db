"""Opens files of weights, whatever their format; nothing is executed."""
import hashlib
import re
import tarfile
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Tuple

import torch
from torch import Tensor

from .tensorflow import read_bundle, read_keras


@contextmanager
def open_source(path: str) -> Iterator[Tuple[Mapping, str]]:
    """Opens a file of weights, whatever its format.

    Args:
        path (str): A torch file, a Keras ``.h5``, or a TensorFlow checkpoint:
            its prefix, its folder or the packed folder.

    Yields:
        tuple: Name to tensor, valid inside the context, and the SHA-256 of
        the file, or of all files of a checkpoint.

    Raises:
        ValueError: If the file is missing, empty, damaged, of no known format
            or holds more than data.
    """
    source = Path(path)
    if source.is_file() and not source.stat().st_size:
        raise ValueError(f'{path} is empty')
    start = b''
    if source.is_file():
        with source.open('rb') as file:
            start = file.read(512)
    if start[:2] == b'\x1f\x8b':
        with tempfile.TemporaryDirectory() as folder:
            _unpack(source, folder)
            yield read_bundle(_find_prefix(Path(folder))), _digest([source])
        return
    if not start:
        prefix = _find_prefix(source)
        files = sorted(Path(prefix).parent.glob(f'{Path(prefix).name}.[id]*'))
        yield read_bundle(prefix), _digest(files)
        return
    if start[:8] == b'\x89HDF\r\n\x1a\n':
        tensors = read_keras(path)
    elif start[:4] == b'PK\x03\x04' or start[:1] == b'\x80':
        tensors = _read_torch(path)
    elif source.suffix == '.index':
        tensors = read_bundle(path[:-len('.index')])
    else:
        kind = 'a web page, not weights' if b'<' in start.lstrip()[:1] else \
            'in no known format'
        raise ValueError(f'{path} is {kind}. Known are torch files, Keras '
                         '.h5 and TensorFlow checkpoints')
    yield tensors, _digest([source])


def _unpack(source: Path, folder: str) -> None:
    try:
        with tarfile.open(source) as archive:
            archive.extractall(folder, filter='data')
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f'{source} is damaged or cut off: {error}') from error


def _find_prefix(source: Path) -> str:
    """The checkpoint at a prefix, or the only one below a folder."""
    if Path(f'{source}.index').is_file():
        return str(source)
    if not source.is_dir():
        raise ValueError(f'{source} does not exist, nor does {source}.index')
    found = sorted(str(p)[:-len('.index')] for p in source.rglob('*.index'))
    if len(found) != 1:
        raise ValueError(f'{source} holds {len(found)} TensorFlow checkpoints '
                         f'{found}; give the prefix of one')
    return found[0]


def _digest(files: List[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open('rb') as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _read_torch(path: str) -> Dict[str, Tensor]:
    try:
        data = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # pickle, zip and torch raise their own
        raise ValueError(
            f'{path} is damaged, or holds more than weights, which are never '
            f'executed: {str(error).splitlines()[0]}') from error
    meta = data.get('meta') if isinstance(data, dict) else None
    config = str(meta.get('cfg', '')) if isinstance(meta, dict) else ''
    if 'EfficientDetSepBNHead' in config and 'YXYX' not in config:
        raise ValueError(
            f"{path} was trained with mmdet's projects/EfficientDet, whose "
            'own anchors stand in another order; only what that project '
            'converted from TensorFlow can be read')
    for key in ('state_dict_ema', 'state_dict', 'model'):
        if isinstance(data, dict) and isinstance(data.get(key), dict):
            data = data[key]
    if not isinstance(data, dict):
        raise ValueError(f'{path} holds {type(data).__name__}, not weights')
    return {
        re.sub(r'^module\.', '', key): value
        for key, value in data.items() if isinstance(value, Tensor)
    }
