"""EfficientDet for MMDetection: EfficientNet backbone, BiFPN neck, head.

Importing the package imports neither torch nor mmdet. MMDetection finds the
classes by their prefixed names, such as ``mmdet_efficientdet.BiFPN``, which
import what they need; the same names are attributes of the package.
"""
import importlib

try:  # lets mmengine resolve 'mmdet_efficientdet::...' configs and models
    from mmengine.config.utils import MODULE2PACKAGE
except ImportError:  # scaling and its table need no mmengine
    pass
else:
    MODULE2PACKAGE.setdefault(__name__, __name__)

__version__ = '0.1.0'

_EXPORTS = dict(
    AnchorBoxCoder='models',
    AnchorGenerator='models',
    BatchScaleHook='optim',
    BiFPN='models',
    ClassCheckHook='hooks',
    ClassTransferHook='class_transfer',
    CompoundScaling='scaling',
    EfficientDet='models',
    EfficientDetHead='models',
    EfficientNet='models',
    GroupedOptimWrapperConstructor='optim',
    LocalClipOptimWrapper='optim',
    PreflightHook='preflight',
    ResizeCrop='transforms',
    SCALING='scaling',
    SafeCheckpointHook='checkpoint_hook',
    SeedHook='reproducible',
    SeedTransforms='reproducible',
    SeededIterBasedTrainLoop='reproducible',
    SeededSampler='reproducible',
    WarmupCosineLR='optim',
    scale_config='scaling')

__all__ = ['__version__', *_EXPORTS]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module = importlib.import_module(f'{__name__}.{_EXPORTS[name]}')
    return getattr(module, name)


def __dir__() -> list:
    return sorted(__all__)
