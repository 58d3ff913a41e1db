"""A loss that is not finite stops the training before the step."""
import os
import socket
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import batch, new_model
from helpers.tiny_data import (LITE0, files_up_to, make_dataset, run_tool,
                               write_config)
from mmengine.config import Config
from mmengine.logging import MessageHub

from mmdet_efficientdet.models.efficientdet_head import EfficientDetHead
from mmdet_efficientdet.models.loss_guard import NonFiniteLossError
from mmdet_efficientdet.scaling import SCALING


@pytest.fixture(scope='module')
def model():
    return new_model(Config.fromfile(LITE0))


@pytest.mark.parametrize('fault, words', [('image', 'images contain'),
                                          ('box', 'boxes contain'),
                                          ('weight', 'neck.'),
                                          ('scale', 'are finite'),
                                          ('growth', 'are finite')])
def test_guard(fault, words, model, tmp_path, monkeypatch):
    """Nothing is learned from a NaN; the message tells where it came from."""
    data = model.data_preprocessor(
        batch((128, 128), (96, 128), num_classes=2), training=True)
    inputs, samples = data['inputs'], data['data_samples']
    for i, sample in enumerate(samples):
        sample.set_metainfo(
            dict(img_path=f'{i}.jpg', matrix=np.eye(2), number=np.int64(i)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    if fault == 'image':
        inputs[1, 0, 5, 5] = np.inf
    elif fault == 'box':
        samples[1].gt_instances.bboxes[0, 2] = np.nan
    elif fault == 'weight':
        name, weight = next(
            (k, v) for k, v in model.named_parameters() if words in k)
        words = f'{name} is not finite'
        weight.data.view(-1)[0] = np.nan
    else:
        weight = np.inf if fault == 'scale' else 1e6
        monkeypatch.setattr(model.bbox_head.loss_bbox, 'loss_weight', weight)
    hub = MessageHub.get_instance(f'guard {fault}')
    hub.update_info('iter', 41)
    hub.update_info('work_dir', str(tmp_path))
    with pytest.raises(NonFiniteLossError, match='step 42: .*loss') as info:
        model.loss(inputs, samples)
    path = tmp_path / 'nonfinite_step_42_rank_0.pth'
    for part in (words, '0.jpg, 1.jpg', str(path), '--amp', 'learning rate',
                 'load_from', '--resume', 'below 100000', 'model.max_loss'):
        assert part in str(info.value)
    assert ('loss_cls=' in str(info.value)) == (fault in ('image', 'weight'))
    saved = torch.load(path, weights_only=True)
    assert saved['step'] == 42
    assert saved['inputs'].equal(inputs) or fault == 'image'
    assert saved['inputs'].shape == (2, 3, 128, 128)
    assert [s['meta']['img_path']
            for s in saved['samples']] == ['0.jpg', '1.jpg']
    for found, sample in zip(saved['samples'], samples):
        torch.testing.assert_close(
            found['bboxes'], sample.gt_instances.bboxes, equal_nan=True)
        assert found['labels'].equal(sample.gt_instances.labels)
    model.load_state_dict(before)


def test_limit(model, monkeypatch):
    """It can be set; a training that goes on is far below the default."""
    data = model.data_preprocessor(
        batch((128, 128), (128, 128), num_classes=2), True)
    args = data['inputs'], data['data_samples']
    terms = {k: v.item() for k, v in model.loss(*args).items()}
    assert 0 < sum(terms.values()) < 100
    worst = max(terms, key=terms.get)
    # Two passes may round differently.
    monkeypatch.setattr(model, 'max_loss', 0.99 * terms[worst])
    MessageHub.get_instance('limit').update_info('work_dir', os.devnull)
    with pytest.raises(NonFiniteLossError, match=f'{worst}='):
        model.loss(*args)
    monkeypatch.setattr(model, 'max_loss', np.inf)
    monkeypatch.setattr(model.bbox_head.loss_bbox, 'loss_weight', 1e9)
    assert model.loss(*args)['loss_bbox'] > 1e6


@pytest.mark.parametrize('name, num_classes', [('d0', 1203), ('d7x', 1203)])
def test_no_sound_training_meets_the_limit(name, num_classes):
    """The largest loss that it starts with, of 16 images without objects."""
    row = SCALING[name]
    cells = sum((-(-row.image_size // 2**level))**2
                for level in range(3, row.max_level + 1))
    head = EfficientDetHead(num_classes, 4)
    head.init_weights()
    prior = head.conv_cls.pointwise.bias[:1, None]
    term = head.loss_cls(prior, torch.tensor([1]), avg_factor=1.0)
    assert 2e3 < 16 * 9 * cells * num_classes * term < 1e5


@pytest.mark.slow
def test_diverging_training_stops(tmp_path):
    """A loss that grows without end stays finite if gradients are clipped."""
    root = make_dataset(tmp_path / 'data')
    config = write_config(tmp_path / 'config.py', root)
    done = run_tool(
        'train.py',
        config,
        '--cfg-options',
        'optim_wrapper.optimizer.lr=1e3',
        'train_cfg.max_epochs=9',
        'train_cfg.val_interval=9',
        cwd=tmp_path)
    assert done.code == 1
    assert 'loss_bbox=' in done.output and 'below 100000' in done.output
    assert 'nan' not in done.output.rsplit('NonFiniteLossError', 1)[1]


def test_guard_comes_before_the_step(model, tmp_path):
    """The optimizer is not reached; without a work directory, the file is
    in the current one, and a full disk does not hide the loss."""

    class Optimizer:

        @contextmanager
        def optim_context(self, model):
            yield

        def update_params(self, loss):
            raise AssertionError

    MessageHub.get_instance('no folder')
    data = batch((128, 128), (128, 128), num_classes=2)
    data['inputs'][0] = data['inputs'][0].float() * np.nan
    previous = Path.cwd()
    os.chdir(tmp_path)
    try:
        with pytest.raises(NonFiniteLossError, match='step 1: '):
            model.train_step(data, Optimizer())
        assert Path('nonfinite_step_1_rank_0.pth').is_file()
        with files_up_to(10), pytest.raises(
                NonFiniteLossError, match='loss_cls=nan.*\n.*\n.*too large'):
            model.train_step(data, Optimizer())
    finally:
        os.chdir(previous)


RANK = '''
import os
os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT={port!r},
                  RANK={rank!r}, WORLD_SIZE='2')
import torch
torch.distributed.init_process_group('gloo')
from mmdet_efficientdet.models.loss_guard import check_finite
losses = dict(loss_cls=torch.tensor(1.), loss_bbox=[torch.tensor(2.)] * 2)
check_finite(losses, torch.nn.Linear(1, 1), torch.ones(1), [])
print('finite')
losses['loss_bbox'] = [torch.tensor([2., float('nan')][int({rank!r})])]
check_finite(losses, torch.nn.Linear(1, 1), torch.ones(1), [])
'''


@pytest.mark.distributed
def test_guard_on_two_ranks(tmp_path):
    """One NaN stops both, so that none waits for the other."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    folders = [tmp_path / rank for rank in '01']
    for folder in folders:
        folder.mkdir()
    with ThreadPool(2) as pool:
        first, second = pool.map(
            lambda folder: run_tool(
                'rank',
                cwd=folder,
                source=RANK.format(port=port, rank=folder.name),
                timeout=120), folders)
    for done in (first, second):
        assert done.code == 1 and 'finite\n' in done.output, done.output
    assert 'rank [1] of 2' in first.output
    assert 'step 1: loss_bbox=nan' in second.output
    assert not list(folders[0].glob('*.pth'))
    assert list(folders[1].glob('nonfinite_step_1_rank_1.pth'))
