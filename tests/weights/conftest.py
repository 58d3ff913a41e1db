"""Weights of effdet, and the converter, which several files use."""
import runpy
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.tensorflow_files import tf_shapes, values, write_bundle
from helpers.tiny_data import LITE0
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import DefaultScope
from oracles import effdet_reference

CONVERTER = Path(__file__).parents[2] / 'tools' / 'convert_checkpoint.py'


@pytest.fixture(scope='session')
def effdet_lite0():
    """State dict of effdet's Lite0 with random weights; not to be changed."""
    return effdet_reference.build('lite0', (64, 64)).state_dict()


@pytest.fixture(scope='session')
def effdet_file(effdet_lite0, tmp_path_factory):
    """The same in a file; not to be changed."""
    path = tmp_path_factory.mktemp('effdet') / 'lite0.pth'
    torch.save(effdet_lite0, path)
    return path


@pytest.fixture(scope='session')
def lite0():
    """State dict of our Lite0 for 80 classes; not to be changed."""
    config = Config.fromfile(LITE0).model
    config.backbone.init_cfg = None
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(config).state_dict()


@pytest.fixture(scope='session')
def automl_lite0(lite0, tmp_path_factory):
    """A folder with the archive of automl://efficientdet-lite0.

    Nobody has published its hash, so random weights are accepted. They are
    ``tensors``, by TensorFlow's names.
    """
    folder = tmp_path_factory.mktemp('automl')
    shapes = {
        key: value.shape
        for key, value in lite0.items()
        if not key.endswith('num_batches_tracked')
    }
    for leaf in ('weight', 'bias'):
        key = f'bbox_head.conv_cls.pointwise.{leaf}'
        shapes[key] = (9 * 90, *shapes[key][1:])
    tensors = {
        name: np.abs(value) if name.endswith('variance') else 0.05 * value
        for name, value in values(tf_shapes(shapes, 'lite0'), 0).items()
    }
    (folder / 'efficientdet-lite0').mkdir()
    write_bundle(folder / 'efficientdet-lite0' / 'model', tensors)
    with tarfile.open(folder / 'efficientdet-lite0.tgz', 'w:gz') as archive:
        archive.add(folder / 'efficientdet-lite0', 'efficientdet-lite0')
    return SimpleNamespace(folder=folder, tensors=tensors)


@pytest.fixture
def run_converter(monkeypatch, capsys, log):
    """Runs tools/convert_checkpoint.py here: exit status and output.

    What the tool does not catch fails the test.
    """

    def run(*args):
        monkeypatch.setattr(sys, 'argv', [str(CONVERTER), *map(str, args)])
        capsys.readouterr()
        log.clear()
        message, code = '', 0
        try:
            runpy.run_path(str(CONVERTER), run_name='__main__')
        except SystemExit as error:
            message, code = str(error.code or ''), int(bool(error.code))
        output = capsys.readouterr()
        return code, '\n'.join([*log, output.out, output.err, message])

    return run
