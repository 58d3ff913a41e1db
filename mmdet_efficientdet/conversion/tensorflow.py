"""Reads TensorFlow checkpoints and Keras weights without TensorFlow.

``PREFIX.index`` is a table in the format of LevelDB, whose values are
messages of ``tensorflow/core/protobuf/tensor_bundle.proto``; the files
``PREFIX.data-*`` hold the tensors one after the other.
"""
import struct
from pathlib import Path
from typing import Dict, Iterator, Tuple

import numpy as np

_MAGIC = 0xdb4775248b80fb57
# Values of the enum DataType. Others, such as strings, are left out.
_DTYPES = {
    1: 'f4', 2: 'f8', 3: 'i4', 4: 'u1', 5: 'i2', 6: 'i1', 9: 'i8', 10: '?',
    14: 'bfloat16', 17: 'u2', 19: 'f2', 22: 'u4', 23: 'u8'
}  # yapf: disable


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
    """The tensors of a checkpoint, as views of the files.

    Args:
        prefix (str): Path without ``.index`` and ``.data-*``.

    Returns:
        dict: Name to array. Strings are left out, bfloat16 becomes float32.

    Raises:
        ValueError: If a file is missing, cut off or compressed.
    """
    data = Path(f'{prefix}.index').read_bytes()
    if len(data) < 48 or struct.unpack('<Q', data[-8:])[0] != _MAGIC:
        raise ValueError(f'{prefix}.index is no index of a TensorFlow '
                         'checkpoint, or it is cut off')
    try:
        _, at = _varint(data, len(data) - 48)
        _, at = _varint(data, at)
        entries = {
            key.decode(): _message(value)
            for _, handle in _block(data, data[at:])
            for key, value in _block(data, handle)
        }
    except (IndexError, KeyError, UnicodeDecodeError, struct.error) as error:
        raise ValueError(f'{prefix}.index is damaged') from error
    num_shards = entries.pop('', {}).get(1, [1])[0]
    shards, tensors = {}, {}
    for name, entry in entries.items():
        dtype = _DTYPES.get(entry.get(1, [0])[0])
        if dtype is None:
            continue
        if 7 in entry:
            raise ValueError(f'{prefix}: {name} is stored in slices, which '
                             'is not supported')
        dims = _message(entry.get(2, [b''])[0]).get(2, [])
        shape = [_message(dim).get(1, [0])[0] for dim in dims]
        shard = entry.get(3, [0])[0]
        if shard not in shards:
            path = Path(f'{prefix}.data-{shard:05}-of-{num_shards:05}')
            if not path.is_file():
                raise ValueError(f'{path} is missing; a TensorFlow '
                                 'checkpoint consists of several files')
            shards[shard] = np.memmap(path, np.uint8, 'r') \
                if path.stat().st_size else np.zeros(0, np.uint8)
        offset, size = entry.get(4, [0])[0], entry.get(5, [0])[0]
        raw = shards[shard][offset:offset + size]
        if len(raw) < size:
            raise ValueError(f'{prefix}.data-* is cut off: {name} ends at '
                             f'byte {offset + size} of {len(shards[shard])}')
        if dtype == 'bfloat16':
            array = (raw.view('<u2').astype('<u4') << 16).view('<f4')
        else:
            array = raw.view(np.dtype(dtype).newbyteorder('<'))
        tensors[name] = array.reshape(shape)
    return tensors


def read_keras(path: str) -> Dict[str, np.ndarray]:
    """The tensors of a Keras ``.h5`` by the names of their variables.

    Raises:
        ValueError: If h5py is missing or the file is no such file.
    """
    try:
        import h5py
    except ImportError as error:
        raise ValueError(f'{path} needs the package h5py: pip install '
                         'h5py') from error
    tensors = {}
    with h5py.File(path, 'r') as file:
        root = file.get('model_weights', file)
        if 'layer_names' not in root.attrs and 'layer_names0' not in \
                root.attrs:
            raise ValueError(f'{path} holds no weights of Keras')
        for layer in _names(root, 'layer_names'):
            for name in _names(root[layer], 'weight_names'):
                tensors[name.split(':')[0]] = root[layer][name][()]
    return tensors


def _names(group, key: str) -> list:
    """A list of names, which Keras cuts in parts where it is long."""
    names = list(group.attrs.get(key, ()))
    part = 0
    while f'{key}{part}' in group.attrs:
        names += list(group.attrs[f'{key}{part}'])
        part += 1
    return [n.decode() if isinstance(n, bytes) else n for n in names]
