"""Finds and fetches published weights, which ``published.yml`` lists.

Files are downloaded to ``torch.hub.get_dir()/mmdet_efficientdet`` and checked.
With ``MMDET_EFFICIENTDET_WEIGHTS=/folder`` in the environment the files are
taken from that folder, and nothing is downloaded. A file may be pinned:
``automl://efficientdet-d2#sha256=<at least 8 digits>``.
"""
import difflib
import gzip
import hashlib
import logging
import os
import re
import zlib
from dataclasses import dataclass, fields
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import Dict, Optional, Tuple
from urllib.request import Request, urlopen

import torch
import yaml
from filelock import FileLock
from mmengine.logging import print_log
from tqdm import tqdm

VARIABLE = 'MMDET_EFFICIENTDET_WEIGHTS'
TIMEOUT = 30  # seconds without a byte, after which the next mirror is tried
_CHUNK = 1 << 18  # bytes
_MAGIC = {'.pth': (b'PK', b'\x80'), '.h5': b'\x89HDF'}
_GZIP = b'\x1f\x8b'


@dataclass(frozen=True)
class PublishedFile:
    """One file of ``published.yml``, where the fields are explained."""
    scheme: str
    name: str
    size: str
    file: str
    origin: str
    addresses: Tuple[str, ...]
    licence: str
    mean: list
    std: list
    aspect_pairs: list
    resize: str
    how_sure: Dict[str, str]
    pad_value: float = 0.0
    image_size: Optional[int] = None
    bytes: Optional[int] = None
    sha256: str = ''
    ap: Optional[float] = None
    test_dev: Optional[float] = None
    unusable: str = ''

    @property
    def path(self) -> str:
        """What is written into a config."""
        return f'{self.scheme}://{self.name}'

    @property
    def conventions(self) -> dict:
        """What the meta of a checkpoint tells of them."""
        return {
            key: getattr(self, key)
            for key in ('aspect_pairs', 'mean', 'std', 'pad_value')
        }

    @property
    def known_hash(self) -> str:
        """SHA-256, or the start of it that its name ends with, or ''."""
        short = re.search(r'-([0-9a-f]{8})\.pth$', self.file)
        return self.sha256 or (short.group(1) if short else '')


@lru_cache(maxsize=None)
def manifest() -> Dict[str, PublishedFile]:
    """All published files by ``scheme://name``."""
    text = Path(__file__).with_suffix('.yml').read_text()
    own = {field.name for field in fields(PublishedFile)}
    entries = [
        PublishedFile(
            name=name,
            **{key: group[key]
               for key in own & group.keys()},
            **file) for group in yaml.safe_load(text)
        for name, file in group['files'].items()
    ]
    return {entry.path: entry for entry in entries}


def find(path: str) -> Tuple[PublishedFile, str]:
    """The file that a path names, and the hash to which it is pinned.

    Raises:
        ValueError: If the name is unknown, or its file cannot be used; the
            message suggests the nearest names.
    """
    name, mark, pin = path.partition('#sha256=')
    if mark and not re.fullmatch('[0-9a-f]{8,64}', pin):
        raise ValueError(f'{path!r}: write 8 to 64 small hexadecimal digits '
                         'behind #sha256=')
    entries = manifest()
    if name not in entries:
        near = _nearest(name)
        raise ValueError(
            f'{name!r} is no published file that is known here. '
            f'{"Nearest are " + ", ".join(near) + ". " if near else ""}All '
            f'names stand in {Path(__file__).with_suffix(".yml")}')
    if entries[name].unusable:
        raise ValueError(f'{name} cannot be used: {entries[name].unusable}')
    return entries[name], pin


def find_by_file(path: str) -> Optional[PublishedFile]:
    """The published file that a path's last parts name, if they do."""
    place = Path(path).absolute().as_posix()
    return next(
        (entry
         for entry in manifest().values() if place.endswith(f'/{entry.file}')),
        None)


def _nearest(path: str) -> list:
    """Names that differ little, in any scheme."""

    def letters(path: str) -> str:
        return re.sub('[^a-z0-9]', '', path.lower().partition('://')[2])

    entries = {entry: letters(entry) for entry in manifest()}
    near = difflib.get_close_matches(
        letters(path), set(entries.values()), 5, 0.7)
    return [
        entry for match in near for entry, name in entries.items()
        if name == match
    ]


def find_problem(path: Path, entry: PublishedFile, pin: str = '') -> str:
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


def fetch(entry: PublishedFile, pin: str = '') -> Path:
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


def _from_folder(folder: Path, entry: PublishedFile, pin: str) -> Path:
    # The bare name belongs to the first of several files of the same name.
    name = Path(entry.file).name
    first = next(e for e in manifest().values() if Path(e.file).name == name)
    names = dict.fromkeys([entry.file, name] if first ==
                          entry else [entry.file])
    places = [folder / name for name in names]
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


def _from_mirrors(entry: PublishedFile, pin: str, target: Path) -> None:
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
