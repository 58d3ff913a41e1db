"""EfficientDet for MMDetection: EfficientNet backbone, BiFPN neck, head.

Importing the package imports neither torch nor mmdet. MMDetection finds the
classes by their prefixed names, such as ``mmdet_efficientdet.BiFPN``; the same
classes are attributes of the package, which import what they need. The
schemes of published weights, such as ``effdet://``, are known as soon as
mmengine can load a checkpoint.
"""
from importlib import import_module

from . import scaling

__version__ = '0.2.0'

SCHEMES = {
    'automl://': 'load_from_published',
    'effdet://': 'load_from_published',
    'pypi://': 'load_from_pypi',
    'release://': 'load_from_release',
    'timm://': 'load_from_timm'
}

# What runs without MMDetection, and its module
DEPLOY = dict(
    Detections='detector',
    Detector='detector',
    PlainNetwork='network',
    load_detector='detector',
    load_plain='network',
    plain_network='folding',
    save_plain='network')

try:
    import wrapt
    from mmengine.config.utils import MODULE2PACKAGE
except ImportError:  # scaling and its table need neither
    pass
else:
    # Lets mmengine resolve 'mmdet_efficientdet::...' configs and models. The
    # value names a module, whose folder mmengine takes. It cannot find the
    # folder of a distribution that was installed with pip install -e.
    MODULE2PACKAGE.setdefault(__name__, f'{__name__}.utils')

    @wrapt.when_imported('mmengine.runner.checkpoint')
    def _register_schemes(module) -> None:
        """Registers the names of published weights in mmengine."""

        def loader(function: str):

            def load(filename, map_location=None):
                schemes = import_module('.weights.schemes', __name__)
                return getattr(schemes, function)(filename, map_location)

            load.__name__ = function  # mmengine logs it
            return load

        for prefix, function in SCHEMES.items():
            module.CheckpointLoader.register_scheme(prefix, loader(function))


def __getattr__(name: str):
    # Every class of a wing, and what the table of sizes has. Other names,
    # which Python and its tools look for, import nothing.
    if name == '__all__':
        return __dir__()
    if name in scaling.__all__:
        return getattr(scaling, name)
    if name in DEPLOY:
        module = import_module(f'.deploy.{DEPLOY[name]}', __name__)
        return getattr(module, name)
    if name[0].isupper():
        for wing in _wings():
            if name in wing.__all__:
                return getattr(wing, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list:
    return sorted({'__version__', *DEPLOY,
                   *scaling.__all__}.union(*(wing.__all__
                                             for wing in _wings())))


def _wings() -> list:
    utils = import_module('.utils', __name__)
    return [import_module(f'.{wing}', __name__) for wing in utils.WINGS]
