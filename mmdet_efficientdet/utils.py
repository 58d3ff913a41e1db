"""What every wing needs: registration, configs, whole files, plain text."""
import os
import reprlib
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import BinaryIO, Callable, Iterator, Optional, Union

import mmengine
import numpy as np
from mmengine.config import Config
from mmengine.logging import HistoryBuffer

from .scaling import SCALING

WINGS = ('models', 'datasets', 'weights', 'engine')
TEMPORARY = '.tmp'  # the end of a name under which a file is being written


def register_all_modules(init_default_scope: bool = True) -> None:
    """Registers every class, as mmengine's hub and inferencers ask for it.

    Args:
        init_default_scope (bool): Also makes ``mmdet_efficientdet`` the
            default scope, from which MMDetection's classes are found, too.
            Defaults to True.
    """
    from mmdet.utils import register_all_modules as register_mmdet
    from mmengine.registry import init_default_scope as set_scope

    for wing in WINGS:
        import_module(f'.{wing}', __package__)
    register_mmdet(init_default_scope=False)
    if init_default_scope:
        set_scope('mmdet_efficientdet')


def config_file(size: str) -> Path:
    """The shipped config of a size for COCO.

    Args:
        size (str): A key of ``SCALING``, such as 'd0'.

    Raises:
        KeyError: If the size is unknown.
    """
    if size not in SCALING:
        raise KeyError(f'unknown size {size!r}; write one of {list(SCALING)}')
    folder = Path(__file__).parent / '.mim' / 'configs' / 'efficientdet'
    epochs = SCALING[size].epochs
    return folder / f'efficientdet_{size}_8xb16-{epochs}e_coco.py'


def read_config(path: str, options: Optional[dict] = None) -> Config:
    """The config that a tool's user names.

    Args:
        path (str): The file.
        options (dict, optional): Settings to replace, as by
            ``--cfg-options``. Defaults to None.

    Raises:
        ValueError: If it is missing or not a config, with the reason.
    """
    try:
        config = Config.fromfile(path)
        config.merge_from_dict(options or {})
    except (OSError, SyntaxError, KeyError, ValueError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise ValueError(
            f'{path} cannot be read as a config: {reason}') from error
    return config


def import_package(name: str, needed_by: str, hint: str = ''):
    """Imports an optional package.

    Args:
        name (str): Name of the module and of the package.
        needed_by (str): What needs it, for the error message.
        hint (str): The end of that message. Defaults to ''.

    Raises:
        ValueError: If the package is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(f'{needed_by} needs the package {name}: pip install '
                         f'{name}. {hint}'.rstrip()) from error


@contextmanager
def reading(what: str, hint: str = '') -> Iterator[None]:
    """Turns every error into one that names what is read.

    Args:
        what (str): A file or a part of one.
        hint (str): The end of the message. Defaults to ''.

    Raises:
        ValueError: If the body raises, whatever it raises.
    """
    try:
        yield
    except Exception as error:  # every library raises its own
        reason = (str(error) or repr(error)).splitlines()[0]
        fault = ('cannot be read' if isinstance(error, PermissionError) else
                 'is damaged or cut off, or holds more than data')
        raise ValueError(
            printable(f'{what} {fault}: {reason}{hint}')) from error


def write_file(path: str, data: Union[bytes, Callable[[BinaryIO],
                                                      None]]) -> None:
    """Writes a file under a temporary name and then renames it.

    If the process is killed or the power fails, ``path`` is either as it was
    or complete. After an error nothing is left of the new file. Of several
    processes that write the same file, the last one wins.

    Args:
        path (str): Missing folders are created.
        data (bytes | Callable): The contents, or a function that writes them
            to the open file.
    """
    path = os.fspath(path)
    folder = os.path.dirname(os.path.abspath(path))
    mmengine.mkdir_or_exist(folder)
    temporary = f'{path}.{os.urandom(4).hex()}{TEMPORARY}'
    try:
        with open(temporary, 'xb') as file:
            data(file) if callable(data) else file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.remove(temporary)
        raise
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network drives refuse
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def shorten(classes) -> str:
    """The first ten names, for a message."""
    names = ', '.join(map(repr, classes[:10]))
    return f'({names}{", ..." if len(classes) > 10 else ""})'


def shown(value) -> str:
    """A value of a file in at most 80 characters, none of them a control."""
    try:
        text = reprlib.repr(value)
    except ValueError:  # an int of thousands of digits
        text = f'a huge {type(value).__name__}'
    return printable(text)[:80]


def printable(text: str) -> str:
    """The same text with control characters escaped."""
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
