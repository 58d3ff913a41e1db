"""Trainings that are killed go on as if they had not been."""
import json
from pathlib import Path

import pytest
import torch
import verify_resume
from helpers.tiny_data import TOOLS, make_dataset, run_tool, write_config
from verify_resume import state

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
    assert 'will not be bit-identical' not in done.output
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


@pytest.mark.slow
def test_iterations_survive(tmp_path):
    """Killed in a step, in a half written file, and between two files."""

    def in_a_step(folder):
        assert last(folder) == 'iter_4.pth'

    def in_a_file(folder):
        assert last(folder) == 'iter_4.pth'
        whole, half = files(folder)
        assert whole == 'iter_4.pth'
        assert half.startswith('iter_6.pth.') and half.endswith('.tmp')
        assert (folder / half).stat().st_size == 10000

    def before_removal(folder):
        assert last(folder) == 'iter_6.pth'
        assert files(folder) == ['iter_4.pth', 'iter_6.pth']

    starts = [
        ((*STEP, 5), 2, in_a_step),
        (('os', 'fsync', 1), 0, in_a_file),
        # The first time is after the validation that is made again.
        (('mmdet_efficientdet.engine.atomic_backend:AtomicBackend', 'clean',
          2), 1, before_removal)
    ]
    _, killed = check_survival(tmp_path, BY_ITERATION, starts, 'iter_8.pth')
    assert files(killed) == ['iter_8.pth']


@pytest.mark.slow
def test_epochs_survive(tmp_path):
    """Killed within an epoch; the workers are others then."""

    def check(folder):
        assert last(folder) == 'epoch_1.pth'

    check_survival(tmp_path, BY_EPOCH, [((*STEP, 5), 2, check)], 'epoch_3.pth')


@pytest.mark.parametrize('change', ['nothing', 'loss', 'weights'])
def test_differences_are_told(change, monkeypatch, capsys):
    """tools/proof/verify_resume.py fails where a loss or a tensor differs."""

    def train(folder, steps, seed, kill=None):
        logs = folder / '1' / 'vis_data'
        logs.mkdir(parents=True, exist_ok=True)
        rows = [
            json.dumps(dict(loss=1 / (i + 1), step=i + 1))
            for i in range(steps)
        ]
        if change == 'loss' and folder.name == 'second':
            rows[1] = json.dumps(dict(loss=0.6, step=2))
        (logs / 'scalars.json').write_text('\n'.join(rows))
        weights = torch.zeros(3)
        if change == 'weights' and folder.name == 'killed':
            weights[1] = 1e-7
        parts = {
            key: dict(a=weights.clone())
            for key in ('state_dict', 'ema_state_dict', 'optimizer',
                        'param_schedulers')
        }
        torch.save(
            dict(parts, meta=dict(seed=seed, epoch=0, iter=steps)),
            folder / f'iter_{steps}.pth')
        (folder / 'last_checkpoint').write_text('iter_2.pth')
        return 1, steps

    monkeypatch.setattr(verify_resume, 'train', train)
    with pytest.raises(SystemExit) as end:
        verify_resume.main(['--steps', '3', '--kills', '2'])
    assert end.value.code == (change != 'nothing')
    lines = capsys.readouterr().out.splitlines()
    assert f'the same loss: {3 - (change == "loss")} of 3 steps' in lines
    assert 'goes on from iter_2.pth' in lines[-2]
    assert lines[-1] == (
        'of 7 tensors and numbers differ: 0 in the second training, '
        f'{4 * (change == "weights")} in the killed one')
