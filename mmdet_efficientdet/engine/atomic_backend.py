"""A file backend whose files are complete or do not exist."""
import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

from ..utils import write_file


@register_backend('mmdet_efficientdet.atomic')
class AtomicBackend(LocalBackend):
    """Local files that are replaced atomically and removed last.

    Args:
        last_checkpoint (str): The file that names the last good checkpoint,
            which the error names when the disk is full.
    """

    def __init__(self, last_checkpoint: str) -> None:
        self.last_checkpoint = last_checkpoint
        self.outdated = []

    def put(self, obj: bytes, filepath: str) -> None:
        """Writes a file.

        Raises:
            OSError: If the file cannot be written. If the disk is full, the
                message says what to do.
        """
        try:
            write_file(filepath, obj)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            good, folder = '', os.path.dirname(os.path.abspath(filepath))
            with suppress(FileNotFoundError):
                good = ('The last good checkpoint is '
                        f'{Path(self.last_checkpoint).read_text()}. ')
            raise OSError(
                error.errno, f'{os.strerror(error.errno)}: {filepath} '
                f'({len(obj) / 1e6:.1f} MB) could not be written, '
                f'{shutil.disk_usage(folder).free / 1e6:.1f} MB are free. '
                f'{good}Free space for max_keep_ckpts + 1 checkpoints and the '
                'best one, lower default_hooks.checkpoint.max_keep_ckpts, or '
                'set default_hooks.checkpoint.out_dir to another disk. Then '
                'continue with --resume') from error

    def remove(self, filepath: str) -> None:
        """Marks a file for removal by :meth:`clean`."""
        self.outdated.append(filepath)

    def clean(self, current: set) -> None:
        """Removes the marked files, but for those that are in use again."""
        for path in {*self.outdated} - current:
            with suppress(FileNotFoundError):
                os.remove(path)
        self.outdated.clear()
