"""What several test files share."""
import json
import logging

import numpy as np
import pytest
import torch
from helpers.tiny_data import TOOLS, run_tool
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


SCRIPTS = '''
import json
import runpy
import sys
messages = {}
for name, (script, *args) in CALLS.items():
    sys.argv = [f'{TOOLS}/{script}', *args]
    try:
        runpy.run_path(sys.argv[0], run_name='__main__')
    except Exception as error:
        messages[name] = f'{type(error).__name__}: {error}'
with open('messages.json', 'w') as file:
    json.dump(messages, file)
'''


@pytest.fixture(scope='session')
def errors_of_scripts():
    """Runs scripts of the host, one after the other in one new process.

    Returns a function of the calls, name to (script, argument, ...), and of
    an empty folder to run in; it returns the errors by name and the output.
    """

    def run(calls, folder):
        calls = {name: list(map(str, call)) for name, call in calls.items()}
        source = f'CALLS = {calls!r}\nTOOLS = {str(TOOLS)!r}\n{SCRIPTS}'
        done = run_tool('source', cwd=folder, source=source)
        assert done.code == 0, done.output
        messages = json.loads((folder / 'messages.json').read_text())
        return messages, done.output

    return run
