"""Gets published files: from a folder, the cache or mirrors, checked."""
import gzip
import hashlib
import logging
import os
import zlib
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

import torch
from filelock import FileLock
from mmengine.logging import print_log
from tqdm import tqdm

VARIABLE = 'MMDET_EFFICIENTDET_WEIGHTS'
TIMEOUT = 30  # seconds without a byte, after which the next mirror is tried
_CHUNK = 1 << 18  # bytes
_MAGIC = {'.pth': (b'PK', b'\x80'), '.h5': b'\x89HDF'}
_GZIP = b'\x1f\x8b'


def find_problem(path: Path, entry, pin: str = '') -> str:
    """Says what is wrong with a file, or '' if it is what was published.

    Args:
        path (Path): An existing file.
        entry (PublishedFile): What it should be.
        pin (str): Start of the SHA-256 that is asked for. Defaults to ''.
    """
    start, digest = b'', hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(_CHUNK):
            start = start or chunk
            digest.update(chunk)
    size = path.stat().st_size
    if not size:
        return 'it is empty'
    if start.lstrip()[:1] == b'<':
        return 'it is a web page, not weights'
    if entry.bytes and size != entry.bytes:
        return f'it has {size} bytes instead of {entry.bytes}'
    for known in (entry.known_hash, pin):
        if not digest.hexdigest().startswith(known):
            return (f'its SHA-256 is {digest.hexdigest()}, but should '
                    f'{"be" if len(known) == 64 else "start with"} {known}')
    suffix = Path(entry.file).suffix
    if not start.startswith(_MAGIC.get(suffix, _GZIP)):
        return 'it is in another format than its name says'
    if suffix not in _MAGIC and not entry.known_hash:
        try:
            with gzip.open(path) as file:
                while file.read(_CHUNK):
                    pass
        except (OSError, EOFError, zlib.error) as error:
            return f'it is damaged or cut off ({error})'
    return ''


def fetch(entry, pin: str = '') -> Path:
    """Returns the checked file, downloaded if need be.

    Several processes may ask for it at once; one of each machine downloads,
    the others wait for it. There is no barrier, at which they would wait for
    ever, should one fail.

    Raises:
        ValueError: If it cannot be had; the message lists every place that
            was tried, with its reason.
    """
    folder = os.environ.get(VARIABLE)
    if folder:
        return _from_folder(Path(folder).expanduser(), entry, pin)
    target = Path(torch.hub.get_dir(), 'mmdet_efficientdet', entry.file)
    if target.is_file() and not find_problem(target, entry, pin):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f'{target}.lock'):
            if not target.is_file() or find_problem(target, entry, pin):
                _from_mirrors(entry, pin, target)
    except OSError as error:
        raise ValueError(
            f'{entry.path}: cannot write {target} ({error}). Set TORCH_HOME '
            f'to a folder for downloads, or {VARIABLE} to a folder with the '
            'file') from error
    return target


def _from_folder(folder: Path, entry, pin: str) -> Path:
    places = [folder / name for name in entry.local_names]
    for place in places:
        if place.is_file():
            problem = find_problem(place, entry, pin)
            if problem:
                raise ValueError(f'{entry.path}: {place} is not the published '
                                 f'file: {problem}')
            return place
    raise ValueError('\n'.join([
        f'{entry.path}: {VARIABLE} is set, so nothing is downloaded, but '
        'there is no file', *[f'  {place}' for place in places],
        'Put it there; it is published as',
        *[f'  {address}{entry.file}' for address in entry.addresses]
    ]))


def _from_mirrors(entry, pin: str, target: Path) -> None:
    reasons = []
    partial = target.with_name(f'{target.name}.{os.getpid()}.partial')
    for mirror in entry.addresses:
        address = mirror + entry.file
        print_log(f'Downloading {address} to {target}', 'current')
        try:
            _download(address, partial)
            problem = find_problem(partial, entry, pin)
            if problem:
                raise ValueError(problem)
            os.replace(partial, target)
            return
        except (OSError, HTTPException, ValueError) as error:
            reasons.append(f'  {address}: {error}')
            print_log(f'Failed: {error}', 'current', logging.WARNING)
        finally:
            partial.unlink(missing_ok=True)
    raise ValueError('\n'.join([
        f'{entry.path} cannot be downloaded:', *reasons,
        f'Without network, put the file into a folder as {entry.file} and '
        f'set {VARIABLE} to that folder'
    ]))


def _download(address: str, target: Path) -> None:
    """Writes what a server sends, all of it.

    ``torch.hub`` has a function for this, which neither gives up on a silent
    server nor notices a body that is cut off.
    """
    request = Request(address, headers={'User-Agent': 'mmdet_efficientdet'})
    with urlopen(request, timeout=TIMEOUT) as response:
        length = response.headers.get('Content-Length')
        length = int(length) if length else None
        with target.open('wb') as file, tqdm(
                total=length, unit='B', unit_scale=True, disable=None) as bar:
            while chunk := response.read(_CHUNK):
                bar.update(file.write(chunk))
    size = target.stat().st_size
    if length is not None and size != length:
        raise ValueError(f'cut off after {size} of {length} bytes')
