"""Damage of a file is found, or does not reach the weights."""
import random
import tarfile

import numpy as np
import pytest
import torch
from helpers.tensorflow_files import write_bundle

from mmdet_efficientdet.weights.sources import open_source


def write_torch(folder, tensors):
    path = folder / 'x.pth'
    torch.save({k: torch.from_numpy(v) for k, v in tensors.items()}, path)
    return path


def write_archive(folder, tensors):
    (folder / 'model').mkdir()
    write_bundle(folder / 'model' / 'model', tensors)
    with tarfile.open(folder / 'x.tgz', 'w:gz') as archive:
        archive.add(folder / 'model', 'model')
    return folder / 'x.tgz'


@pytest.mark.parametrize('write', [write_torch, write_archive])
@pytest.mark.parametrize('seed', range(12))
def test_flipped_bits(write, seed, tmp_path):
    """In each, one of all bits of the file."""
    values = np.random.default_rng(seed)
    tensors = {f't{i}': values.normal(size=900).astype('f4') for i in range(9)}
    path = write(tmp_path, tensors)
    data = bytearray(path.read_bytes())
    place = random.Random(seed).randrange(8 * len(data))
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)
    try:
        found = open_source(str(path)).tensors
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert found.keys() == tensors.keys()
        for key, value in tensors.items():
            assert np.array_equal(found[key], value)


def test_archive_is_read_to_its_end(tmp_path):
    """Its checksum comes after all that tarfile reads."""
    path = write_archive(tmp_path, {'t': np.ones(9, 'f4')})
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match='damaged or cut off: CRC'):
        open_source(str(path))
