"""The work directory: who writes to it, and what to resume from it."""
import fcntl
import logging
import os
import re
from pathlib import Path
from typing import IO, Dict, Optional

from mmengine.logging import print_log

from ..utils import TEMPORARY, shown

# Locks of this process: closing one file of a folder would end them all.
_HELD: Dict[Path, IO] = {}


def lock_folder(folder: str) -> Optional[IO]:
    """Reserves a folder for this process and removes half-written files.

    The lock is one of POSIX: it ends with the process, also if that is killed,
    works on network drives, and is not inherited by workers.

    Returns:
        IO: The file, whose closing ends the lock, or None, with a warning, if
        the file system has no locks or is read-only.

    Raises:
        BlockingIOError: If another process has the folder.
    """
    path = Path(folder, '.lock')
    held = _HELD.get(path.resolve())
    if held and not held.closed:
        return held
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, 'a+')
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(
            error.errno, f'{shown(path.read_text(errors="replace"))} trains in'
            f' {folder}, and two trainings would replace their checkpoints: '
            f'wait, or set another --work-dir. If it has ended, remove {path}'
        ) from error
    except OSError as error:
        print_log(
            f'{folder} cannot be locked, so that a second training in '
            f'it would not be noticed: {error}', 'current', logging.WARNING)
        return None
    _HELD[path.resolve()] = file
    file.truncate(0)
    print(f'process {os.getpid()} on {os.uname()[1]}', file=file, flush=True)
    for name in ('*.pth', 'last_checkpoint'):
        for half in path.parent.glob(f'{name}*{TEMPORARY}'):
            half.unlink(missing_ok=True)
    return file


def find_checkpoint(work_dir: str,
                    template: str,
                    elsewhere: bool = False) -> Optional[str]:
    """The checkpoint that ``--resume`` continues, if there is one.

    The file ``last_checkpoint`` has the path as it was when it was written. If
    the folder was moved or copied, it is the checkpoint of that name in the
    folder. If the file is missing or damaged, it is the newest checkpoint.

    Args:
        work_dir (str): The folder.
        template (str): Name of a checkpoint, with {} for its number.
        elsewhere (bool): Whether checkpoints are written to another folder,
            whose file then precedes one in ``work_dir``. Defaults to False.

    Raises:
        FileNotFoundError: If ``last_checkpoint`` exists, but no checkpoint.
    """
    folder = Path(work_dir)
    pointer, named = folder / 'last_checkpoint', ''
    if pointer.is_file():
        named = pointer.read_text(errors='replace').strip()
    if '://' in named:
        return named
    pattern = re.sub(r'\\\{.*?\\\}', r'(\\d+)', re.escape(template))
    found = [re.fullmatch(pattern, path.name) for path in folder.iterdir()]
    newest = max(filter(None, found), key=lambda m: int(m[1]), default=[''])
    places = [folder / Path(named).name, Path(named)]
    for path in (*(places[::-1] if elsewhere else places), folder / newest[0]):
        if path.is_file():
            print_log(f'{pointer} names {shown(named)}; resuming from {path}',
                      'current')
            return str(path)
    if pointer.is_file():
        raise FileNotFoundError(
            f'{pointer} names {shown(named)}, which does not exist: leave out '
            '--resume, or write --resume FILE')
    return None
