"""Reads TensorFlow checkpoints and Keras weights without TensorFlow.

``PREFIX.index`` is a table in the format of LevelDB. Its values are messages
of ``tensorflow/core/protobuf/tensor_bundle.proto``. The files
``PREFIX.data-*`` hold the tensors one after the other.

Nothing that a file says is trusted: time and memory are bounded by its size,
and no other file is read.
"""
import os
from functools import lru_cache, partial, reduce
from io import BytesIO
from math import isqrt, prod
from operator import xor
from pathlib import Path
from typing import Callable, Dict, Iterator, Optional, Tuple

import numpy as np

from ..utils import import_package, reading

EMA_SUFFIX = '/ExponentialMovingAverage'  # of the name of a moving average
LIMIT = 4 << 30  # bytes, three times a training checkpoint of D7x
_INDEX_LIMIT = 2 << 20  # bytes; the index of a D7x has less than a quarter
_MAGIC = 0xdb4775248b80fb57
_STRING = 7
# Values of the enum DataType.
_DTYPES = {
    1: 'f4', 2: 'f8', 3: 'i4', 4: 'u1', 5: 'i2', 6: 'i1', 9: 'i8', 10: '?',
    14: 'bfloat16', 17: 'u2', 19: 'f2', 22: 'u4', 23: 'u8'
}  # yapf: disable

# The CRC-32C of two bytes. 0x82f63b78 is the polynomial of Castagnoli,
# reversed.
_CRC = np.arange(1 << 16, dtype=np.uint32)
for _ in range(16):
    _CRC = _CRC >> 1 ^ (_CRC & 1) * np.uint32(0x82f63b78)


def masked_crc32c(data: bytes) -> int:
    """CRC-32C, rotated and with a constant added, as TensorFlow stores it.

    It is a linear function of the data. So the rows of a square are computed
    side by side and then joined.
    """
    # These bytes lead from zero to the start value, 0xffffffff. Zeros before
    # them change nothing.
    data = np.frombuffer(b'Td\x1fd' + bytes(data), np.uint8)
    width = isqrt(len(data)) // 2 + 1
    rows = -(-len(data) // (2 * width))
    words = np.zeros((rows + 32, width), '<u2')
    words[:rows].reshape(-1).view(np.uint8)[-len(data):] = data
    # The last 32 rows get what becomes of each bit after a row of zeros.
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    values = np.append(np.zeros(rows, np.uint32), bits)
    for word in words.T.copy():
        values = _CRC[values & 0xffff ^ word] ^ values >> 16
    values, crc = values.tolist(), 0
    for value in values[:rows]:
        shifted = (values[rows + i] for i in range(32) if crc >> i & 1)
        crc = reduce(xor, shifted, value)
    crc ^= 0xffffffff
    return ((crc >> 15 | crc << 17) + 0xa282ead8) & 0xffffffff


def check_size(name: str, size: int, path: Optional[str] = None) -> None:
    """Refuses what needs more memory than weights can.

    Args:
        name (str): What it is, for the message.
        size (int): In bytes.
        path (str, optional): A file whose contents it is. Weights cannot be
            compressed to a 16th.

    Raises:
        ValueError: If the size is too large.
    """
    limit = (1 << 20) + 16 * os.path.getsize(path) if path else LIMIT
    if size > limit:
        raise ValueError(f'{name} has {size} bytes, more than {limit}')


_integer = partial(int.from_bytes, byteorder='little')


def _varint(stream: BytesIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte, = _take(stream, 1)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise ValueError('a number has more than 64 bits')


def _take(stream: BytesIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise ValueError('a number, a name or a value is cut off')
    return data


def _handle(stream: BytesIO) -> Tuple[int, int]:
    """Offset and size of a block."""
    return _varint(stream), _varint(stream)


def _block(data: bytes, handle: tuple) -> Iterator[Tuple[bytes, bytes]]:
    """Keys and values of one block; keys share prefixes."""
    offset, size = handle
    end = offset + size + 1
    if data[end - 1]:
        raise ValueError('it is compressed, which is not supported')
    if masked_crc32c(data[offset:end]) != _integer(data[end:end + 4]):
        raise ValueError('a checksum differs')
    block = data[offset:offset + size]
    # The last number counts others before it, which are not needed.
    rows = BytesIO(block[:max(0, size - 4 - 4 * _integer(block[-4:]))])
    key, total = b'', 0
    while rows.tell() < len(rows.getbuffer()):
        shared, rest, length = (_varint(rows) for _ in range(3))
        if shared > len(key):
            raise ValueError('a name is cut off')
        key = key[:shared] + _take(rows, rest)
        total += len(key)
        if total > 16 * size:  # every 16th key is stored as a whole
            raise ValueError('its names are too long')
        yield key, _take(rows, length)


def _message(data: bytes) -> Dict[int, list]:
    """Fields of a protocol message, by number: integers and bytes."""
    fields, stream = {}, BytesIO(data)
    while stream.tell() < len(data):
        tag = _varint(stream)
        kind = tag & 7
        value = _varint(stream) if kind in (0, 2) else 0
        if kind:
            value = _take(stream, {1: 8, 2: value, 5: 4}[kind])
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _field(message: Dict[int, list], number: int, default=0):
    """The last value of a field, which has the type of the default."""
    value = message.get(number, [default])[-1]
    if type(value) is not type(default):
        raise ValueError(f'field {number} is of the wrong type')
    return value


def read_bundle(prefix: str) -> Dict[str, np.ndarray]:
    """The tensors of a checkpoint, as views of its memory-mapped files.

    Args:
        prefix (str): Path without ``.index`` and ``.data-*``.

    Returns:
        dict: Name to array. Strings are skipped, bfloat16 becomes float32.

    Raises:
        ValueError: If a file is missing, cut off, damaged, compressed or
            big-endian, or a tensor is too large or of an unknown type.
    """
    with reading(f'{prefix}.index'):
        entries = _read_index(Path(f'{prefix}.index'))
        num_shards = _field(entries.pop('', {}), 1, 1)

    @lru_cache(maxsize=None)
    def shard(number: int) -> list:
        """The bytes of a file, and how many no tensor has used yet."""
        path = Path(f'{prefix}.data-{number:05}-of-{num_shards:05}')
        if not path.is_file():
            raise ValueError(f'{path} is missing')
        size = path.stat().st_size
        # An empty file cannot be mapped.
        return [
            np.memmap(path, np.uint8, 'c') if size else np.zeros(0, np.uint8),
            size
        ]

    tensors = {}
    for name, entry in entries.items():
        with reading(f'{prefix}: {name}'):
            if _field(entry, 1) != _STRING:
                tensors[name] = _array(entry, shard)
    return tensors


def _read_index(path: Path) -> Dict[str, dict]:
    """The messages about all tensors, by name; '' is that of the files."""
    entries, last, end = {}, None, 0
    with path.open('rb') as file:
        data = file.read(_INDEX_LIMIT)
    if len(data) < 48 or _integer(data[-8:]) != _MAGIC:
        raise ValueError('it is not of TensorFlow, cut off or too large')
    footer = BytesIO(data[-48:])
    _handle(footer)  # of a block that is not needed
    for _, handle in _block(data, _handle(footer)):
        handle = _handle(BytesIO(handle))
        if handle[0] < end:
            raise ValueError('its blocks overlap')
        end = sum(handle)
        for key, value in _block(data, handle):
            if last is not None and key <= last:
                raise ValueError('its names are not sorted')
            last, entries[key.decode()] = key, _message(value)
    if _field(entries.get('', {}), 2):
        raise ValueError('it is big-endian, which is not supported')
    return entries


def _array(entry: dict, shard: Callable) -> np.ndarray:
    """One tensor, from its message and a function that opens its file."""
    kind, offset, size = (_field(entry, number) for number in (1, 4, 5))
    if kind not in _DTYPES or 7 in entry:
        raise ValueError(f'it is of the unknown type {kind}, or in slices')
    is_brain = _DTYPES[kind] == 'bfloat16'
    dtype = np.dtype('u2' if is_brain else _DTYPES[kind]).newbyteorder('<')
    dims = _message(_field(entry, 2, b'')).get(2, [])[:9]
    shape = [_field(_message(dim), 1) for dim in dims]
    if prod(shape) * dtype.itemsize != size:
        raise ValueError(f'it has {size} bytes, which do not fit its shape '
                         f'{shape} of {dtype.name}')
    file = shard(_field(entry, 3))
    if offset + size > len(file[0]):
        raise ValueError(f'it ends at byte {offset + size} of {len(file[0])}')
    file[1] -= size
    if file[1] < 0:
        raise ValueError('it overlaps other tensors')
    raw = np.asarray(file[0][offset:offset + size], np.uint8)
    if masked_crc32c(raw) != _integer(_field(entry, 6, b'')):
        raise ValueError('its checksum differs')
    array = raw.view(dtype)
    if is_brain:
        array = (array.astype('<u4') << 16).view('<f4')
    return np.require(array.reshape(shape), requirements='A')


def read_keras(path: str) -> Dict[str, np.ndarray]:
    """The tensors of a Keras ``.h5`` by the names of their variables.

    HDF5 compares checksums only if the file has them, which Keras does not
    write.

    Raises:
        ValueError: If h5py is not installed, the file is damaged, too large,
            or refers to another file.
    """
    h5py = import_package('h5py', path)
    sets, size = {}, 0
    with reading(path), h5py.File(path, 'r') as file:
        link = file.visititems_links(lambda name, link: name *
                                     (type(link) is not h5py.HardLink))
        if link:
            raise ValueError(f'{link} is a link, which may lead elsewhere')
        root = file.get('model_weights', file)
        for layer in _names(root, 'layer_names'):
            for given in _names(root[layer], 'weight_names'):
                data, name = root[layer][given], given.split(':')[0]
                if (name in sets or getattr(data, 'shape', None) is None
                        or data.dtype.kind not in 'biuf' or data.external
                        or data.dtype.itemsize > 8 or data.is_virtual):
                    raise ValueError(f'{given} is no array of numbers in this '
                                     'file, or occurs twice')
                count = max(prod(data.shape), prod(data.chunks or ()))
                size += count * data.dtype.itemsize
                sets[name] = data
        check_size('its contents', size, path)
        if not sets:
            raise ValueError('it holds no weights of Keras 2')
        return {
            name: data.astype(data.dtype.newbyteorder('='))[()]
            for name, data in sets.items()
        }


def _names(group, key: str) -> list:
    """A list of names, which Keras splits into parts if it is long."""
    names = list(group.attrs.get(key, ()))
    part = 0
    while f'{key}{part}' in group.attrs:
        names += list(group.attrs[f'{key}{part}'])
        part += 1
    return [n.decode() if isinstance(n, bytes) else n for n in names]
