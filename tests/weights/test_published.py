"""Published weights by name, without the internet.

The files are made here, from effdet's network with random weights, and served
by a server on this machine.
"""
import gzip
import hashlib
import json
import re
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from effdet.config.model_config import efficientdet_model_param_dict
from helpers.tiny_data import make_dataset, run_tool, write_config
from mmdet.apis import DetInferencer
from mmdet.datasets import CocoDataset
from mmdet.registry import MODELS
from mmengine.config import Config, DictAction
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader
from oracles import effdet_reference

from mmdet_efficientdet.scaling import SCALING
from mmdet_efficientdet.utils import config_file
from mmdet_efficientdet.weights import published

LITE0 = 'effdet://tf_efficientdet_lite0'
ADVPROP = 'automl://advprop/efficientdet-d0'
TEMPLATE = published.manifest()[LITE0]
# Slots of COCO's 90 ids that no object has, from id 1 (spec of the data set).
UNUSED = [12, 26, 29, 30, 45, 66, 68, 69, 71, 83]
CLASSES = 'bbox_head.conv_cls.pointwise.'


@pytest.fixture(scope='module')
def weights(effdet_lite0, effdet_file, tmp_path_factory):
    """A file of effdet's Lite0 with random weights, named as theirs are."""
    data = effdet_file.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    folder = tmp_path_factory.mktemp('published')
    path = folder / f'lite0-{digest[:8]}.pth'
    path.write_bytes(data)
    return SimpleNamespace(
        path=path,
        data=data,
        digest=digest,
        state_dict=effdet_reference.convert(effdet_lite0, 'lite0'))


class Server:
    """Serves ``bodies`` by path, and counts the requests.

    A body is bytes; a tuple (bytes, announced length, status) for a server
    that is broken. ``gate`` holds all bodies back until it is set.
    """

    def __init__(self):
        self.bodies, self.requests = {}, []
        self.gate = threading.Event()
        self.gate.set()
        outer = self

        class Handler(BaseHTTPRequestHandler):

            def do_GET(self):
                outer.requests.append(self.path)
                body = outer.bodies.get(self.path, (b'nothing', 7, 404))
                if isinstance(body, bytes):
                    body = body, len(body), 200
                data, length, status = body
                outer.gate.wait(600)
                self.send_response(status)
                if length is not None:
                    self.send_header('Content-Length', str(length))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.address = f'http://127.0.0.1:{self.server.server_port}/'
        threading.Thread(target=self.server.serve_forever).start()

    def close(self):
        """Afterwards the address refuses connections."""
        self.gate.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def dead():
    """An address at which nothing listens."""
    server = Server()
    server.close()
    return server.address


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of this test, and no proxy in front of this machine."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.delenv(published.VARIABLE, raising=False)
    monkeypatch.setattr(published, 'TIMEOUT', 600)  # of a busy machine
    return tmp_path / 'torch' / 'hub' / 'mmdet_efficientdet'


@pytest.fixture
def publish(monkeypatch, server, weights):
    """A function that changes what the manifest says of a file."""
    entries = dict(published.manifest())
    monkeypatch.setattr(published, 'manifest', lambda: entries)

    def change(path=LITE0, **changes):
        values = dict(addresses=(server.address, ), file=weights.path.name)
        entries[path] = replace(entries[path], **{**values, **changes})
        server.bodies['/' + entries[path].file] = weights.data
        return entries[path]

    return change


def load(path=LITE0):
    return CheckpointLoader.load_checkpoint(path, 'cpu')


def files_in(folder):
    return sorted(
        str(p.relative_to(folder)) for p in folder.rglob('*')
        if p.is_file() and p.suffix != '.lock')


def test_load(publish, server, weights, cache, monkeypatch):
    """effdet's values come out, once downloaded; its classes are COCO's 80."""
    publish()
    load()
    # What is in the cache needs no lock, so that the cache may be read-only.
    monkeypatch.setattr(published, 'FileLock', None)
    checkpoint = load()
    assert server.requests == ['/' + weights.path.name]
    assert files_in(cache) == [weights.path.name]
    used = torch.tensor([i - 1 for i in range(1, 91) if i not in UNUSED])
    state_dict = checkpoint['state_dict']
    expected = {
        k: v
        for k, v in weights.state_dict.items()
        if not k.endswith('num_batches_tracked')
    }
    assert state_dict.keys() == expected.keys()
    for key, value in expected.items():
        if key.startswith(CLASSES):
            value = value.unflatten(0, (9, 90))[:, used].flatten(0, 1)
        assert torch.equal(state_dict[key], value), key
    meta = checkpoint['meta']
    assert meta['source']['sha256'] == weights.digest
    assert len(meta['dataset_meta']['classes']) == 80
    assert meta['mean'] == [127.0] * 3 and meta['std'] == [128.0] * 3
    assert meta['published']['name'] == LITE0
    assert meta['published']['ap'] == 27.1


def test_load_with_all_digits_and_size(publish, weights):
    publish(sha256=weights.digest, bytes=len(weights.data))
    assert load()['meta']['source']['sha256'] == weights.digest


# What arrives, and what is said of it.
BROKEN = dict(
    truncated=(lambda data: (data[:-1000], len(data), 200),
               'cut off after {short} of {long} bytes'),
    truncated_without_length=(lambda data:
                              (data[:-1000], None, 200), 'its SHA-256 is'),
    flipped=(lambda data: data[:-1] + b'x',
             'its SHA-256 is {digest}, but should start with '),
    empty=(lambda data: b'', 'it is empty'),
    html=(lambda data: b'\n<!DOCTYPE html><html></html>',
          'it is a web page, not weights'),
    missing=(lambda data: (b'', 0, 404), 'HTTP Error 404'))


@pytest.mark.parametrize('what', BROKEN)
def test_broken_download(publish, server, weights, cache, what):
    """One message names the address and the reason; nothing is kept."""
    edit, reason = BROKEN[what]
    entry = publish()
    server.bodies['/' + entry.file] = edit(weights.data)
    with pytest.raises(ValueError) as error:
        load()
    length = len(weights.data)
    digest = hashlib.sha256(weights.data[:-1] + b'x').hexdigest()
    reason = reason.format(short=length - 1000, long=length, digest=digest)
    message = str(error.value)
    assert f'{LITE0} cannot be downloaded:' in message
    assert f'  {server.address}{entry.file}: {reason}' in message
    assert 'MMDET_EFFICIENTDET_WEIGHTS' in message
    assert files_in(cache) == []


def test_wrong_size(publish, weights):
    publish(bytes=len(weights.data) + 1)
    with pytest.raises(ValueError, match='instead of') as error:
        load()
    assert f'has {len(weights.data)} bytes' in str(error.value)


def test_wrong_full_hash(publish, weights):
    """All 64 digits count where they are known."""
    publish(sha256=weights.digest[:-1] + 'x')
    with pytest.raises(ValueError, match='but should be'):
        load()


@pytest.mark.parametrize('length', [True, False])
def test_truncated_without_hash(publish, server, cache, length):
    """An archive's own checksum finds what no hash can find."""
    data = gzip.compress(np.random.bytes(100_000))
    entry = publish(ADVPROP, file='advprop/x.tar.gz')
    assert not entry.known_hash
    server.bodies['/advprop/x.tar.gz'] = data
    assert published.fetch(entry).read_bytes() == data
    entry = publish(ADVPROP, file='advprop/y.tar.gz')
    announced = len(data) if length else None
    server.bodies['/advprop/y.tar.gz'] = data[:-9], announced, 200
    with pytest.raises(ValueError, match='cut off'):
        published.fetch(entry)
    assert files_in(cache) == ['advprop/x.tar.gz']


@pytest.mark.parametrize('suffix', ['.tar.gz', '.h5', '.pth'])
def test_wrong_format(publish, server, suffix):
    entry = publish(ADVPROP, file='x' + suffix)
    server.bodies['/x' + suffix] = b'text'
    with pytest.raises(ValueError, match='format does not match its name'):
        published.fetch(entry)


@pytest.mark.parametrize('first', ['dead', 'html'])
def test_second_mirror(publish, server, dead, weights, log, first):
    """A mirror that fails is followed by the next one."""
    server.bodies['/old/' + weights.path.name] = b'<html>'
    first = dict(dead=dead, html=server.address + 'old/')[first]
    publish(addresses=(first, server.address))
    assert load()['meta']['source']['sha256'] == weights.digest
    assert server.requests[-1] == '/' + weights.path.name
    start = next(i for i, x in enumerate(log) if x.startswith('Downloading'))
    assert log[start].startswith(f'Downloading {first}')
    assert log[start + 1].startswith('Failed: ')


def test_no_network(publish, dead, cache):
    """The message lists every mirror with its reason, and the way out."""
    entry = publish(addresses=(dead + 'a/', dead + 'b/'))
    with pytest.raises(ValueError) as error:
        load()
    lines = str(error.value).splitlines()
    assert lines[0] == f'{LITE0} cannot be downloaded:'
    for line, part in zip(lines[1:3], 'ab'):
        assert line.startswith(f'  {dead}{part}/{entry.file}: ')
        assert 'Connection refused' in line
    assert entry.file in lines[3]
    assert 'MMDET_EFFICIENTDET_WEIGHTS' in lines[3]
    assert files_in(cache) == []


def test_silent_server(publish, server, monkeypatch):
    """A server that accepts and says nothing is given up."""
    monkeypatch.setattr(published, 'TIMEOUT', 0.2)
    publish()
    server.gate.clear()
    with pytest.raises(ValueError, match='timed out'):
        load()


def test_damaged_cache_is_replaced(publish, server, weights, cache):
    publish()
    load()
    (cache / weights.path.name).write_bytes(weights.data[:-1])
    load()
    assert (cache / weights.path.name).read_bytes() == weights.data
    assert len(server.requests) == 2


def test_cache_that_cannot_be_written(publish, cache):
    publish()
    cache.parent.parent.mkdir()
    cache.parent.write_text('a file where the folder should be')
    with pytest.raises(ValueError, match='cannot write .*Set TORCH_HOME'):
        load()


PROCESS = '''
import sys
from dataclasses import replace
from mmdet_efficientdet.weights import published
published.TIMEOUT = 600
entry = replace(published.manifest()[{path!r}], file={file!r},
                addresses=({address!r}, ))
print('ready', flush=True)
print(published.fetch(entry).stat().st_size)
'''


@pytest.mark.slow
def test_two_processes(server, weights, cache):
    """Two that start together download once, and both get the file."""
    server.bodies['/' + weights.path.name] = weights.data
    server.gate.clear()
    source = PROCESS.format(
        path=LITE0, file=weights.path.name, address=server.address)
    processes = [
        subprocess.Popen([sys.executable, '-c', source],
                         stdout=subprocess.PIPE,
                         text=True) for _ in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout.readline() == 'ready\n'
        # Without a lock the other's request would come within this time.
        threading.Timer(2, server.gate.set).start()
        for process in processes:
            output = process.communicate(timeout=600)[0]
            assert output.splitlines()[-1] == str(len(weights.data))
    finally:
        for process in processes:
            process.kill()
    assert server.requests == ['/' + weights.path.name]
    assert files_in(cache) == [weights.path.name]


def test_folder(publish, server, weights, cache, monkeypatch):
    """The variable serves files without any request or cache."""
    publish()
    monkeypatch.setenv(published.VARIABLE, str(weights.path.parent))
    assert load()['meta']['source']['file'] == weights.path.name
    assert server.requests == [] and not cache.exists()


def test_folder_without_the_file(publish, server, weights, tmp_path,
                                 monkeypatch):
    publish()
    monkeypatch.setenv(published.VARIABLE, str(tmp_path))
    with pytest.raises(ValueError, match='nothing is downloaded') as error:
        load()
    assert str(error.value).count(f'  {tmp_path / weights.path.name}\n') == 1
    assert f'  {server.address}{weights.path.name}' in str(error.value)
    assert server.requests == []


def test_folder_with_another_file(publish, weights, tmp_path, monkeypatch):
    publish()
    monkeypatch.setenv(published.VARIABLE, str(tmp_path))
    (tmp_path / weights.path.name).write_bytes(weights.data + b'x')
    with pytest.raises(ValueError, match='is not the published file: its SHA'):
        load()


def test_folder_with_equal_names(tmp_path, monkeypatch):
    """Three files are called efficientdet-d2.tar.gz: none is mistaken."""
    monkeypatch.setenv(published.VARIABLE, str(tmp_path))
    bare = tmp_path / 'efficientdet-d2.tar.gz'
    bare.write_bytes(gzip.compress(b'x'))
    entries = published.manifest()
    assert published.fetch(entries['automl://efficientdet-d2']) == bare
    for folder in ('advprop', 'coco'):
        entry = entries[f'automl://{folder}/efficientdet-d2']
        with pytest.raises(ValueError, match=f'{folder}/efficientdet-d2.tar'):
            published.fetch(entry)
        (tmp_path / folder).mkdir()
        own = bare.rename(tmp_path / folder / bare.name)
        assert published.fetch(entry) == own
        own.rename(bare)


@pytest.mark.parametrize('name, similar', [
    ('effdet://tf_efficientdet_d00', 'effdet://tf_efficientdet_d0'),
    ('effdet://efficientdet-d3', 'automl://efficientdet-d3'),
    ('automl://efficientdet_d7x', 'automl://efficientdet-d7x'),
    ('automl://efficientdet-lite5', 'automl://efficientdet-lite4'),
])
def test_unknown_name(name, similar):
    with pytest.raises(ValueError, match='Similar: ') as error:
        load(name)
    assert similar in re.split(r'[,.]? ', str(error.value))


def test_unusable_file():
    """Weights that would load, but predict something else, are refused."""
    with pytest.raises(ValueError, match='symmetric padding'):
        load('effdet://efficientdet_d0')


def test_pin(publish, weights, log, monkeypatch):
    """A hash in the name is checked; where none is known, it is told."""
    monkeypatch.setattr(published.PublishedFile, 'known_hash', '')
    publish()
    load()
    pinned = f'{LITE0}#sha256={weights.digest}'
    assert [line for line in log if line.endswith(f'write {pinned}')]
    del log[:]
    load(pinned)
    assert not [line for line in log if 'No hash' in line]
    wrong = '0' * 8 + weights.digest[8:]
    with pytest.raises(ValueError, match=f'should be {wrong}'):
        load(f'{LITE0}#sha256={wrong}')
    for pin in ('', '0123', 'g' * 64, weights.digest.upper()):
        with pytest.raises(ValueError, match='hexadecimal digits'):
            load(f'{LITE0}#sha256={pin}')


@pytest.mark.slow
def test_wrong_weights_in_the_file(publish, weights):
    """What does not fit the size of the name is refused, naming the file."""
    publish('effdet://tf_efficientdet_lite1')
    with pytest.raises(ValueError, match='delete it and try again') as error:
        load('effdet://tf_efficientdet_lite1')
    assert 'weights are of lite0' in str(error.value)
    assert weights.path.name in str(error.value)


def test_conventions_of_advprop(publish, log):
    """They reach the checkpoint and its config, and are told to the user.

    The input is 2 x / 255 - 1, and padding is black, -1.
    """
    publish(
        mean=[127.5] * 3,
        std=[127.5] * 3,
        pad_value=-1.0,
        aspect_pairs=published.manifest()[ADVPROP].aspect_pairs)
    meta = load()['meta']
    assert meta['mean'] == meta['std'] == [127.5] * 3
    assert meta['aspect_pairs'][1] == [2**0.5, 0.5**0.5]
    model = MODELS.build(Config.fromstring(meta['cfg'], '.py').model)
    image = torch.full((3, 64, 32), 255, dtype=torch.uint8)
    data = model.data_preprocessor(
        dict(inputs=[image], data_samples=None), False)['inputs']
    assert (data[..., :64, :32] == 1).all() and (data[..., 64:, :] == -1).all()
    assert model.bbox_head.prior_generator.aspect_pairs[1] == \
        pytest.approx((2**0.5, 0.5**0.5))
    text, = [line for line in log if '--cfg-options' in line]
    options = text.split('--cfg-options ')[1].split(' ')
    options = dict(option.strip("'").split('=') for option in options)
    config = Config.fromfile(config_file('lite0'))
    config.merge_from_dict({
        k: DictAction._parse_iterable(v)
        for k, v in options.items()
    })
    assert config.model.data_preprocessor.pad_value == -1
    assert config.model.data_preprocessor.mean == [127.5] * 3
    assert config.model.data_preprocessor.std == [127.5] * 3
    assert np.array_equal(config.model.bbox_head.anchor_generator.aspect_pairs,
                          meta['aspect_pairs'])


def test_no_advice_where_the_config_fits(publish, log):
    shipped = Config.fromfile(config_file('lite0')).model
    publish(aspect_pairs=shipped.bbox_head.anchor_generator.aspect_pairs)
    load()
    assert not [line for line in log if '--cfg-options' in line]


def test_image_size_of_the_file(publish, log):
    """Weights for another input than the size's say so."""
    publish(image_size=640)
    config = Config.fromstring(load()['meta']['cfg'], '.py')
    assert config.model.data_preprocessor.pad_size_divisor == 640
    assert [line for line in log if 'image_size=640' in line]


@pytest.mark.slow
def test_init_cfg_of_a_detector(publish, weights, model_cfg):
    """Any host's way to load weights takes the name."""
    publish()
    config = model_cfg('lite0', 80)
    config.init_cfg = dict(type='Pretrained', checkpoint=LITE0)
    model = MODELS.build(config)
    model.init_weights()
    key = 'neck.layers.2.nodes.7.conv.pointwise.weight'
    assert torch.equal(model.state_dict()[key], weights.state_dict[key])
    other = MODELS.build(model_cfg('lite0', 80))
    load_checkpoint(other, LITE0)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_backbone_of_a_detector(publish, weights, model_cfg):
    publish()
    config = model_cfg('lite0').backbone
    config.init_cfg = dict(
        type='Pretrained', prefix='backbone.', checkpoint=LITE0)
    backbone = MODELS.build(config)
    backbone.init_weights()
    assert torch.equal(backbone.stem.conv.weight,
                       weights.state_dict['backbone.stem.conv.weight'])


def test_inferencer_without_a_config(publish):
    publish()
    inferencer = DetInferencer(weights=LITE0, device='cpu')
    image = np.random.randint(0, 255, (64, 96, 3), np.uint8)
    result, = inferencer(image)['predictions']
    assert set(result) == {'labels', 'scores', 'bboxes'}
    assert inferencer.model.dataset_meta['classes'][0] == 'person'


@pytest.mark.slow
def test_stock_test_script(automl_lite0, tmp_path):
    """test.py takes a name; the file is an archive as google/automl's."""
    root = make_dataset(tmp_path / 'data')
    classes = CocoDataset.METAINFO['classes']
    annotations = json.loads((root / 'coco.json').read_text())
    annotations['categories'] = [
        dict(id=i, name=name) for i, name in enumerate(classes, 5)
    ]
    (root / 'coco.json').write_text(json.dumps(annotations))
    config = write_config(tmp_path / 'c.py', root, classes=classes)
    source = f'''
import os, runpy, sys
os.environ[{published.VARIABLE!r}] = {str(automl_lite0.folder)!r}
runpy.run_path(sys.argv[0], run_name='__main__')
'''
    done = run_tool(
        'test.py',
        config,
        'automl://efficientdet-lite0',
        cwd=tmp_path,
        source=source)
    assert done.code == 0, done.output
    assert 'bbox_mAP' in done.output
    assert 'automl://efficientdet-lite0#sha256=' in done.output
    assert 'aspect_pairs=[[1.0,1.0],[1.4142' in done.output


# ------------------------------------------------------------ the manifest --


def entries_of(scheme):
    return {
        e.name: e
        for e in published.manifest().values() if e.scheme == scheme
    }


def test_effdet_files_are_those_of_effdet():
    """Addresses, sizes of inputs and files of all its EfficientDets."""
    theirs = {
        name: row
        for name, row in efficientdet_model_param_dict.items()
        if name.startswith('tf_') or name in ('efficientdet_d0',
                                              'efficientdet_d1')
    }
    entries = entries_of('effdet')
    for name, row in theirs.items():
        entry = entries.pop(name)
        assert entry.addresses[0] + entry.file == row['url']
        side = row['image_size'][0]
        assert SCALING[entry.size].image_size == side
        assert entry.size in name.split('_')
        if '_ap' in name:
            assert entry.mean == [255 * x for x in row['mean']]
            assert entry.std == [255 * x for x in row['std']]
            assert row['fill_color'] == 0 and entry.pad_value == -1
        elif 'lite' not in name:
            assert 'mean' not in row  # ImageNet's
    for name, entry in entries.items():  # the older ones
        assert name == Path(entry.file).stem
        assert name.startswith(f'tf_efficientdet_{entry.size}-')


@pytest.mark.parametrize('path', published.manifest())
def test_entry(path):
    entry = published.manifest()[path]
    row = SCALING[entry.size]
    if entry.pad_value:
        assert 'AdvProp' in entry.origin and entry.pad_value == -1
        assert entry.mean == entry.std == [127.5] * 3
    else:
        assert (tuple(entry.mean), tuple(entry.std)) == (row.mean, row.std)
    late = 'lite' in entry.size or entry.pad_value
    side = 2**0.5 if late else 1.4
    other = 0.5**0.5 if late else 0.7
    assert np.array_equal(entry.aspect_pairs, [(1, 1), (side, other),
                                               (other, side)])
    april = 'April' in entry.origin  # before the official code changed
    assert entry.resize == ('legacy' if april else 'half-pixel')
    assert set(entry.how_sure) == {
        'addresses', 'sha256', 'ap', 'mean', 'aspect_pairs', 'resize'
    }
    assert entry.licence and entry.origin
    assert all(
        a.startswith('https://') and a.endswith('/') for a in entry.addresses)
    if entry.scheme == 'effdet':
        assert len(entry.known_hash) in (8, 64)
    if entry.sha256:
        short = entry.file[-12:-4]
        assert len(entry.sha256) == 64 and entry.bytes
        if entry.scheme == 'effdet':
            assert entry.sha256.startswith(short)
    assert entry.ap is None or 20 < entry.ap < 60


def test_files_are_different():
    entries = published.manifest().values()
    assert len({(e.scheme, e.file) for e in entries}) == len(entries)


# Elements of a state dict with 90 classes, and of the averages' copies of
# what is trained (spec_counts.py).
ELEMENTS = dict(d0=3_927_203, d1=6_697_354, d2=8_178_815, d3=12_146_600,
                d4=20_890_987)  # yapf: disable


@pytest.mark.parametrize('size', ELEMENTS)
def test_recorded_bytes_are_plausible(size):
    """4 bytes an element, and a little more; archives hold two copies."""
    expected = 4 * ELEMENTS[size]
    entry = published.manifest()[f'effdet://tf_efficientdet_{size}']
    assert expected < entry.bytes < 1.02 * expected
    entry = published.manifest()[f'automl://efficientdet-{size}']
    if entry.bytes:
        assert 0.8 < entry.bytes / (2 * expected) < 1


# val2017 and test-dev AP of google/automl's README.
OFFICIAL = dict(
    d0=(34.3, 34.6), d1=(40.2, 40.5), d2=(43.5, 43.9), d3=(46.8, 47.2),
    d4=(49.3, 49.7), d5=(51.2, 51.5), d6=(52.1, 52.6), d7=(53.4, 53.7),
    d7x=(54.4, 55.1), lite0=(26.41, None), lite1=(31.50, None),
    lite2=(35.06, None), lite3=(38.77, None), lite3x=(42.64, None),
    lite4=(43.18, None))  # yapf: disable


def test_official_ap():
    for size, ap in OFFICIAL.items():
        for suffix in ('', '.h5'):
            name = f'automl://efficientdet-{size}{suffix}'
            if suffix and 'lite' in size:
                assert name not in published.manifest()
            else:
                entry = published.manifest()[name]
                assert (entry.ap, entry.test_dev) == ap and entry.size == size
