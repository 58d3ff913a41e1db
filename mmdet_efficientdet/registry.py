"""The registries of the scope ``mmdet_efficientdet``.

Every registry of MMDetection has a child here, so that a config with
``default_scope='mmdet'`` finds our classes by prefix, and a config with
``default_scope='mmdet_efficientdet'`` finds MMDetection's without one.
Nothing is registered into MMDetection's own scope, where names such as
``EfficientNet`` are taken.
"""
import mmdet.registry as mmdet_registry
from mmengine.registry import Registry

from .utils import WINGS

_wings = [f'{__package__}.{wing}' for wing in WINGS]
for _name, _parent in vars(mmdet_registry).items():
    if isinstance(_parent, Registry) and _parent.scope == 'mmdet':
        # mmengine imports the locations of a registry, not of its parent.
        globals()[_name] = Registry(_parent.name, None, _parent, __package__,
                                    _parent._locations + _wings)
