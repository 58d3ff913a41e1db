"""Finds and downloads the published weights in ``published.yml``.

Files are downloaded to ``torch.hub.get_dir()/mmdet_efficientdet`` and
verified. If the environment has ``MMDET_EFFICIENTDET_WEIGHTS=/folder``, the
files are taken from that folder, and nothing is downloaded. A name may have a
hash: ``automl://efficientdet-d2#sha256=<at least 8 digits>``.
"""
import difflib
import logging
import os
import re
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from http.client import HTTPException
from multiprocessing import ProcessError
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import torch
import yaml
from mmengine.logging import print_log

from ..deploy.download import TIMEOUT, download, lock
from .sources import check_integrity, sha256_of
from .tensorflow import LIMIT

VARIABLE = 'MMDET_EFFICIENTDET_WEIGHTS'
_CHUNK = 1 << 18  # bytes
# First bytes of a file by suffix; the others are gzip archives.
_MAGIC = {'.pth': (b'PK', b'\x80'), '.h5': b'\x89HDF'}
_GZIP = b'\x1f\x8b'


@dataclass(frozen=True)
class PublishedFile:
    """One file of ``published.yml``, which explains the fields.

    ``pin`` is the SHA-256 that the user asks for, or its first digits.
    """
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
    pin: str = ''

    @property
    def path(self) -> str:
        """The name to be written into a config."""
        return f'{self.scheme}://{self.name}'

    @property
    def known_hash(self) -> str:
        """Its SHA-256, or the first digits of it in the file name, or ''."""
        short = re.search(r'-([0-9a-f]{8})\.pth$', self.file)
        return self.sha256 or (short.group(1) if short else '')


def find(path: str) -> PublishedFile:
    """The file of a name, ``scheme://name`` or ``scheme://name#sha256=...``.

    Raises:
        ValueError: If the name is unknown, or its file cannot be used. The
            message suggests similar names.
    """
    name, mark, pin = path.partition('#sha256=')
    if mark and not re.fullmatch('[0-9a-f]{8,64}', pin):
        raise ValueError(f'{path!r}: write 8 to 64 lowercase hexadecimal '
                         'digits after #sha256=')
    entries = manifest()
    if name not in entries:
        similar = _similar(name)
        raise ValueError(
            f'{name!r} is not a known published file. '
            f'{"Similar: " + ", ".join(similar) + ". " if similar else ""}'
            f'All names are in {Path(__file__).with_suffix(".yml")}')
    if entries[name].unusable:
        raise ValueError(f'{name} cannot be used: {entries[name].unusable}')
    return replace(entries[name], pin=pin)


def _similar(path: str) -> List[str]:
    """Names that have nearly the same letters, of any scheme."""

    def letters(path: str) -> str:
        return re.sub('[^a-z0-9]', '', path.lower().partition('://')[2])

    known = {letters(name) for name in manifest()}
    similar = difflib.get_close_matches(letters(path), known, 5, 0.7)
    return [
        name for match in similar for name in manifest()
        if letters(name) == match
    ]


@lru_cache(maxsize=None)
def manifest() -> Dict[str, PublishedFile]:
    """All published files by ``scheme://name``."""
    text = Path(__file__).with_suffix('.yml').read_text()
    entries = []
    for group in yaml.safe_load(text):
        for name, file in group.pop('files').items():
            entries.append(PublishedFile(**dict(group, name=name, **file)))
    return {entry.path: entry for entry in entries}


def fetch(entry: PublishedFile, timeout: float = TIMEOUT) -> Path:
    """Returns the verified file and downloads it if necessary.

    Several processes may ask for it at once. One on each machine downloads,
    the others wait for its lock. At a barrier they would wait forever if one
    failed.

    Args:
        entry (PublishedFile): The file.
        timeout (float): Seconds in which a mirror must send something.
            Defaults to 30.

    Raises:
        ValueError: If the file is not available. The message lists every
            place that was tried, with the reason.
    """
    folder = os.environ.get(VARIABLE)
    if folder:
        return _from_folder(Path(folder).expanduser(), entry)
    target = Path(torch.hub.get_dir(), 'mmdet_efficientdet', entry.file)
    try:
        if find_problem(target, entry):
            target.parent.mkdir(parents=True, exist_ok=True)
            with lock(target, partial(print_log, logger='current')):
                if find_problem(target, entry):
                    _from_mirrors(entry, target, timeout)
    except OSError as error:
        raise ValueError(
            f'{entry.path}: cannot write {target} ({error}). Set TORCH_HOME '
            f'to a folder for downloads, or {VARIABLE} to a folder with the '
            'file') from error
    return target


def _from_folder(folder: Path, entry: PublishedFile) -> Path:
    # Of several files with the same name, the first may lie in the folder
    # itself. The others must lie in their subfolders.
    name, places = Path(entry.file).name, [folder / entry.file]
    same = [e.path for e in manifest().values() if Path(e.file).name == name]
    if entry.file != name and same[:1] == [entry.path]:
        places.append(folder / name)
    for place in filter(Path.is_file, places):
        problem = find_problem(place, entry)
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


def _from_mirrors(entry: PublishedFile, target: Path, timeout: float) -> None:
    reasons, partial = [], Path(f'{target}.partial')
    for mirror in entry.addresses:
        address = mirror + entry.file
        print_log(f'Downloading {address} to {target}', 'current')
        try:
            download(address, partial, entry.bytes or LIMIT, timeout)
            problem = find_problem(partial, entry)
            if problem:
                raise ValueError(problem)
            os.replace(partial, target)
            return
        except (OSError, HTTPException, ValueError, ProcessError) as error:
            reason = str(error) or f'no answer in {timeout} seconds'
            reasons.append(f'  {address}: {reason}')
            print_log(f'Failed: {reason}', 'current', logging.WARNING)
        finally:
            partial.unlink(missing_ok=True)
    raise ValueError('\n'.join([
        f'{entry.path} cannot be downloaded:', *reasons,
        f'Without network, put the file into a folder as {entry.file} and '
        f'set {VARIABLE} to that folder'
    ]))


def find_problem(path: Path, entry: PublishedFile) -> str:
    """Why a file is not the published one, or '' if it is."""
    if not path.is_file():
        return 'it does not exist'
    with path.open('rb') as file:
        start = file.read(_CHUNK)
    size = path.stat().st_size
    if not size:
        return 'it is empty'
    if start.lstrip()[:1] == b'<':
        return 'it is a web page, not weights'
    if entry.bytes and size != entry.bytes:
        return f'it has {size} bytes instead of {entry.bytes}'
    digest = sha256_of(path)
    for known in (entry.known_hash, entry.pin):
        if not digest.startswith(known):
            return (f'its SHA-256 is {digest}, but should '
                    f'{"be" if len(known) == 64 else "start with"} {known}')
    suffix = Path(entry.file).suffix
    if not start.startswith(_MAGIC.get(suffix, _GZIP)):
        return 'its format does not match its name'
    if suffix not in _MAGIC and not entry.known_hash:
        try:
            check_integrity(path)
        except ValueError as error:
            return str(error)
    return ''
