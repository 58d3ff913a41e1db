"""Finds the folder of a released detector, and checks its hashes.

A release is a folder that ``python -m mmdet_efficientdet release`` has
written. Its files hold data only; finding and loading it executes nothing.
"""
import difflib
import hashlib
import logging
import os
import re
import shutil
from http.client import HTTPException
from multiprocessing import ProcessError
from pathlib import Path
from typing import Dict, List

import torch

from .download import download, lock

CONFIG, WEIGHTS, SUMS = 'config.json', 'model.safetensors', 'SHA256SUMS'
FILES = (CONFIG, WEIGHTS)  # what a detector is made from
ZOO = Path(__file__).parents[1] / '.mim' / 'zoo'  # comes with the package
_LIMITS = {CONFIG: 1 << 24, WEIGHTS: 1 << 30, SUMS: 1 << 16}  # bytes
_HUB = 'https://huggingface.co'


def find_release(source: str) -> Path:
    """The folder of a release, downloaded if necessary, with checked hashes.

    Args:
        source (str): A folder; a name in the zoo of this package; the
            ``https://`` address of a folder; or ``hf://OWNER/NAME`` or
            ``hf://OWNER/NAME@REVISION`` for a repository on Hugging Face, at
            the address in the environment variable ``HF_ENDPOINT``, if it is
            set. ``http://`` is for this machine alone.

    Raises:
        ValueError: If there is none. The message names the file at fault and
            both hashes, or names that are similar.
    """
    source = os.fspath(source)
    hub = re.fullmatch(r'hf://([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?', source)
    if hub:
        address = os.environ.get('HF_ENDPOINT', _HUB).rstrip('/')
        return _fetch(f'{address}/{hub[1]}/resolve/{hub[2] or "main"}', source)
    if re.match(r'https://|http://(localhost|127\.0\.0\.1)[:/]', source):
        return _fetch(source.rstrip('/'), source)
    folder = Path(source)
    if source in names() and not (folder / SUMS).is_file():
        folder = ZOO / source
    elif '://' in source or not source or not folder.is_dir():
        near = difflib.get_close_matches(source, names(), 1, 0.5)
        raise ValueError(
            f'{source!r} is no release. '
            f'{f"Did you mean {near[0]!r}? " if near else ""}Give a folder, '
            'https://ADDRESS, hf://OWNER/NAME, or one of the names '
            f'{names()}')
    check(folder)
    return folder


def names() -> List[str]:
    """The names of the releases that come with the package."""
    return sorted(path.parent.name for path in ZOO.glob(f'*/{SUMS}'))


def read_sums(folder: Path) -> Dict[str, str]:
    """SHA-256 of each file of a release, by name.

    Raises:
        ValueError: If they are missing or written in another way.
    """
    path = folder / SUMS
    if not path.is_file():
        raise ValueError(f'{folder} is no release, since {SUMS} is missing')
    lines = path.read_text(errors='replace').splitlines()
    name = r'(?:\.eval_results/)?[\w.-]+'
    found = [re.fullmatch(rf'([0-9a-f]{{64}})  ({name})', x) for x in lines]
    if not all(found) or not {*FILES} <= {match[2] for match in found}:
        raise ValueError(f'{path} must have lines of a SHA-256, two spaces '
                         f'and a file name, among them {", ".join(FILES)}')
    return {match[2]: match[1] for match in found}


def check(folder: Path, files=FILES) -> None:
    """Compares files of a release with their hashes.

    Raises:
        ValueError: If one is missing or differs. It has the name and hashes.
    """
    sums = read_sums(folder)
    for name in files:
        path, digest = folder / name, 'none'
        if path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != sums[name]:
            raise ValueError(
                f'{path} is missing, damaged or was changed: its SHA-256 is '
                f'{digest}, but should be {sums[name]} according to {SUMS}. '
                'Copy or download the release again')


def _fetch(address: str, source: str) -> Path:
    """The files of a release on a server, in the folder for downloads."""
    key = hashlib.sha256(address.encode()).hexdigest()[:16]
    folder = Path(torch.hub.get_dir(), 'mmdet_efficientdet', 'releases', key)
    try:
        if not (folder / SUMS).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with lock(folder, logging.getLogger(__name__).warning):
                if not (folder / SUMS).is_file():
                    _download(address, folder)
        check(folder)
    except (OSError, HTTPException, ProcessError, ValueError) as error:
        reason = str(error) or 'no answer'
        raise ValueError(
            f'{source} cannot be loaded from {address} by way of {folder}: '
            f'{reason}. Set TORCH_HOME to another folder for downloads, or '
            'copy the release to a folder and give that') from error
    return folder


def _download(address: str, folder: Path) -> None:
    """Downloads and checks; the sums get their name last."""
    partial = folder / 'partial'
    partial.mkdir(exist_ok=True)
    try:
        for name in (SUMS, *FILES):
            download(f'{address}/{name}', partial / name, _LIMITS[name])
        check(partial)
        for name in (*FILES, SUMS):
            os.replace(partial / name, folder / name)
    finally:
        shutil.rmtree(partial)
