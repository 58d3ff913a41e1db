"""Reads TensorFlow checkpoints and Keras weights without TensorFlow.

``PREFIX.index`` is a table in the format of LevelDB. Its values are messages
of ``tensorflow/core/protobuf/tensor_bundle.proto``. The files
``PREFIX.data-*`` hold the tensors one after the other.

Nothing that a file says is trusted: time and memory are bounded by its size,
and no other file is read.
"""
import struct
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Dict, Iterator, Tuple

import numpy as np

from ..utils import import_package, printable

EMA_SUFFIX = '/ExponentialMovingAverage'  # of the name of a moving average
LIMIT = 4 << 30  # bytes, three times a training checkpoint of D7x
_INDEX_LIMIT = 4 << 20  # bytes; the index of a D7x has less than a tenth
_MAGIC = 0xdb4775248b80fb57
_STRING = 7
# Values of the enum DataType.
_DTYPES = {
    1: 'f4', 2: 'f8', 3: 'i4', 4: 'u1', 5: 'i2', 6: 'i1', 9: 'i8', 10: '?',
    14: 'bfloat16', 17: 'u2', 19: 'f2', 22: 'u4', 23: 'u8'
}  # yapf: disable

# CRC-32C of two bytes at a time. 0x82f63b78 is the polynomial of Castagnoli,
# reversed.
_CRC_TABLE = np.arange(1 << 16, dtype=np.uint32)
for _ in range(16):
    _CRC_TABLE = _CRC_TABLE >> 1 ^ (_CRC_TABLE & 1) * np.uint32(0x82f63b78)
# From a register of zeros these bytes lead to its start value, 0xffffffff.
_CRC_START = b'Td\x1fd'
_BITS = np.arange(32, dtype=np.uint32)


def _transform(columns: np.ndarray, registers: np.ndarray) -> np.ndarray:
    """Products of a matrix of bits and registers, which are vectors of it."""
    bits = registers[:, None] >> _BITS & 1
    return np.bitwise_xor.reduce(np.where(bits, columns, 0), axis=1)


def masked_crc32c(data: bytes) -> int:
    """CRC-32C, rotated and with a constant added, as TensorFlow stores it.

    The register is a linear function of the data, which zeros at the start do
    not change. So the parts of the data are computed side by side.
    """
    length = len(_CRC_START) + len(data)
    exponent = max(length.bit_length() // 2 - 1, 0)  # two bytes: one word
    width = 2 << exponent
    count = 1 << (-(-length // width) - 1).bit_length()
    padded = np.zeros(count * width, np.uint8)
    padded[-length:] = np.frombuffer(_CRC_START + bytes(data), np.uint8)
    registers = np.zeros(count, np.uint32)
    for word in padded.view('<u2').reshape(count, -1).T.copy():
        registers = _CRC_TABLE[registers & 0xffff ^ word] ^ registers >> 16
    shift = np.uint32(1) << _BITS  # by one word
    shift = _CRC_TABLE[shift & 0xffff] ^ shift >> 16
    for _ in range(exponent):
        shift = _transform(shift, shift)
    while len(registers) > 1:
        registers = _transform(shift, registers[::2]) ^ registers[1::2]
        shift = _transform(shift, shift)
    crc = int(registers[0]) ^ 0xffffffff
    return ((crc >> 15 | crc << 17) + 0xa282ead8) & 0xffffffff


def check_size(name: str, size: int, limit: int = LIMIT) -> None:
    """Raises a ValueError that names what has more bytes than the limit."""
    if size > limit:
        raise ValueError(f'{name} has {size} bytes, but at most {limit} are '
                         'allowed')


def largest_contents(path: str) -> int:
    """The most bytes that a file of weights may become in memory.

    No weights can be compressed that much.
    """
    return min(LIMIT, (1 << 20) + 16 * Path(path).stat().st_size)


def _varint(data: bytes, at: int) -> Tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError('a number has more than 64 bits')


def _handle(data: bytes, at: int = 0) -> Tuple[int, int, int]:
    """Offset and size of a block, and where the next handle starts."""
    offset, at = _varint(data, at)
    return offset, *_varint(data, at)


def _block(data: bytes, offset: int, size: int,
           *_) -> Iterator[Tuple[bytes, bytes]]:
    """Keys and values of one block; keys share prefixes."""
    block, kind = data[offset:offset + size], data[offset + size]
    if kind:
        raise ValueError('it is compressed, which is not supported; load and '
                         'save it again with TensorFlow')
    stored, = struct.unpack('<I', data[offset + size + 1:offset + size + 5])
    if masked_crc32c(data[offset:offset + size + 1]) != stored:
        raise ValueError('a checksum differs')
    end = size - 4 - 4 * struct.unpack('<I', block[-4:])[0]
    key, at, total = b'', 0, 0
    while at < end:
        shared, at = _varint(block, at)
        rest, at = _varint(block, at)
        length, at = _varint(block, at)
        if shared > len(key) or at + rest + length > end:
            raise ValueError('a key or value is cut off')
        key = key[:shared] + block[at:at + rest]
        total += len(key)
        if total > 16 * size:  # every 16th key is stored as a whole
            raise ValueError('its names are too long')
        at += rest + length
        yield key, block[at - length:at]


def _message(data: bytes) -> Dict[int, list]:
    """Fields of a protocol message, by number: integers and bytes."""
    fields, at = {}, 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind, value = tag & 7, 0
        if kind in (0, 2):
            value, at = _varint(data, at)
        if kind:
            size = {1: 8, 2: value, 5: 4}[kind]
            value, at = data[at:at + size], at + size
        fields.setdefault(tag >> 3, []).append(value)
    if at > len(data):
        raise ValueError('a field is cut off')
    return fields


def _values(message: Dict[int, list], number: int, kind: type) -> list:
    """The values of a field, which must be of one type."""
    values = message.get(number, [])
    if not all(type(value) is kind for value in values):
        raise ValueError(f'has a field {number} of the wrong type')
    return values


def _field(message: Dict[int, list], number: int, default):
    """The last value of a field, or its default."""
    return (_values(message, number, type(default)) or [default])[-1]


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
    entries = _read_index(prefix)
    num_shards = entries.pop('', 1)

    @lru_cache(maxsize=None)
    def shard(number: int) -> list:
        """The bytes of a file, and how many no tensor has used yet."""
        path = Path(f'{prefix}.data-{number:05}-of-{num_shards:05}')
        if not path.is_file():
            raise ValueError(f'is in {path}, which is missing; a TensorFlow '
                             'checkpoint consists of several files')
        size = path.stat().st_size
        check_size(f'is in {path}, which', size)
        # An empty file cannot be mapped.
        return [np.memmap(path, np.uint8, 'r') if size else b'', size]

    tensors = {}
    for name, entry in entries.items():
        try:
            kind = _field(entry, 1, 0)
            if kind != _STRING:
                tensors[name] = _array(entry, kind, shard)
        except (IndexError, KeyError, ValueError) as error:
            raise ValueError(f'{prefix}: {printable(name)} {error}') from error
    return tensors


def _read_index(prefix: str) -> Dict[str, dict]:
    """The messages about all tensors, by name; '' has the number of files."""
    path, entries, last, end = Path(f'{prefix}.index'), {}, None, 0
    try:
        check_size('it', path.stat().st_size, _INDEX_LIMIT)
        data = path.read_bytes()
        if len(data) < 48 or struct.unpack('<Q', data[-8:])[0] != _MAGIC:
            raise ValueError('it is not of TensorFlow, or cut off')
        footer = _handle(data, _handle(data, len(data) - 48)[2])
        for _, handle in _block(data, *footer):
            offset, size, _ = _handle(handle)
            if offset < end:
                raise ValueError('blocks overlap')
            end = offset + size
            for key, value in _block(data, offset, size):
                if last is not None and key <= last:
                    raise ValueError('its names are not sorted')
                last, entries[key.decode()] = key, _message(value)
        header = entries.pop('', {})
        if _field(header, 2, 0):
            raise ValueError('it is big-endian, which is not supported')
        entries[''] = _field(header, 1, 1)
    except (IndexError, KeyError, ValueError, struct.error) as error:
        raise ValueError(f'{path} cannot be read, it may be damaged: '
                         f'{error}') from error
    return entries


def _array(entry: dict, kind: int, shard) -> np.ndarray:
    """One tensor, from its message and a function that opens its file."""
    if kind not in _DTYPES:
        raise ValueError(f'is of the unknown type {kind}')
    if 7 in entry:
        raise ValueError('is stored in slices, which is not supported')
    is_brain = _DTYPES[kind] == 'bfloat16'
    dtype = np.dtype('u2' if is_brain else _DTYPES[kind]).newbyteorder('<')
    dims = _values(_message(_field(entry, 2, b'')), 2, bytes)[:9]
    shape = [_field(_message(dim), 1, 0) for dim in dims]
    offset, size = _field(entry, 4, 0), _field(entry, 5, 0)
    if (len(shape) > 8 or max(shape, default=0) > LIMIT
            or prod(shape) * dtype.itemsize != size):
        raise ValueError(f'has {size} bytes, which do not fit its shape '
                         f'{shape} of {dtype.name}')
    file = shard(_field(entry, 3, 0))
    if offset + size > len(file[0]):
        raise ValueError(f'is cut off: it ends at byte {offset + size} of '
                         f'{len(file[0])}')
    file[1] -= size
    if file[1] < 0:
        raise ValueError('overlaps other tensors')
    raw = np.asarray(file[0][offset:offset + size], np.uint8)
    stored = int.from_bytes(_field(entry, 6, bytes(4)), 'little')
    if masked_crc32c(raw) != stored:
        raise ValueError('is damaged: its checksum differs')
    array = raw.view(dtype)
    if is_brain:
        array = (array.astype('<u4') << 16).view('<f4')
    return array.reshape(shape)


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
    try:
        with h5py.File(path, 'r') as file:
            root = file
            if file.id.links.exists(b'model_weights'):
                root = _member(file, 'model_weights')
            for layer in _names(root, 'layer_names'):
                group = _member(root, layer)
                for given in _names(group, 'weight_names'):
                    data, name = _member(group, given), given.split(':')[0]
                    if name in sets:
                        raise ValueError(f'two tensors are named {name}')
                    if getattr(data, 'shape', None) is None or \
                            data.dtype.kind not in 'biuf':
                        raise ValueError(f'{given} holds no numbers')
                    if data.external or data.is_virtual:
                        raise ValueError(f'{given} is in another file')
                    count = max(prod(data.shape), prod(data.chunks or ()))
                    size += count * data.dtype.itemsize
                    sets[name] = data
            check_size('its contents', size, largest_contents(path))
            tensors = {name: data[()] for name, data in sets.items()}
    except Exception as error:  # h5py raises many
        raise ValueError(
            f'{path} is damaged or cut off, or holds more than weights: '
            f'{printable(str(error))}') from error
    if not tensors:
        raise ValueError(f'{path} holds no weights of Keras 2')
    return tensors


def _member(group, path: str):
    """What a path in a HDF5 file leads to, without following links."""
    for name in path.split('/'):
        info = group.id.links.get_info(name.encode())
        if info.type:  # 0: not a link, but an object
            raise ValueError(f'{path} is a link, which may lead elsewhere')
        group = group[name]
    return group


def _names(group, key: str) -> list:
    """A list of names, which Keras splits into parts if it is long."""
    names = list(group.attrs.get(key, ()))
    part = 0
    while f'{key}{part}' in group.attrs:
        names += list(group.attrs[f'{key}{part}'])
        part += 1
    return [n.decode() if isinstance(n, bytes) else n for n in names]
