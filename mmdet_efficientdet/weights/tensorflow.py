"""Reads TensorFlow checkpoints and Keras weights without TensorFlow.

``PREFIX.index`` is a table in the format of LevelDB. Its values are messages
of ``tensorflow/core/protobuf/tensor_bundle.proto``. The files
``PREFIX.data-*`` hold the tensors one after the other.
"""
import struct
from functools import lru_cache
from pathlib import Path
from typing import Dict, Iterator, Tuple

import numpy as np

from ..utils import import_package, printable

EMA_SUFFIX = '/ExponentialMovingAverage'  # of the name of a moving average
_MAGIC = 0xdb4775248b80fb57
_STRING = 7
# Values of the enum DataType.
_DTYPES = {
    1: 'f4', 2: 'f8', 3: 'i4', 4: 'u1', 5: 'i2', 6: 'i1', 9: 'i8', 10: '?',
    14: 'bfloat16', 17: 'u2', 19: 'f2', 22: 'u4', 23: 'u8'
}  # yapf: disable


_CRC_TABLE = range(256)
for _ in range(8):  # 0x82f63b78 is the polynomial of Castagnoli, reversed.
    _CRC_TABLE = [n >> 1 ^ (0x82f63b78 if n & 1 else 0) for n in _CRC_TABLE]


def masked_crc32c(data: bytes) -> int:
    """CRC-32C, rotated and with a constant added, as TensorFlow stores it."""
    crc = 0xffffffff
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xffffffff
    return ((crc >> 15 | crc << 17) + 0xa282ead8) & 0xffffffff


def _varint(data: bytes, at: int) -> Tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _block(data: bytes, handle: bytes) -> Iterator[Tuple[bytes, bytes]]:
    """Keys and values of one block; keys share prefixes."""
    offset, at = _varint(handle, 0)
    size, _ = _varint(handle, at)
    block, kind = data[offset:offset + size], data[offset + size]
    if kind:
        raise ValueError('its index is compressed, which is not supported; '
                         'load and save it again with TensorFlow')
    # Only the index is verified, some 100 kB. For the tensors of a D7x this
    # loop would take a minute, and archives have their own checksum.
    stored, = struct.unpack('<I', data[offset + size + 1:offset + size + 5])
    if masked_crc32c(data[offset:offset + size + 1]) != stored:
        raise ValueError('its index is damaged: a checksum differs')
    end = size - 4 - 4 * struct.unpack('<I', block[-4:])[0]
    key, at = b'', 0
    while at < end:
        shared, at = _varint(block, at)
        rest, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at:at + rest]
        at += rest + length
        yield key, block[at - length:at]


def _message(data: bytes) -> Dict[int, list]:
    """Fields of a protocol message, by number."""
    fields, at = {}, 0
    while at < len(data):
        tag, at = _varint(data, at)
        if tag & 7 == 0:
            value, at = _varint(data, at)
        elif tag & 7 == 2:
            length, at = _varint(data, at)
            value, at = data[at:at + length], at + length
        else:
            size = {1: 8, 5: 4}[tag & 7]
            value, at = data[at:at + size], at + size
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def read_bundle(prefix: str) -> Dict[str, np.ndarray]:
    """The tensors of a checkpoint, as views of its memory-mapped files.

    Args:
        prefix (str): Path without ``.index`` and ``.data-*``.

    Returns:
        dict: Name to array. Strings are skipped, bfloat16 becomes float32.

    Raises:
        ValueError: If a file is missing, cut off, damaged or compressed, or
            the type of a tensor is unknown.
    """
    entries = _read_index(prefix)
    num_shards = entries.pop('', {}).get(1, [1])[0]

    @lru_cache(maxsize=None)
    def shard(number: int) -> np.ndarray:
        path = Path(f'{prefix}.data-{number:05}-of-{num_shards:05}')
        if not path.is_file():
            raise ValueError(f'{path} is missing; a TensorFlow checkpoint '
                             'consists of several files')
        if not path.stat().st_size:
            return np.zeros(0, np.uint8)  # an empty file cannot be mapped
        return np.memmap(path, np.uint8, 'r')

    return {
        name:
        _array(f'{prefix}: {printable(name)}', entry,
               shard(entry.get(3, [0])[0]))
        for name, entry in entries.items() if entry.get(1) != [_STRING]
    }


def _read_index(prefix: str) -> Dict[str, dict]:
    """The messages about all tensors, by name; '' is that of the file."""
    data = Path(f'{prefix}.index').read_bytes()
    if len(data) < 48 or struct.unpack('<Q', data[-8:])[0] != _MAGIC:
        raise ValueError(f'{prefix}.index is not the index of a TensorFlow '
                         'checkpoint, or it is cut off')
    try:
        _, at = _varint(data, len(data) - 48)
        _, at = _varint(data, at)
        return {
            key.decode(): _message(value)
            for _, handle in _block(data, data[at:])
            for key, value in _block(data, handle)
        }
    except (IndexError, KeyError, UnicodeDecodeError, struct.error) as error:
        raise ValueError(f'{prefix}.index is damaged') from error
    except ValueError as error:
        raise ValueError(f'{prefix} cannot be read: {error}') from error


def _array(name: str, entry: dict, shard: np.ndarray) -> np.ndarray:
    """One tensor, from its message and the file that it is in."""
    kind = entry.get(1, [0])[0]
    if kind not in _DTYPES:
        raise ValueError(f'{name} is of the unknown type {kind}')
    if 7 in entry:
        raise ValueError(f'{name} is stored in slices, which is not supported')
    dims = _message(entry.get(2, [b''])[0]).get(2, [])
    shape = [_message(dim).get(1, [0])[0] for dim in dims]
    offset, size = entry.get(4, [0])[0], entry.get(5, [0])[0]
    raw = shard[offset:offset + size]
    if len(raw) < size:
        raise ValueError(f'{name} is cut off: it ends at byte '
                         f'{offset + size} of {len(shard)}')
    if _DTYPES[kind] == 'bfloat16':
        array = (raw.view('<u2').astype('<u4') << 16).view('<f4')
    else:
        array = raw.view(np.dtype(_DTYPES[kind]).newbyteorder('<'))
    return array.reshape(shape)


def read_keras(path: str) -> Dict[str, np.ndarray]:
    """The tensors of a Keras ``.h5`` by the names of their variables.

    Raises:
        ValueError: If h5py is not installed or the file is damaged.
    """
    h5py = import_package('h5py', path)
    try:
        with h5py.File(path, 'r') as file:
            root = file.get('model_weights', file)
            arrays = [(name.split(':')[0], root[layer][name][()])
                      for layer in _names(root, 'layer_names')
                      for name in _names(root[layer], 'weight_names')]
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(f'{path} is damaged or cut off: '
                         f'{printable(str(error))}') from error
    tensors = dict(arrays)
    if not tensors:
        raise ValueError(f'{path} holds no weights of Keras 2')
    if len(tensors) < len(arrays):
        raise ValueError(f'{path} holds several tensors of one name')
    return tensors


def _names(group, key: str) -> list:
    """A list of names, which Keras splits into parts if it is long."""
    names = list(group.attrs.get(key, ()))
    part = 0
    while f'{key}{part}' in group.attrs:
        names += list(group.attrs[f'{key}{part}'])
        part += 1
    return [n.decode() if isinstance(n, bytes) else n for n in names]
