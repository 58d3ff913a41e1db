"""Files that are made to cost time or memory, or to read other files."""
import gzip
import io
import os
import resource
import tarfile
import time
import zipfile
from contextlib import contextmanager

import h5py
import numpy as np
import pytest
import torch
from helpers.tensorflow_files import (HEADER, entry_of, field, fixed,
                                      plain_rows, shape_field, varint,
                                      write_bundle, write_index)

from mmdet_efficientdet.weights.sources import open_source
from mmdet_efficientdet.weights.tensorflow import masked_crc32c

ONES = np.ones(3, 'f4')
GOOD = entry_of(ONES, 0)
CRC = fixed(6, masked_crc32c(ONES.tobytes()))
TERABYTE = 1 << 40


@contextmanager
def little():
    """At most 5 seconds and 1 GB more than before."""
    with open('/proc/self/statm') as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30), old[1]))
    start = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)
    assert time.process_time() - start < 5


def refuses(path, *words):
    with little(), pytest.raises(ValueError) as error:
        open_source(str(path))
    for word in (str(path), *words):
        assert word in str(error.value)
    assert len(str(error.value)) < 500 and str(error.value).isprintable()


def message(kind=1, shape=(3, ), offset=0, size=12, crc=CRC):
    return (field(1, kind) + shape_field(shape) + field(4, offset) +
            field(5, size) + crc)


# Messages about a tensor named `t`, and the words of the error.
ENTRIES = dict(
    shape=(message(shape=(3, 3)), '12 bytes', '[3, 3] of float32'),
    type=(message(kind=2), '12 bytes', '[3] of float64'),
    long_shape=(message(shape=[1] * 300_000 + [3]), 'do not fit its shape'),
    huge_shape=(message(shape=(0, 1 << 62, 9), size=0), ''),
    negative_shape=(message(shape=(2**64 - 1, )), 'do not fit its shape'),
    huge=(message(shape=(TERABYTE, ), size=4 * TERABYTE), '4398046511104'),
    negative_size=(message(size=2**64 - 1), 'do not fit its shape'),
    huge_size=(message(shape=(1 << 30, ), size=1 << 32), 'cut off'),
    outside=(message(offset=4), 'cut off', 'byte 16 of 12'),
    negative=(message(offset=2**64 - 4), 'cut off'),
    checksum=(message(crc=fixed(6, 1)), 'checksum differs'),
    no_checksum=(message(crc=b''), 'checksum differs'),
    unknown=(message(kind=99), 'unknown type 99'),
    slices=(message() + field(7, b''), 'slices'),
    text_as_type=(field(1, b'1'), 'wrong type'),
    number_as_shape=(field(1, 1) + field(2, 3), 'wrong type'),
    number_as_dim=(field(1, 1) + field(2, field(2, 3)), 'damaged'),
    text_as_dim=(field(1, 1) + field(2, field(2, field(1, b'3'))),
                 'wrong type'),
    text_as_offset=(message() + field(4, b'0'), 'wrong type'),
    text_as_size=(message() + field(5, b'0' * 9999), 'wrong type'),
    text_as_file=(message() + field(3, b'0'), 'wrong type'),
    number_as_checksum=(message(crc=field(6, 5)), 'wrong type'),
    other_file=(message() + field(3, 7), '.data-00007-of-00001',
                'is missing'),
    cut_off=(message()[:-2], 'is cut off'))  # yapf: disable


@pytest.mark.parametrize('name', ENTRIES)
def test_entries(name, tmp_path):
    """Each names the checkpoint and the tensor."""
    entry, *words = ENTRIES[name]
    write_bundle(tmp_path / 'x', dict(t=ONES))
    write_index(tmp_path / 'x', [(plain_rows([HEADER, (b't', entry)]), b't')])
    if name != 'cut_off':  # this is already seen in the index
        words += [f'{tmp_path / "x"}: t ']
    refuses(tmp_path / 'x', *words)


def shared(count, length):
    """Rows whose keys share a start of this length."""
    first = varint(0) + varint(length) + varint(0) + b't' * length
    return first + b''.join(
        varint(length) + varint(3) + varint(0) + i.to_bytes(3, 'big')
        for i in range(count))


def rows(*entries):
    return [(plain_rows(entries), entries[-1][0])]


GROWING = b''.join(
    varint(i) + varint(1) + varint(0) + b't' for i in range(200_000))
MANY = [(b'%07d' % i, b'') for i in range(100)]
INDEXES = dict(
    growing_names=([(GROWING, b't')], {}, 'names are too long'),
    shared_names=([(shared(100_000, 400_000), b't')
                   ], {}, 'names are too long'),
    same_block=(rows(HEADER, (b't', GOOD)), dict(repeat=100_000),
                'blocks overlap'),
    big_endian=(rows((b'', field(1, 1) + field(2, 1)), (b't', GOOD)), {},
                'big-endian'),
    header=(rows((b'', field(1, b'x')), (b't', GOOD)), {},
            'wrong type'),
    unsorted=(rows(HEADER, (b't', GOOD), (b's', GOOD)), {}, 'not sorted'),
    twice=(rows(HEADER, (b't', GOOD), (b't', GOOD)), {}, 'not sorted'),
    no_text=(rows(HEADER, (b'\xff', GOOD)), {}, "can't decode"),
    long_number=([(b'\xff' * 1_500_000, b't')], {}, 'more than 64 bits'),
    long_field=(rows(HEADER, (b't', b'\xff' * 1_500_000)), {},
                'more than 64 bits'),
    outside=([(varint(0) + varint(9) + varint(1 << 60), b't')], {},
             'is cut off'),
    no_such_start=([(varint(9) + varint(1) + varint(0) + b't', b't')], {},
                   'is cut off'),
    wire_type=(rows(HEADER, (b't', b'\x0b')), {}, 'damaged'),
    compressed=(rows(HEADER, (b't', GOOD)), dict(compression=b'\1'),
                'compressed'))  # yapf: disable


@pytest.mark.parametrize('name', INDEXES)
def test_indexes(name, tmp_path):
    """Each names the file."""
    blocks, options, words = INDEXES[name]
    write_bundle(tmp_path / 'x', dict(t=ONES))
    write_index(tmp_path / 'x', blocks, **options)
    refuses(tmp_path / 'x', words)


def test_large_index(tmp_path):
    """A file of holes, whose size is no longer that of an index."""
    for size, words in ((3_000_000, 'too large'), (TERABYTE,
                                                   f'has {TERABYTE} bytes')):
        with open(tmp_path / 'x.index', 'wb') as file:
            file.truncate(size)
        refuses(tmp_path / 'x', 'x.index', words)


def test_tensors_of_one_place(tmp_path):
    """Many names of the same numbers."""
    write_bundle(tmp_path / 'x', dict(t=ONES))
    names = [(b't%05d' % i, GOOD) for i in range(20_000)]
    write_index(tmp_path / 'x', rows(HEADER, *names))
    refuses(tmp_path / 'x', 't00001', 'overlaps other tensors')


def test_large_data(tmp_path):
    """Of which only the start is used."""
    write_bundle(tmp_path / 'x', dict(t=ONES))
    os.truncate(tmp_path / 'x.data-00000-of-00001', TERABYTE)
    refuses(tmp_path / 'x', 'x.data-00000-of-00001 has 1099511627',
            'more than')


def write_keras(path, edit):
    """A file with one tensor, `layer/t:0`, which ``edit`` changes."""
    with h5py.File(path, 'w') as file:
        file.attrs['layer_names'] = ['layer']
        layer = file.create_group('layer')
        layer.attrs['weight_names'] = ['a/t:0']
        layer['a/t:0'] = ONES
        edit(file, layer)


def replace(layer, value=None, **options):
    del layer['a/t:0']
    if options:
        layer.create_dataset('a/t:0', **options)
    else:
        layer['a/t:0'] = value


def link_loop(file, layer):
    replace(layer, h5py.SoftLink('/layer/b'))
    layer['b'] = h5py.SoftLink('/layer/a/t:0')


def external_group(file, layer):
    del file['layer']
    file['layer'] = h5py.ExternalLink('other.h5', '/layer')


def external_root(file, layer):
    file['model_weights'] = h5py.ExternalLink('other.h5', '/')


def virtual(file, layer):
    layout = h5py.VirtualLayout((3, ), 'f4')
    layout[:] = h5py.VirtualSource('other.h5', 'layer/a/t:0', (3, ))
    del layer['a/t:0']
    layer.create_virtual_dataset('a/t:0', layout)


def twice(file, layer):
    layer.attrs['weight_names'] = ['a/t:0'] * 90


def hard_links(file, layer):
    replace(layer, shape=(1 << 28, ), dtype='f4', chunks=(1 << 10, ))
    names = [f't{i}' for i in range(5)]
    for name in names:
        layer[name] = layer['a/t:0']
    layer.attrs['weight_names'] = names


KERAS = dict(
    external=(lambda f, g: replace(g, h5py.ExternalLink('other.h5', '/a')),
              'a/t:0', 'is a link'),
    external_group=(external_group, 'layer', 'is a link'),
    external_root=(external_root, 'model_weights', 'is a link'),
    link_loop=(link_loop, 'a/t:0', 'is a link'),
    soft=(lambda f, g: replace(g, h5py.SoftLink('/nowhere')), 'is a link'),
    storage=(lambda f, g: replace(
        g, shape=(3, ), dtype='f4', external=[('other.h5', 0, 12)]), 'a/t:0',
        'no array of numbers in this file'),
    virtual=(virtual, 'a/t:0', 'in this file'),
    terabytes=(lambda f, g: replace(
        g, shape=(TERABYTE, ), dtype='f4', chunks=(1 << 10, )),
        'contents has 4398046511104'),
    large_shape=(lambda f, g: replace(
        g, shape=(1 << 31, 1 << 31), dtype='f8', chunks=(9, 9)), 'more than'),
    chunks=(lambda f, g: replace(
        g, shape=(3, ), maxshape=(None, ), dtype='f8',
        chunks=((1 << 29) - 1, ), compression='gzip'),
        'contents has 4294967288'),
    hard_links=(hard_links, 'contents has 5368709120'),
    empty=(lambda f, g: replace(g, h5py.Empty('f4')), 'a/t:0', 'no array'),
    text=(lambda f, g: replace(g, 'text'), 'a/t:0', 'no array'),
    struct=(lambda f, g: replace(g, np.zeros(3, 'i4,f4')), 'no array'),
    group=(lambda f, g: g.attrs.update(weight_names=['a']), 'no array'),
    twice=(twice, 'a/t', 'twice'),
    numbers=(lambda f, g: g.attrs.update(weight_names=[1]), 'damaged'),
    missing=(lambda f, g: g.attrs.update(weight_names=['b']), 'damaged'),
    no_list=(lambda f, g: g.attrs.update(weight_names=h5py.Empty('f4')),
             'damaged'))  # yapf: disable


@pytest.mark.parametrize('name', KERAS)
def test_keras(name, tmp_path, monkeypatch):
    """Each names the file and, where there is one, the tensor."""
    monkeypatch.chdir(tmp_path)
    edit, *words = KERAS[name]
    write_keras('other.h5', lambda file, layer: None)
    assert list(open_source('other.h5').tensors) == ['a/t']
    write_keras('x.h5', edit)
    refuses('x.h5', *words)


TORCH = dict(
    meta=(dict(t=torch.ones(3, device='meta')), 'no data of t'),
    expanded=(dict(s=torch.ones(2), t=torch.ones(1).expand(57_500_000_000)),
              'up to t', '230000000008'),
    together=({f't{i}': torch.ones(1).expand(1 << 17)
               for i in range(5)}, 'up to t2'),
    sparse=(dict(t=torch.sparse_coo_tensor(
        torch.zeros(2, 1).long(), torch.ones(1), (10**6, 10**6))),
        'up to t'))  # yapf: disable


@pytest.mark.parametrize('name', TORCH)
def test_torch(name, tmp_path):
    state_dict, *words = TORCH[name]
    torch.save(state_dict, tmp_path / 'x.pth')
    refuses(tmp_path / 'x.pth', *words)


def test_compressed_torch(tmp_path):
    """A zip file that is larger inside than outside."""
    path = tmp_path / 'x.pth'
    torch.save(dict(t=torch.zeros(1 << 20)), tmp_path / 'y.pth')
    with zipfile.ZipFile(tmp_path / 'y.pth') as old, zipfile.ZipFile(
            path, 'w', zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    refuses(path, 'its contents', 'more than')


def test_nested_lists(tmp_path):
    """Written out, the text of the config would have 2**60 parts."""
    nested = []
    for _ in range(60):
        nested = [nested, nested]
    meta = dict(cfg=nested, dataset_meta=nested)
    torch.save(
        dict(meta=meta, state_dict=dict(t=torch.ones(3))), tmp_path / 'x.pth')
    with little():
        assert list(open_source(tmp_path / 'x.pth').tensors) == ['t']


def archive(path, names, size=3):
    """An archive of files with the size and zeros as contents."""
    with tarfile.open(path, 'w:gz') as file:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = size
            file.addfile(member, io.BytesIO(bytes(size)))


@pytest.mark.parametrize('second', ['x.index', './x.index', 'y/../x.index'])
def test_archive_of_equal_names(tmp_path, second):
    archive(tmp_path / 'x.tgz', ['x.index', second])
    refuses(tmp_path / 'x.tgz', 'one name')


def test_archive_of_holes(tmp_path):
    """A sparse file takes a few bytes in the archive."""
    member = tarfile.TarInfo('x.index')
    member.pax_headers = {
        'GNU.sparse.major': '1',
        'GNU.sparse.minor': '0',
        'GNU.sparse.name': 'x.index',
        'GNU.sparse.realsize': f'{TERABYTE}'
    }
    map_of_data = f'1\n{TERABYTE}\n0\n'.encode().ljust(512, b'\0')
    member.size = len(map_of_data)
    with tarfile.open(tmp_path / 'x.tgz', 'w:gz') as file:
        file.addfile(member, io.BytesIO(map_of_data))
    refuses(tmp_path / 'x.tgz', f'{TERABYTE}', 'more than')


def test_archive_of_zeros(tmp_path):
    """It is not unpacked to more than the limit."""
    part = gzip.compress(bytes(1 << 26))
    (tmp_path / 'x.tgz').write_bytes(part * 50)
    with pytest.raises(ValueError, match='contents has .* more than'):
        open_source(tmp_path / 'x.tgz')
