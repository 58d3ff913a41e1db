"""Damage of a file is found, or does not reach the weights."""
import random
import tarfile
from collections import Counter

import h5py
import numpy as np
import pytest
import torch
from helpers.tensorflow_files import write_bundle
from safetensors.numpy import save_file

from mmdet_efficientdet.weights.sources import open_source


def write_torch(folder, tensors, name='x.pth', **options):
    tensors = {k: torch.from_numpy(v) for k, v in tensors.items()}
    torch.save(tensors, folder / name, **options)
    return folder / name


def write_old_torch(folder, tensors):
    """As torch did before version 1.6."""
    return write_torch(
        folder, tensors, 'x.pt', _use_new_zipfile_serialization=False)


def write_archive(folder, tensors):
    write_data(folder, tensors)
    with tarfile.open(folder / 'x.tgz', 'w:gz') as archive:
        for path in folder.glob('model.*'):
            archive.add(path, path.name)
    return folder / 'x.tgz'


def write_index(folder, tensors):
    write_bundle(folder / 'model', tensors)
    return folder / 'model.index'


def write_data(folder, tensors):
    write_bundle(folder / 'model', tensors)
    return folder / 'model.data-00000-of-00001'


def write_keras(folder, tensors, **options):
    with h5py.File(folder / 'x.h5', 'w') as file:
        file.attrs['layer_names'] = ['layer']
        layer = file.create_group('layer')
        layer.attrs['weight_names'] = list(tensors)
        for key, value in tensors.items():
            layer.create_dataset(key, data=value, **options)
    return folder / 'x.h5'


def write_checked_keras(folder, tensors):
    """With HDF5's own checksums, which Keras does not write."""
    return write_keras(folder, tensors, fletcher32=True)


def write_safetensors(folder, tensors):
    save_file(tensors, folder / 'x.safetensors')
    return folder / 'x.safetensors'


def flip(writer, folder, seed):
    """Flips one of all bits of a file: what was read, or the error."""
    values = np.random.default_rng(seed)
    tensors = {f't{i}': values.normal(size=900).astype('f4') for i in range(9)}
    path = writer(folder, tensors)
    data = bytearray(path.read_bytes())
    place = random.Random(seed).randrange(8 * len(data))
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)
    try:
        source = open_source(str(path))
    except ValueError as error:
        assert str(folder) in str(error)
        return 'found'
    equal = source.tensors.keys() == tensors.keys() and all(
        np.array_equal(source.tensors[key], value)
        for key, value in tensors.items())
    return 'equal' if equal else 'undetected'


CHECKED = [write_torch, write_archive, write_index, write_data]
UNCHECKED = [write_old_torch, write_keras, write_safetensors]


@pytest.mark.parametrize(
    'writer', [*CHECKED, *UNCHECKED, write_checked_keras],
    ids=lambda writer: writer.__name__)
def test_flipped_bits(writer, tmp_path):
    """In each of 60 files, one of all bits.

    What changes numbers cannot be found in formats without checksums. Of
    safetensors, that is almost the whole file.
    """
    counts = Counter()
    for seed in range(200 if writer is write_safetensors else 60):
        (tmp_path / f'{seed}').mkdir()
        counts[flip(writer, tmp_path / f'{seed}', seed)] += 1
    print(writer.__name__, dict(counts))
    assert counts['found']
    assert writer in UNCHECKED or not counts['undetected']


def test_archive_is_read_to_its_end(tmp_path):
    """Its checksum comes after all that tarfile reads."""
    path = write_archive(tmp_path, {'t': np.ones(9, 'f4')})
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match='damaged or cut off.* CRC'):
        open_source(str(path))
