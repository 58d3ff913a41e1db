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


def write_bundle(prefix, tensors, compression=b'\0'):
    """An index of several blocks, and one file of data."""

    def field(number, payload):
        if isinstance(payload, int):
            return varint(number << 3) + varint(payload)
        return varint(number << 3 | 2) + varint(len(payload)) + payload

    def block(rows):
        data = b''.join(
            varint(0) + varint(len(k)) + varint(len(v)) + k + v
            for k, v in rows) + struct.pack('<II', 0, 1)
        handle = varint(len(index)) + varint(len(data))
        crc = masked_crc32c(data + compression)
        return data + compression + struct.pack('<I', crc), handle

    index, data, rows = bytearray(), bytearray(), [(b'', field(1, 1))]
    for name in sorted(tensors):
        array = np.asarray(tensors[name])
        raw = array.tobytes()
        shape = b''.join(field(2, field(1, n)) for n in array.shape)
        rows.append(
            (name.encode(), field(1, 9 if array.dtype == 'i8' else 1) +
             field(2, shape) + field(4, len(data)) + field(5, len(raw))))
        data += raw
    handles = []
    for i in range(0, len(rows), 100):
        content, handle = block(rows[i:i + 100])
        handles.append((rows[min(i + 99, len(rows) - 1)][0], handle))
        index += content
    meta, meta_handle = block([])
    index += meta
    root, root_handle = block(handles)
    index += root
    footer = (meta_handle + root_handle).ljust(40, b'\0')
    Path(f'{prefix}.index').write_bytes(index + footer +
                                        struct.pack('<Q', 0xdb4775248b80fb57))
    Path(f'{prefix}.data-00000-of-00001').write_bytes(data)
