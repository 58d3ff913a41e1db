"""Files that are whole or not there, and that hold data only."""
import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

import mmengine
import numpy as np
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import HistoryBuffer

TEMPORARY = '.tmp'  # the end of a name under which a file is being written


def write_file(path: str, data: bytes) -> None:
    """Writes a file under a temporary name, which it then gets rid of.

    Whenever the process is killed or the power fails, ``path`` is as it was
    or complete. After an error nothing is left of the new file.
    """
    path = os.fspath(path)
    folder = os.path.dirname(os.path.abspath(path))
    mmengine.mkdir_or_exist(folder)
    try:
        with open(path + TEMPORARY, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + TEMPORARY, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.remove(path + TEMPORARY)
        raise
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network drives refuse
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@register_backend('mmdet_efficientdet.atomic')
class AtomicBackend(LocalBackend):
    """Local files that are replaced at once, and removed last.

    Args:
        last_checkpoint (str): The file that names the last good checkpoint,
            for the message when the disk is full.
    """

    def __init__(self, last_checkpoint: str) -> None:
        self.last_checkpoint = last_checkpoint
        self.outdated = []

    def put(self, obj: bytes, filepath: str) -> None:
        """Writes a file.

        Raises:
            OSError: If the disk is full, with what to do.
        """
        try:
            write_file(filepath, obj)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            folder = os.path.dirname(os.path.abspath(filepath))
            good = ''
            with suppress(FileNotFoundError):
                good = ('The last good checkpoint is '
                        f'{Path(self.last_checkpoint).read_text()}. ')
            raise OSError(
                error.errno, f'{os.strerror(error.errno)}: {filepath} '
                f'({len(obj) / 1e6:.1f} MB) could not be written, '
                f'{shutil.disk_usage(folder).free / 1e6:.1f} MB are free. '
                f'{good}Make room for max_keep_ckpts + 1 checkpoints and the '
                'best one, lower default_hooks.checkpoint.max_keep_ckpts, or '
                'set default_hooks.checkpoint.out_dir to another disk; then '
                'go on with --resume') from error

    def put_text(self,
                 obj: str,
                 filepath: str,
                 encoding: str = 'utf-8') -> None:
        """Writes a text, see :meth:`put`."""
        self.put(obj.encode(encoding), filepath)

    def remove(self, filepath: str) -> None:
        """Removes a file, but not before :meth:`clean` is called."""
        self.outdated.append(filepath)

    def clean(self) -> None:
        """Removes the files, now that others have replaced them."""
        while self.outdated:
            with suppress(FileNotFoundError):
                os.remove(self.outdated.pop())


def plain_data(node):
    """Nested data without objects of NumPy and mmengine."""
    if isinstance(node, HistoryBuffer):
        history, counts = node.data
        node = dict(
            log_history=history,
            count_history=counts,
            max_length=node.max_length)
    if isinstance(node, dict):
        return {key: plain_data(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(plain_data(value) for value in node)
    if isinstance(node, (np.ndarray, np.generic)):
        return node.tolist()
    return node
