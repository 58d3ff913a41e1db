"""Published weights by name, without the internet.

The files are made here, from effdet's network with random weights, and served
by a server on this machine.
"""
import gzip
import hashlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from effdet.config.model_config import efficientdet_model_param_dict
from filelock import FileLock
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
from mmdet_efficientdet.weights.schemes import load_entry

LITE0 = 'effdet://tf_efficientdet_lite0'
ADVPROP = 'automl://advprop/efficientdet-d0'
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
    that is broken; or a function of the handler. ``gate`` holds all bodies
    back until it is set.
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
                if callable(body):
                    return body(self)
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
    return tmp_path / 'torch' / 'hub' / 'mmdet_efficientdet'


@pytest.fixture
def publish(server, weights):
    """A function: the entry of a file on the server, perhaps changed."""

    def change(path=LITE0, **changes):
        values = dict(addresses=(server.address, ), file=weights.path.name)
        entry = replace(published.manifest()[path], **{**values, **changes})
        server.bodies['/' + entry.file] = weights.data
        return entry

    return change


def load(path):
    return CheckpointLoader.load_checkpoint(path, 'cpu')


def files_in(folder):
    return sorted(
        str(p.relative_to(folder)) for p in folder.rglob('*')
        if p.is_file() and p.suffix != '.lock')


@pytest.mark.slow
def test_load(publish, server, weights, cache):
    """effdet's values come out, once downloaded; its classes are COCO's 80."""
    entry = publish()
    load_entry(entry)
    # What is in the cache needs no lock, so that the cache may be read-only.
    with FileLock(cache / f'{entry.file}.lock'):
        checkpoint = load_entry(entry)
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
    entry = publish(sha256=weights.digest, bytes=len(weights.data))
    assert load_entry(entry)['meta']['source']['sha256'] == weights.digest


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
        load_entry(entry)
    length = len(weights.data)
    digest = hashlib.sha256(weights.data[:-1] + b'x').hexdigest()
    reason = reason.format(short=length - 1000, long=length, digest=digest)
    message = str(error.value)
    assert f'{LITE0} cannot be downloaded:' in message
    assert f'  {server.address}{entry.file}: {reason}' in message
    assert 'MMDET_EFFICIENTDET_WEIGHTS' in message
    assert files_in(cache) == []


def test_wrong_size(publish, weights):
    entry = publish(bytes=len(weights.data) + 1)
    with pytest.raises(ValueError, match='instead of') as error:
        published.fetch(entry)
    assert f'has {len(weights.data)} bytes' in str(error.value)


def test_wrong_full_hash(publish, weights):
    """All 64 digits count where they are known."""
    entry = publish(sha256=weights.digest[:-1] + 'x')
    with pytest.raises(ValueError, match='but should be'):
        published.fetch(entry)


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
    entry = publish(addresses=(first, server.address))
    assert published.fetch(entry).read_bytes() == weights.data
    assert server.requests[-1] == '/' + weights.path.name
    start = next(i for i, x in enumerate(log) if x.startswith('Downloading'))
    assert log[start].startswith(f'Downloading {first}')
    assert log[start + 1].startswith('Failed: ')


def test_no_network(publish, dead, cache):
    """The message lists every mirror with its reason, and the way out."""
    entry = publish(addresses=(dead + 'a/', dead + 'b/'))
    with pytest.raises(ValueError) as error:
        published.fetch(entry)
    lines = str(error.value).splitlines()
    assert lines[0] == f'{LITE0} cannot be downloaded:'
    for line, part in zip(lines[1:3], 'ab'):
        assert line.startswith(f'  {dead}{part}/{entry.file}: ')
        assert 'Connection refused' in line
    assert entry.file in lines[3]
    assert 'MMDET_EFFICIENTDET_WEIGHTS' in lines[3]
    assert files_in(cache) == []


def drip(seconds, head=b''):
    """A server that sends one byte after the other."""

    def body(handler):
        handler.wfile.write(head)
        with suppress(OSError):  # when the client has gone
            while True:
                handler.wfile.write(b'x')
                time.sleep(seconds)

    return body


SLOW = dict(
    silent=lambda handler: time.sleep(3),
    body=drip(0.02, b'HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n'),
    no_length=drip(0.02, b'HTTP/1.1 200 OK\r\n\r\n'),
    headers=drip(0.02, b'HTTP/1.1 200 OK\r\nX: '))


@pytest.mark.parametrize('what', SLOW)
def test_slow_server(publish, server, weights, cache, log, what):
    """It is given up, although something always comes, for the next one."""
    slow = server.address + 'slow/'
    entry = publish(addresses=(slow, server.address))
    server.bodies['/slow/' + entry.file] = SLOW[what]
    start = time.monotonic()
    path = published.fetch(entry, timeout=0.5)
    assert time.monotonic() - start < 5
    assert path.read_bytes() == weights.data
    assert files_in(cache) == [entry.file]
    line, = [line for line in log if line.startswith('Failed: ')]
    assert 'timed out' in line or ' in 0.5 seconds' in line


def test_steady_server(publish, server, weights):
    """A slow one that goes on is not given up when the time is over."""
    entry = publish()

    def body(handler):
        handler.wfile.write(b'HTTP/1.1 200 OK\r\n\r\n')
        step = len(weights.data) // 8 + 1
        for i in range(0, len(weights.data), step):
            time.sleep(0.2)
            handler.wfile.write(weights.data[i:i + step])

    server.bodies['/' + entry.file] = body
    assert published.fetch(entry, timeout=1).read_bytes() == weights.data


def endless(handler):
    handler.wfile.write(b'HTTP/1.1 200 OK\r\n\r\nPK')
    with suppress(OSError):
        while True:
            handler.wfile.write(bytes(1 << 18))


def test_too_much(publish, server, weights, cache):
    """No more is written than the list of files says."""
    entry = publish(bytes=len(weights.data))
    server.bodies['/' + entry.file] = endless
    with pytest.raises(ValueError, match='more than') as error:
        published.fetch(entry)
    assert f'{len(weights.data)} bytes' in str(error.value)
    assert files_in(cache) == []


def test_damaged_cache_is_replaced(publish, server, weights, cache):
    entry = publish()
    published.fetch(entry)
    (cache / weights.path.name).write_bytes(weights.data[:-1])
    published.fetch(entry)
    assert (cache / weights.path.name).read_bytes() == weights.data
    assert len(server.requests) == 2


def test_cache_that_cannot_be_written(publish, cache):
    cache.parent.parent.mkdir()
    cache.parent.write_text('a file where the folder should be')
    with pytest.raises(ValueError, match='cannot write .*Set TORCH_HOME'):
        published.fetch(publish())


PROCESS = '''
import sys
from dataclasses import replace
from mmdet_efficientdet.weights import published
entry = replace(published.manifest()[{path!r}], file={file!r},
                addresses=({address!r}, ))
print('ready', flush=True)
print(published.fetch(entry).stat().st_size)
'''


@pytest.fixture
def processes(server, weights):
    """Starts a process that fetches the file, and waits until it does."""
    started = []
    server.bodies['/' + weights.path.name] = weights.data
    source = PROCESS.format(
        path=LITE0, file=weights.path.name, address=server.address)

    def start():
        started.append(
            subprocess.Popen([sys.executable, '-c', source],
                             stdout=subprocess.PIPE,
                             text=True))
        assert started[-1].stdout.readline() == 'ready\n'
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_for(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise TimeoutError


@pytest.mark.slow
def test_two_processes(server, weights, cache, processes):
    """Two that start together download once, and both get the file.

    The second says that it waits, and for which process.
    """
    server.gate.clear()
    first = processes()
    wait_for(lambda: server.requests)
    second = processes()
    line = second.stdout.readline()
    assert 'Waiting for ' in line and weights.path.name in line
    assert f'process {first.pid} of {socket.gethostname()}' in line
    server.gate.set()
    for process in (first, second):
        output = process.communicate(timeout=600)[0]
        assert output.splitlines()[-1] == str(len(weights.data))
    assert server.requests == ['/' + weights.path.name]
    assert files_in(cache) == [weights.path.name]


@pytest.mark.slow
def test_killed_process(publish, server, weights, cache, processes):
    """What it has written is removed, and its lock is free."""
    server.gate.clear()
    process = processes()
    wait_for(lambda: server.requests)
    process.kill()
    process.wait()
    (cache / f'{weights.path.name}.partial').write_bytes(b'half')
    server.gate.set()
    published.fetch(publish())
    assert files_in(cache) == [weights.path.name]


def test_folder(publish, server, weights, cache, monkeypatch):
    """The variable serves files without any request or cache."""
    monkeypatch.setenv(published.VARIABLE, str(weights.path.parent))
    assert published.fetch(publish()) == weights.path
    assert server.requests == [] and not cache.exists()


def test_folder_without_the_file(publish, server, weights, tmp_path,
                                 monkeypatch):
    monkeypatch.setenv(published.VARIABLE, str(tmp_path))
    with pytest.raises(ValueError, match='nothing is downloaded') as error:
        published.fetch(publish())
    assert str(error.value).count(f'  {tmp_path / weights.path.name}\n') == 1
    assert f'  {server.address}{weights.path.name}' in str(error.value)
    assert server.requests == []


def test_folder_with_another_file(publish, weights, tmp_path, monkeypatch):
    monkeypatch.setenv(published.VARIABLE, str(tmp_path))
    (tmp_path / weights.path.name).write_bytes(weights.data + b'x')
    with pytest.raises(ValueError, match='is not the published file: its SHA'):
        published.fetch(publish())


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


def test_pin(publish, weights, log):
    """A hash in the name is checked; where none is known, it is told."""
    entry = publish(file='lite0.pth')
    load_entry(entry)
    pinned = f'{LITE0}#sha256={weights.digest}'
    assert [line for line in log if line.endswith(f'write {pinned}')]
    assert published.find(pinned).pin == weights.digest
    del log[:]
    load_entry(replace(entry, pin=weights.digest))
    assert not [line for line in log if 'No hash' in line]
    wrong = '0' * 8 + weights.digest[8:]
    with pytest.raises(ValueError, match=f'should be {wrong}'):
        load_entry(replace(entry, pin=wrong))
    for pin in ('', '0123', 'g' * 64, weights.digest.upper()):
        with pytest.raises(ValueError, match='hexadecimal digits'):
            load(f'{LITE0}#sha256={pin}')


def test_converter_checks_files_with_published_names(run_converter, tmp_path):
    """A local file that is not what its name says is refused."""
    entry = published.find('effdet://tf_efficientdet_d0')
    path = tmp_path / entry.file
    path.write_bytes(b'PK\x03\x04 of somebody else')
    code, output = run_converter(path, tmp_path / 'out.pth')
    assert code and entry.path in output and 'rename it' in output
    assert not (tmp_path / 'out.pth').exists()
    path.rename(tmp_path / 'mine.pth')
    code, output = run_converter(tmp_path / 'mine.pth', tmp_path / 'out.pth')
    assert code and 'give the config' in output


@pytest.mark.slow
def test_wrong_weights_in_the_file(publish, weights):
    """What does not fit the size of the name is refused, naming the file."""
    entry = publish('effdet://tf_efficientdet_lite1')
    with pytest.raises(ValueError, match='delete it and try again') as error:
        load_entry(entry)
    assert 'weights are of lite0' in str(error.value)
    assert weights.path.name in str(error.value)


def test_conventions_of_advprop(publish, log):
    """They reach the checkpoint and its config, and are told to the user.

    The input is 2 x / 255 - 1, and padding is black, -1.
    """
    entry = publish(
        mean=[127.5] * 3,
        std=[127.5] * 3,
        pad_value=-1.0,
        aspect_pairs=published.manifest()[ADVPROP].aspect_pairs)
    meta = load_entry(entry)['meta']
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
    load_entry(
        publish(aspect_pairs=shipped.bbox_head.anchor_generator.aspect_pairs))
    assert not [line for line in log if '--cfg-options' in line]


def test_image_size_of_the_file(publish, log):
    """Weights for another input than the size's say so."""
    meta = load_entry(publish(image_size=640))['meta']
    config = Config.fromstring(meta['cfg'], '.py')
    assert config.model.data_preprocessor.pad_size_divisor == 640
    assert [line for line in log if 'image_size=640' in line]


@pytest.fixture
def name(automl_lite0, monkeypatch):
    """A name whose file lies in the folder."""
    monkeypatch.setenv(published.VARIABLE, str(automl_lite0.folder))
    return 'automl://efficientdet-lite0'


@pytest.mark.slow
def test_init_cfg_of_a_detector(name, model_cfg):
    """Any host's way to load weights takes the name."""
    config = model_cfg('lite0', 80)
    config.init_cfg = dict(type='Pretrained', checkpoint=name)
    model = MODELS.build(config)
    model.init_weights()
    expected = load(name)['state_dict']
    other = MODELS.build(model_cfg('lite0', 80))
    load_checkpoint(other, name)
    for key, value in expected.items():
        assert torch.equal(model.state_dict()[key], value), key
        assert torch.equal(other.state_dict()[key], value), key


def test_backbone_of_a_detector(name, automl_lite0, model_cfg):
    config = model_cfg('lite0').backbone
    config.init_cfg = dict(
        type='Pretrained', prefix='backbone.', checkpoint=name)
    backbone = MODELS.build(config)
    backbone.init_weights()
    kernel = automl_lite0.tensors['efficientnet-lite0/stem/conv2d/kernel']
    assert np.array_equal(backbone.stem.conv.weight.detach(),
                          kernel.transpose(3, 2, 0, 1))


def test_inferencer_without_a_config(name):
    inferencer = DetInferencer(weights=name, device='cpu')
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
