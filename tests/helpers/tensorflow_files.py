"""Tensors with TensorFlow's names and axes, and files of them."""
import struct
from pathlib import Path

import numpy as np

from mmdet_efficientdet.scaling import SCALING
from mmdet_efficientdet.weights.layouts import LAYOUTS
from mmdet_efficientdet.weights.tensorflow import masked_crc32c

VARIABLES = LAYOUTS[0]


def varint(n):
    out = b''
    while n > 127:
        out += bytes([n & 127 | 128])
        n >>= 7
    return out + bytes([n])


def levels_of(name):
    return SCALING[name].backbone, SCALING[name].num_levels


def values(shapes_of, seed):
    generator = np.random.default_rng(seed)
    return {
        name: generator.normal(size=shape).astype('f4')
        for name, shape in shapes_of.items()
    }


def tf_shapes(own, name, layout=VARIABLES):
    """Shapes in TensorFlow's axes."""
    result = {}
    for key, shape in own.items():
        names = layout.names(key, *levels_of(name))
        if key.endswith('fusion_weights'):
            shape = ()
        elif len(shape) == 4:
            o, i, h, w = shape
            shape = (h, w, o, i) if 'depthwise' in key else (h, w, i, o)
        result.update({n: shape for n in names})
    return result


def field(number, payload):
    """A field of a message: an int, a message or text, or 4 bytes of CRC."""
    if isinstance(payload, int):
        return varint(number << 3) + varint(payload)
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def fixed(number, value):
    """A field of four bytes."""
    return varint(number << 3 | 5) + struct.pack('<I', value)


def shape_field(shape):
    return field(2, b''.join(field(2, field(1, n)) for n in shape))


def entry_of(array, offset):
    """The message about a tensor that starts at a byte of the data."""
    raw = array.tobytes()
    return (field(1, 9 if array.dtype == 'i8' else 1) +
            shape_field(array.shape) + field(4, offset) + field(5, len(raw)) +
            fixed(6, masked_crc32c(raw)))


HEADER = (b'', field(1, 1))  # one file of data


def plain_rows(rows):
    """The rows of a block, of which none shares its key with another."""
    return b''.join(
        varint(0) + varint(len(k)) + varint(len(v)) + k + v for k, v in rows)


def write_index(prefix, blocks, compression=b'\0', repeat=1):
    """An index of blocks.

    Args:
        prefix (Path): Of the checkpoint.
        blocks (list): Bytes of the rows, and the last key of each.
        compression (bytes): What each block says of its compression.
        repeat (int): How often the blocks are listed.
    """

    def block(data):
        data += struct.pack('<II', 0, 1)
        handle = varint(len(index)) + varint(len(data))
        crc = masked_crc32c(data + compression)
        index.extend(data + compression + struct.pack('<I', crc))
        return handle

    index = bytearray()
    handles = [(last, block(data)) for data, last in blocks]
    footer = block(b'') + block(plain_rows(repeat * handles))
    index += footer.ljust(40, b'\0')
    Path(f'{prefix}.index').write_bytes(index +
                                        struct.pack('<Q', 0xdb4775248b80fb57))


def write_bundle(prefix, tensors, compression=b'\0'):
    """An index of several blocks, and one file of data."""
    data, rows = bytearray(), [HEADER]
    for name in sorted(tensors):
        array = np.asarray(tensors[name])
        rows.append((name.encode(), entry_of(array, len(data))))
        data += array.tobytes()
    parts = [rows[i:i + 100] for i in range(0, len(rows), 100)]
    write_index(prefix, [(plain_rows(part), part[-1][0]) for part in parts],
                compression)
    Path(f'{prefix}.data-00000-of-00001').write_bytes(data)
