"""What several test files share."""
import logging

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.logging import MMLogger

from mmdet_efficientdet.utils import config_file


@pytest.fixture(scope='module', autouse=True)
def _registered():
    """The fixtures of a file start in MMDetection's scope, too."""
    register_all_modules()


@pytest.fixture(autouse=True)
def _reproducible():
    """Every test starts in MMDetection's scope and with the same seeds."""
    register_all_modules()
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def log():
    """Messages that mmengine's current logger gets."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.fixture
def model_cfg():
    """A function that reads the model of a shipped config, by size."""

    def read(name, num_classes=90):
        model = Config.fromfile(config_file(name)).model
        model.backbone.init_cfg = None
        model.bbox_head.num_classes = num_classes
        return model

    return read


@pytest.fixture
def build_detector(model_cfg):
    """A function that builds the detector of a shipped config, by size."""

    def build(name, num_classes=90, device='cpu'):
        with torch.device(device):
            return MODELS.build(model_cfg(name, num_classes))

    return build
