"""A release is found, and what was changed or is missing is refused."""
import hashlib
import json
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from mmdet_efficientdet import load_detector
from mmdet_efficientdet.deploy import releases
from mmdet_efficientdet.deploy.releases import CONFIG, SUMS, WEIGHTS

ROOT = Path(__file__).resolve().parents[2]
TREES = ROOT / 'zoo' / 'trees'


@pytest.fixture
def release(tmp_path):
    """A copy of what a detector is made from."""
    folder = tmp_path / 'release'
    folder.mkdir()
    for name in (CONFIG, WEIGHTS, SUMS):
        shutil.copy(TREES / name, folder)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no proxy in front of this machine."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    return tmp_path / 'torch' / 'hub' / 'mmdet_efficientdet' / 'releases'


@pytest.fixture
def server(release):
    """Serves the release; ``paths`` lists what was asked for."""
    paths = []

    class Handler(SimpleHTTPRequestHandler):

        def do_GET(self):
            paths.append(self.path)
            self.path = '/' + self.path.rpartition('/')[2]
            super().do_GET()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0),
                                 partial(Handler, directory=str(release)))
    threading.Thread(target=server.serve_forever).start()
    server.paths = paths
    server.address = f'http://127.0.0.1:{server.server_port}'
    yield server
    server.shutdown()
    server.server_close()


def files_in(folder):
    return {path.name for path in folder.rglob('*') if path.is_file()}


def test_sums_of_the_zoo():
    """Every file of every release has its hash, and nothing else does."""
    for folder in (ROOT / 'zoo').iterdir():
        sums = releases.read_sums(folder)
        assert files_in(folder) == {*sums, SUMS}
        releases.check(folder, sums)
        checkpoint, = folder.glob('*.pth')
        assert checkpoint.stem.endswith('-' + sums[checkpoint.name][:8])


def test_names(release, monkeypatch):
    """By name from any folder; of a wrong name, the nearest is named."""
    assert 'trees' in releases.names()
    monkeypatch.chdir(release)
    assert releases.find_release('trees').samefile(TREES)
    for name in ('tree', 'Trees', 'trees/'):
        with pytest.raises(ValueError, match="Did you mean 'trees'"):
            releases.find_release(name)
    for name in ('ftp://a/b', 'http://example.com/a', 'hf://a', '../trees',
                 'hf://a/b/c', ''):
        with pytest.raises(ValueError, match='no release'):
            releases.find_release(name)
    with pytest.raises(ValueError, match=f'{SUMS} is missing'):
        releases.find_release(release.parent)


@pytest.mark.parametrize('name', [CONFIG, WEIGHTS])
def test_changed_or_missing(release, name):
    """The message has the file and both hashes."""
    path = release / name
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        load_detector(release)
    for text in (str(path), hashlib.sha256(data).hexdigest(),
                 releases.read_sums(TREES)[name]):
        assert text in str(error.value)
    path.unlink()
    with pytest.raises(ValueError, match=f'{name} is missing'):
        load_detector(release)


@pytest.mark.parametrize('text', [
    '', 'x', f'{"0" * 64}  ../config.json\n', f'{"0" * 64}  {CONFIG}\n'
], ids=range(4))  # yapf: disable
def test_damaged_sums(release, text):
    (release / SUMS).write_text(text)
    with pytest.raises(ValueError, match=SUMS):
        load_detector(release)


def test_other_weights(release):
    """A file with the right hash that is not a plain network."""
    (release / WEIGHTS).write_bytes(b'code')
    digest = hashlib.sha256(b'code').hexdigest()
    lines = (release / SUMS).read_text().splitlines()
    lines = [
        f'{digest}  {WEIGHTS}' if WEIGHTS in line else line for line in lines
    ]
    (release / SUMS).write_text('\n'.join(lines))
    with pytest.raises(ValueError, match='not a plain network'):
        load_detector(release)


def test_download(server, cache, monkeypatch):
    """Once; then from the cache, which may be read-only, without the server.
    """
    folder = releases.find_release(server.address + '/models/a/')
    assert [x.rpartition('/')[2]
            for x in server.paths] == [SUMS, CONFIG, WEIGHTS]
    assert {x.rpartition('/')[0] for x in server.paths} == {'/models/a'}
    assert files_in(folder) == {SUMS, CONFIG, WEIGHTS}
    load_detector(server.address + '/models/a')
    assert len(server.paths) == 3
    server.shutdown()
    monkeypatch.setattr(releases, 'lock', None)
    assert releases.find_release(server.address + '/models/a') == folder


def test_hub(server, cache, monkeypatch):
    monkeypatch.setenv('HF_ENDPOINT', server.address)
    releases.find_release('hf://owner/my.name')
    assert server.paths[0] == '/owner/my.name/resolve/main/SHA256SUMS'
    releases.find_release('hf://owner/my.name@v1')
    assert server.paths[3] == '/owner/my.name/resolve/v1/SHA256SUMS'


@pytest.mark.parametrize('name', [SUMS, CONFIG, WEIGHTS])
def test_failed_download(server, release, cache, name):
    """Nothing stays of it, and the next try can succeed."""
    data = (release / name).read_bytes()
    for change in (b'<html>not found</html>', None):
        (release / name).unlink()
        if change:
            (release / name).write_bytes(change)
        with pytest.raises(ValueError) as error:
            releases.find_release(server.address)
        assert (name if change else '404') in str(error.value)
        assert server.address in str(error.value)
        assert files_in(cache) <= {path.name for path in cache.glob('*.lock')}
        (release / name).write_bytes(data)
    load_detector(server.address, 'cpu')


def test_changed_in_the_cache(server, cache):
    folder = releases.find_release(server.address)
    (folder / CONFIG).write_text('{}')
    with pytest.raises(ValueError, match='was changed') as error:
        releases.find_release(server.address)
    assert str(folder / CONFIG) in str(error.value)


def test_cache_that_cannot_be_written(server, cache):
    cache.parent.mkdir(parents=True)
    cache.write_text('a file where the folder should be')
    with pytest.raises(ValueError, match='TORCH_HOME'):
        releases.find_release(server.address)


def test_too_much(server, cache, monkeypatch):
    """A server cannot fill the disk."""
    monkeypatch.setitem(releases._LIMITS, WEIGHTS, 1000)
    with pytest.raises(ValueError, match='more than 1000 bytes'):
        releases.find_release(server.address)


HOSTILE = '''
import sys
import torch
import mmdet_efficientdet
mmdet_efficientdet.load_detector(sys.argv[1], 'cpu')  # imports everything
seen = []
sys.addaudithook(lambda event, args: event in (
    'exec', 'compile', 'import', 'os.system', 'subprocess.Popen', 'os.exec',
    'pickle.find_class', 'os.fork') and seen.append((event, args)))
mmdet_efficientdet.load_detector(sys.argv[2], 'cpu')
print(seen)
'''


@pytest.mark.slow
def test_nothing_is_executed(release, tmp_path):
    """Not even with code in every text of the config."""
    mark = tmp_path / 'executed'
    code = f'__import__("os").system("touch {mark}")'
    settings = json.loads((release / CONFIG).read_text())
    settings['classes'] = [code]
    settings['provenance'] = dict(config=code, __reduce__=code)
    settings['_target_'] = settings['auto_map'] = code
    text = json.dumps(settings).encode()
    (release / CONFIG).write_bytes(text)
    (release / 'README.md').write_text(f'---\n!!python/object/apply {code}\n')
    (release / 'training_config.json').write_text(json.dumps(code))
    (release / 'config.py').write_text(f'{code}\nraise SystemExit(1)\n')
    (release / SUMS).write_text(
        f'{hashlib.sha256(text).hexdigest()}  {CONFIG}\n'
        f'{releases.read_sums(TREES)[WEIGHTS]}  {WEIGHTS}\n')
    run = subprocess.run(
        [sys.executable, '-c', HOSTILE, str(TREES), str(release)],
        cwd=ROOT, capture_output=True, text=True)  # yapf: disable
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == '[]' and not mark.exists()


def test_hub_folder(cache):
    """torch's own rule of where downloads go."""
    assert Path(torch.hub.get_dir()) == cache.parents[1]


def test_folder_of_the_same_name(tmp_path, monkeypatch):
    """A folder that is no release does not hide the zoo's."""
    (tmp_path / 'trees').mkdir()
    monkeypatch.chdir(tmp_path)
    assert releases.find_release('trees').resolve() == TREES


@pytest.mark.parametrize('place', [
    'http://localhost:{port}/other', 'http://127.0.0.1:1/', 'ftp://127.0.0.1/',
    'file:///etc/passwd'
])
def test_redirect(place, server, cache, monkeypatch):
    """Only to https://, and on the same server."""
    handler = server.RequestHandlerClass.func

    def get(self):
        self.send_response(302)
        self.send_header('Location', place.format(port=server.server_port))
        self.end_headers()

    monkeypatch.setattr(handler, 'do_GET', get)
    with pytest.raises(ValueError, match='redirect'):
        releases.find_release(server.address)
    assert not list(cache.rglob('*.json'))


def test_redirect_of_the_same_server(server, cache, monkeypatch):
    handler = server.RequestHandlerClass.func
    send = handler.do_GET

    def get(self):
        if 'moved' in self.path:
            return send(self)
        self.send_response(302)
        self.send_header('Location', f'/moved{self.path}')
        self.end_headers()

    monkeypatch.setattr(handler, 'do_GET', get)
    assert (releases.find_release(server.address) / CONFIG).is_file()
