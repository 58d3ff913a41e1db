"""What mmengine looks for when a package is used by name, and the configs."""
from importlib import import_module
from pathlib import Path

from .scaling import SCALING


def register_all_modules(init_default_scope: bool = True) -> None:
    """Registers every class, as mmengine's hub and inferencers ask for it.

    Args:
        init_default_scope (bool): Also makes ``mmdet_efficientdet`` the
            default scope, from which MMDetection's classes are found, too.
            Defaults to True.
    """
    from mmdet.utils import register_all_modules as register_mmdet
    from mmengine.registry import init_default_scope as set_scope

    for module in ('checkpoint_hook', 'class_transfer', 'hooks', 'models',
                   'optim', 'preflight', 'reproducible', 'transforms'):
        import_module(f'.{module}', __package__)
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
