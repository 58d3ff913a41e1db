"""The registries of the scope ``mmdet_efficientdet``.

Every registry of MMDetection has a child here, so that a config with
``default_scope='mmdet'`` finds our classes by prefix, and a config with
``default_scope='mmdet_efficientdet'`` finds MMDetection's without one.
Nothing is registered into MMDetection's own scope, where names such as
``EfficientNet`` are taken.
"""
import sys
import warnings

import mmdet.registry as mmdet_registry
from mmengine.registry import Registry

from .utils import WINGS

PYTHONS = ('3.10', '3.11', '3.12')  # as the classifiers in setup.cfg

if '{}.{}'.format(*sys.version_info) not in PYTHONS or \
        sys.platform != 'linux':
    warnings.warn(
        f'mmdet_efficientdet is meant for Python {PYTHONS[0]}-{PYTHONS[-1]} '
        'on Linux; this environment is untested',
        stacklevel=2)


def _child(name: str) -> Registry:
    """Returns the child of MMDetection's registry ``name``."""
    parent = getattr(mmdet_registry, name)
    return Registry(
        parent.name,
        parent=parent,
        scope='mmdet_efficientdet',
        # mmengine imports the locations of a registry, not of its parent.
        locations=[
            *parent._locations,
            *(f'mmdet_efficientdet.{wing}' for wing in WINGS)
        ])


DATA_SAMPLERS = _child('DATA_SAMPLERS')
DATASETS = _child('DATASETS')
EVALUATOR = _child('EVALUATOR')
HOOKS = _child('HOOKS')
LOG_PROCESSORS = _child('LOG_PROCESSORS')
LOOPS = _child('LOOPS')
METRICS = _child('METRICS')
MODEL_WRAPPERS = _child('MODEL_WRAPPERS')
MODELS = _child('MODELS')
OPTIM_WRAPPER_CONSTRUCTORS = _child('OPTIM_WRAPPER_CONSTRUCTORS')
OPTIM_WRAPPERS = _child('OPTIM_WRAPPERS')
OPTIMIZERS = _child('OPTIMIZERS')
PARAM_SCHEDULERS = _child('PARAM_SCHEDULERS')
RUNNER_CONSTRUCTORS = _child('RUNNER_CONSTRUCTORS')
RUNNERS = _child('RUNNERS')
TASK_UTILS = _child('TASK_UTILS')
TRANSFORMS = _child('TRANSFORMS')
VISBACKENDS = _child('VISBACKENDS')
VISUALIZERS = _child('VISUALIZERS')
WEIGHT_INITIALIZERS = _child('WEIGHT_INITIALIZERS')
