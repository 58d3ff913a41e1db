"""What mmengine looks for when a package is used by name."""


def register_all_modules(init_default_scope: bool = True) -> None:
    """Registers every class, as mmengine's hub and inferencers ask for it.

    Args:
        init_default_scope (bool): Also makes ``mmdet_efficientdet`` the
            default scope, from which MMDetection's classes are found, too.
            Defaults to True.
    """
    from mmdet.utils import register_all_modules as register_mmdet
    from mmengine.registry import init_default_scope as set_scope

    from . import hooks, models, transforms  # noqa: F401

    register_mmdet(init_default_scope=False)
    if init_default_scope:
        set_scope('mmdet_efficientdet')
