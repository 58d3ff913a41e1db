"""What runs around the network in a training: hooks, schedule, loop."""
from .averaging import ForeachEMA
from .class_transfer_hook import ClassTransferHook
from .optim_wrapper import (GroupedOptimWrapperConstructor,
                            LocalClipOptimWrapper)
from .preflight import PreflightHook
from .reproducible import (SeededIterBasedTrainLoop, SeededSampler, SeedHook,
                           SeedTransforms)
from .runner import DetInferencer, DetRunner
from .safe_checkpoint import SafeCheckpointHook
from .schedule import BatchScaleHook, WarmupCosineLR

__all__ = [
    'BatchScaleHook', 'ClassTransferHook', 'DetInferencer', 'DetRunner',
    'ForeachEMA', 'GroupedOptimWrapperConstructor', 'LocalClipOptimWrapper',
    'PreflightHook', 'SafeCheckpointHook', 'SeedHook', 'SeedTransforms',
    'SeededIterBasedTrainLoop', 'SeededSampler', 'WarmupCosineLR'
]
