"""Trainings that are killed, run out of disk or meet a NaN."""
import errno
import hashlib
import os
import resource
import socket
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.runner import Runner
from test_configs import batch
from test_training import new_model
from tiny_data import LITE0, TOOLS, make_dataset, run_tool, write_config

from mmdet_efficientdet.files import AtomicBackend, write_file
from mmdet_efficientdet.models.loss_guard import NonFiniteLossError

# train.py, in which the process kills itself with SIGKILL at a call of a
# function; a file that is being written then is cut off.
KILLED = '''
import os, pkgutil, runpy, signal
owner = pkgutil.resolve_name({owner!r})
real, calls = getattr(owner, {name!r}), []
def function(*args, **kwargs):
    calls.append(args)
    if len(calls) == {call}:
        if {name!r} == 'fsync':
            os.ftruncate(args[0], 10000)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(owner, {name!r}, function)
runpy.run_path({script!r}, run_name='__main__')
'''
STEP = ('mmengine.optim:OptimWrapper', 'update_params')
MODEL = '''
model.update(
    backbone=dict(init_cfg=None, drop_path_rate=0.5),
    neck=dict(stack_times=1),
    bbox_head=dict(stacked_convs=1))
randomness = dict(seed=None)
'''
BY_ITERATION = MODEL + '''
train_dataloader.update(num_workers=2, sampler=dict(infinite=True))
train_cfg = dict(
    _delete_=True,
    type='mmdet_efficientdet.SeededIterBasedTrainLoop',
    max_iters=8,
    val_interval=4)
default_hooks.update(
    logger=dict(interval=1),
    checkpoint=dict(by_epoch=False, interval=3, max_keep_ckpts=1))
param_scheduler = [dict(type='CosineAnnealingLR', by_epoch=False, T_max=8)]
log_processor = dict(by_epoch=False, window_size=1)
'''
BY_EPOCH = MODEL + '''
train_dataloader.update(num_workers=2)
train_cfg = dict(max_epochs=3, val_interval=1)
default_hooks.update(checkpoint=dict(interval=1, max_keep_ckpts=1))
'''


def state(path):
    """Hashes of all tensors, and all numbers, by which a training goes on."""
    saved = torch.load(path, weights_only=True)
    found = {}

    def walk(node, key):
        if isinstance(node, torch.Tensor):
            data = node.numpy().tobytes()
            node = (node.dtype, node.shape, hashlib.sha256(data).hexdigest())
        if isinstance(node, dict):
            for name, value in node.items():
                walk(value, f'{key}.{name}')
        elif isinstance(node, list):
            for i, value in enumerate(node):
                walk(value, f'{key}.{i}')
        else:
            found[key] = node

    for key in ('state_dict', 'ema_state_dict', 'optimizer',
                'param_schedulers'):
        before = len(found)
        walk(saved[key], key)
        assert len(found) > before
    for key in ('seed', 'epoch', 'iter'):
        found[key] = saved['meta'][key]
    return found


def check_survival(tmp_path, extra, starts, final):
    """Starts killed one after another end as a straight training does.

    Args:
        starts (list): (owner, name, call) where to kill; workers; a function
            that checks the folder then.
        final (str): Name of the last checkpoint.
    """
    root = make_dataset(tmp_path / 'data')
    config = write_config(tmp_path / 'mine.py', root, extra=extra)
    straight, killed = tmp_path / 'straight', tmp_path / 'killed'
    seed = ['--cfg-options', 'randomness.seed=3']
    done = run_tool(
        'train.py', config, '--work-dir', straight, *seed, cwd=tmp_path)
    assert done.code == 0, done.output
    assert 'will not be bit by bit' not in done.output
    for i, ((owner, name, call), workers, check) in enumerate(starts):
        source = KILLED.format(
            owner=owner, name=name, call=call, script=str(TOOLS / 'train.py'))
        # The seed is not configured: resuming takes it from the checkpoint.
        options = ['--resume', '--cfg-options'] if i else seed
        done = run_tool(
            'train.py',
            config,
            '--work-dir',
            killed,
            *options,
            f'train_dataloader.num_workers={workers}',
            cwd=tmp_path,
            source=source)
        assert done.code == -9, done.output
        check(killed)
    done = run_tool(
        'train.py', config, '--work-dir', killed, '--resume', cwd=tmp_path)
    assert done.code == 0, done.output
    expected, found = (state(folder / final) for folder in (straight, killed))
    assert len(found) > 1000 and found['seed'] == 3
    assert {k for k in found if found[k] != expected.get(k)} == set()
    assert found.keys() == expected.keys()
    return straight, killed


def last(folder):
    return Path((folder / 'last_checkpoint').read_text()).name


def files(folder):
    return sorted(path.name for path in folder.glob('iter_*'))


def test_iterations_survive(tmp_path):
    """Killed in a step, in a half written file, and between two files."""

    def in_a_step(folder):
        assert last(folder) == 'iter_4.pth'

    def in_a_file(folder):
        assert last(folder) == 'iter_4.pth'
        assert files(folder) == ['iter_4.pth', 'iter_6.pth.tmp']
        assert (folder / 'iter_6.pth.tmp').stat().st_size == 10000

    def before_removal(folder):
        assert last(folder) == 'iter_6.pth'
        assert files(folder) == ['iter_4.pth', 'iter_6.pth']

    starts = [((*STEP, 5), 2, in_a_step), (('os', 'fsync', 1), 0, in_a_file),
              (('mmdet_efficientdet.files:AtomicBackend', 'clean', 1), 1,
               before_removal)]
    _, killed = check_survival(tmp_path, BY_ITERATION, starts, 'iter_8.pth')
    assert files(killed) == ['iter_8.pth']


def test_epochs_survive(tmp_path):
    """Killed within an epoch; the workers are others then."""

    def check(folder):
        assert last(folder) == 'epoch_1.pth'

    check_survival(tmp_path, BY_EPOCH, [((*STEP, 5), 2, check)], 'epoch_3.pth')


class Toy(BaseModel):
    """A model of one weight."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, inputs, mode):
        if mode == 'predict':
            return [inputs]
        return dict(loss=(self.layer(inputs) - 3).square().mean())


class Scores(BaseMetric):
    """Scores that are known beforehand, one for each validation."""

    def __init__(self, scores):
        super().__init__()
        self.scores = list(scores)

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return dict(mAP=self.scores.pop(0))


class Watch(Hook):
    """Keeps the weights of every step."""
    priority = 'HIGHEST'

    def __init__(self):
        self.weights = []

    def after_train_iter(self, runner, *args, **kwargs):
        self.weights.append(runner.model.layer.weight.detach().clone())


def toy_runner(folder, scores, **hooks):
    """A training of one epoch for each score, with the shipped hooks."""
    shipped = Config.fromfile(LITE0).default_hooks
    shipped.checkpoint.interval = 1
    loader = dict(
        dataset=[dict(inputs=torch.ones(1) * i) for i in range(3)],
        sampler=dict(type='mmdet_efficientdet.SeededSampler'),
        batch_size=1,
        num_workers=0)
    return Runner(
        Toy(),
        work_dir=str(folder),
        experiment_name=folder.name,
        train_dataloader=dict(loader, collate_fn=dict(type='default_collate')),
        val_dataloader=dict(loader, collate_fn=dict(type='default_collate')),
        train_cfg=dict(by_epoch=True, max_epochs=len(scores)),
        val_cfg=dict(),
        val_evaluator=[Scores(scores)],
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.05)),
        default_hooks=dict(
            checkpoint=dict(shipped.checkpoint, max_keep_ckpts=1),
            ema=shipped.ema,
            **hooks),
        default_scope='mmdet',
        log_level='ERROR')


def test_never_without_a_checkpoint(tmp_path, monkeypatch):
    """Before and after each change in the folder, all that counts loads."""
    best_seen, checks = [], []

    def check():
        named = tmp_path / 'last_checkpoint'
        if named.exists():
            torch.load(named.read_text(), weights_only=True)
        best = list(tmp_path.glob('best_*.pth'))
        best_seen.extend(best)
        assert bool(best) == bool(best_seen)
        for path in best:
            torch.load(path, weights_only=True)
        checks.append(0)

    for name in ('replace', 'remove'):
        real = getattr(os, name)

        def watched(*args, real=real):
            check()
            real(*args)
            check()

        monkeypatch.setattr(os, name, watched)
    toy_runner(tmp_path, [0.5, 0.7, 0.6, 0.8]).train()
    assert len(checks) >= 30
    assert sorted(path.name for path in tmp_path.glob('*.pth')) == [
        'best_mAP_epoch_4.pth', 'epoch_4.pth'
    ]
    assert not list(tmp_path.glob('*.tmp'))


def test_best_checkpoint_is_the_average(tmp_path):
    """Of the epoch with the best score, by the official rule of averages."""
    watch = Watch()
    runner = toy_runner(tmp_path, [0.5, 0.7, 0.6])
    runner.register_hook(watch)
    runner.train()
    saved = torch.load(
        tmp_path / 'best_mAP_epoch_2.pth', weights_only=True)['state_dict']
    average = watch.weights[0]
    for step, weight in enumerate(watch.weights[1:6]):
        momentum = max(2e-4, 9 / (10 + step))  # of mmengine, a step late
        average = average + momentum * (weight - average)
    torch.testing.assert_close(saved['layer.weight'], average)
    assert (saved['layer.weight'] - watch.weights[5]).abs() > 1e-4


def test_early_stopping(tmp_path):
    """By one line of default_hooks, when two validations were no better."""
    runner = toy_runner(
        tmp_path, [0.5, 0.6, 0.59, 0.601, 0.8, 0.9],
        early_stopping=dict(
            type='EarlyStoppingHook',
            monitor='mAP',
            min_delta=0.005,
            patience=2))
    runner.train()
    assert runner.epoch == 4
    assert (tmp_path / 'best_mAP_epoch_4.pth').is_file()


@contextmanager
def files_up_to(size):
    """Larger files cannot be written, as on a full disk (errno EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize('kind', ['epoch', 'best'])
def test_full_disk(kind, tmp_path, monkeypatch):
    """The error says what to do, and the last good checkpoint stays."""

    def limited(path, data):
        with files_up_to(1000 if Path(path).name == name else -1):
            write_file(path, data)

    name = dict(epoch='epoch_2.pth', best='best_mAP_epoch_2.pth')[kind]
    monkeypatch.setattr('mmdet_efficientdet.files.write_file', limited)
    runner = toy_runner(tmp_path, [0.5, 0.6])
    with pytest.raises(OSError, match=name) as info:
        runner.train()
    assert info.value.errno == errno.EFBIG
    good = 'epoch_1.pth' if kind == 'epoch' else 'epoch_2.pth'
    for part in ('MB) could not be written', 'MB are free', '--resume',
                 f'The last good checkpoint is {tmp_path / good}. ',
                 'max_keep_ckpts'):
        assert part in str(info.value)
    assert not list(tmp_path.glob('*.tmp'))
    for path in (tmp_path / good, tmp_path / 'best_mAP_epoch_1.pth'):
        torch.load(path, weights_only=True)
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / good)


def test_write_file(tmp_path):
    """New contents come at once; an error leaves the old ones alone."""
    path = tmp_path / 'new' / 'file'
    write_file(path, b'one')
    with files_up_to(1), pytest.raises(OSError):
        write_file(path, b'two')
    assert path.read_bytes() == b'one'
    assert [p.name for p in path.parent.iterdir()] == ['file']
    with pytest.raises(PermissionError, match='denied'):  # not a full disk
        raise_from_put(tmp_path)


def raise_from_put(tmp_path):
    backend = AtomicBackend(str(tmp_path / 'last_checkpoint'))
    with pytest.MonkeyPatch.context() as patch:

        def denied(*args):
            raise PermissionError(errno.EACCES, 'denied')

        patch.setattr('mmdet_efficientdet.files.write_file', denied)
        backend.put(b'data', str(tmp_path / 'file'))


def test_spoilt_weights_are_not_saved(tmp_path):
    """They would take the place of a good checkpoint."""

    class Spoil(Hook):

        def after_train_iter(self, runner, *args, **kwargs):
            if runner.iter == 4:
                runner.model.layer.bias.data.fill_(float('nan'))

    runner = toy_runner(tmp_path, [0.5, 0.6])
    runner.register_hook(Spoil())
    with pytest.raises(RuntimeError, match='is not finite, so') as info:
        runner.train()
    assert str(tmp_path / 'last_checkpoint') in str(info.value)
    assert last(tmp_path) == 'epoch_1.pth'
    assert (tmp_path / 'epoch_1.pth').is_file()


def test_half_written_files_are_removed(tmp_path):
    """By the next start; files of others stay."""
    for name in ('epoch_9.pth.tmp', 'last_checkpoint.tmp', 'mine.tmp'):
        (tmp_path / name).write_text('half')
    toy_runner(tmp_path, [0.5]).train()
    assert [p.name for p in tmp_path.glob('*.tmp')] == ['mine.tmp']


@pytest.mark.parametrize('counts, warns', [(2, True), (3, False)])
def test_accumulation_between_checkpoints(counts, warns, tmp_path):
    """Three steps an epoch: an update every two does not fit."""
    runner = toy_runner(tmp_path, [0.5])
    runner.optim_wrapper['accumulative_counts'] = counts
    messages = []
    runner.logger.warning = messages.append
    runner.train()
    assert any('Take a multiple of 2' in m for m in messages) == warns


@pytest.fixture(scope='module')
def model():
    return new_model(Config.fromfile(LITE0))


@pytest.mark.parametrize('fault, words', [('image', 'The images themselves'),
                                          ('box', 'The boxes themselves'),
                                          ('weight', 'neck.'),
                                          ('scale', 'are finite')])
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
        words = f'{name} is not finite either: an earlier step'
        weight.data.view(-1)[0] = np.nan
    else:
        monkeypatch.setattr(model.bbox_head.loss_bbox, 'loss_weight', np.inf)
    hub = MessageHub.get_instance(f'guard {fault}')
    hub.update_info('iter', 41)
    hub.update_info('work_dir', str(tmp_path))
    with pytest.raises(NonFiniteLossError, match='step 42: .*loss') as info:
        model.loss(inputs, samples)
    path = tmp_path / 'nonfinite_step_42_rank_0.pth'
    for part in (words, '0.jpg, 1.jpg', str(path), 'learning rate', '--amp'):
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
                NonFiniteLossError, match='could not be saved: .*too large'):
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
    assert 'the loss is not finite on rank [1] of 2' in first.output
    assert 'step 1: loss_bbox=nan; the optimizer' in second.output
    assert not list(folders[0].glob('*.pth'))
    assert list(folders[1].glob('nonfinite_step_1_rank_1.pth'))
