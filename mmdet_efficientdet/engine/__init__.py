"""What runs around the network in a training: hooks, schedule, loop."""
from .class_transfer_hook import ClassTransferHook
from .optim_wrapper import (GroupedOptimWrapperConstructor,
                            LocalClipOptimWrapper)
from .plain_errors import DetInferencer, PlainErrorRunner
from .preflight import PreflightHook
from .reproducible import (SeededIterBasedTrainLoop, SeededSampler, SeedHook,
                           SeedTransforms)
from .safe_checkpoint import SafeCheckpointHook
from .schedule import BatchScaleHook, WarmupCosineLR

__all__ = [
    'BatchScaleHook', 'ClassTransferHook', 'DetInferencer',
    'GroupedOptimWrapperConstructor', 'LocalClipOptimWrapper',
    'PlainErrorRunner', 'PreflightHook', 'SafeCheckpointHook', 'SeedHook',
    'SeedTransforms', 'SeededIterBasedTrainLoop', 'SeededSampler',
    'WarmupCosineLR'
]
