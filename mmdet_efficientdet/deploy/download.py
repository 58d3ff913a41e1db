"""Downloads a file completely or not at all."""
import os
import socket
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Callable
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from filelock import FileLock, Timeout
from torch.hub import tqdm  # a plain one if tqdm is not installed

TIMEOUT = 30  # seconds
_SLOWEST = 4000  # bytes per second, below which a download fails
_CHUNK = 1 << 18  # bytes


def lock(target: Path, say: Callable[[str], None]):
    """Acquires the lock of a file, and says for whom it waits.

    At a barrier, other processes would wait forever if one failed.
    """
    path = Path(f'{target}.lock')
    lock = FileLock(path)
    try:
        held = lock.acquire(timeout=1)
    except Timeout:
        say(f'Waiting for {path}, held by {path.read_text()}')
        held = lock.acquire()
    path.write_text(f'process {os.getpid()} of {socket.gethostname()}')
    return held


class _SafeRedirects(HTTPRedirectHandler):
    """Follows a server to ``https://``, and to its own address."""

    def redirect_request(self, request, file, code, message, headers, url):
        before, after = urlsplit(request.full_url), urlsplit(url)
        if after.scheme != 'https' and before[:2] != after[:2]:
            raise ValueError(f'the server redirects to {url}, which is not '
                             'https://')
        return super().redirect_request(request, file, code, message, headers,
                                        url)


def download(address: str,
             target: Path,
             limit: int,
             timeout: float = TIMEOUT) -> None:
    """Downloads a file completely.

    The function of ``torch.hub`` has no timeout and does not notice a body
    that is cut off. The timeout of a socket starts again with each byte.
    """
    request = Request(address, headers={'User-Agent': 'mmdet_efficientdet'})
    # Another thread, because the headers may also come byte by byte.
    with ThreadPool(1) as pool:
        connect = build_opener(_SafeRedirects).open
        response = pool.apply_async(connect, (request, None, timeout))
        response = response.get(timeout)
    length, size, before, start = response.length, 0, 0, time.monotonic()
    with response, target.open('wb') as file, tqdm(
            total=length, unit='B', unit_scale=True, disable=None) as bar:
        while chunk := response.read1(_CHUNK):
            size += file.write(chunk)
            bar.update(len(chunk))
            if size > limit:
                raise ValueError(f'more than {limit} bytes came')
            if time.monotonic() - start > timeout:
                if size - before < timeout * _SLOWEST:
                    raise ValueError(
                        f'{size - before} bytes came in {timeout} seconds')
                before, start = size, time.monotonic()
    if length is not None and size != length:
        raise ValueError(f'cut off after {size} of {length} bytes')
