"""Options that are turned off by themselves."""
import pytest
from helpers.tiny_data import LITE0, make_dataset, run_tool, write_config
from helpers.toy_training import toy_runner
from mmengine.config import Config

HOOKS = Config.fromfile(LITE0).default_hooks


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp('runner') / 'data')


@pytest.mark.parametrize('name', HOOKS)
def test_no_hook(name, tmp_path):
    """Any hook of the recipe can be left out; the others work."""
    hooks = {
        key: hook
        for key, hook in HOOKS.items() if key != 'visualization'
    }
    runner = toy_runner(tmp_path, [0.5], **{**hooks, name: None})
    runner.train()
    assert runner.iter == 3
    assert (tmp_path / 'epoch_1.pth').exists() == (name != 'checkpoint')
    kind = HOOKS[name].type.rpartition('.')[2]
    assert kind not in [type(hook).__name__ for hook in runner.hooks]


@pytest.mark.slow
def test_none_on_the_command_line(root, tmp_path):
    """The host's own scripts, without a hook of ours and without workers."""
    config = write_config(tmp_path / 'mine.py', root)
    options = [
        '--cfg-options',
        *(f'default_hooks.{name}=None'
          for name in HOOKS if name not in ('checkpoint', 'logger')),
        *(f'{part}_dataloader.{option}' for part in ('train', 'val', 'test')
          for option in ('num_workers=0', 'persistent_workers=True'))
    ]
    done = run_tool(
        'train.py',
        config,
        *options,
        'train_cfg.max_epochs=1',
        'train_cfg.val_begin=9',
        cwd=tmp_path)
    assert done.code == 0, done.output
    for name in ('EMAHook', 'PreflightHook', 'SeedHook'):
        assert name not in done.output.split('Hooks will be executed')[1]
    weights = tmp_path / 'work_dirs' / 'mine' / 'epoch_1.pth'
    done = run_tool('test.py', config, weights, *options, cwd=tmp_path)
    assert done.code == 0, done.output
    assert 'coco/bbox_mAP' in done.output


@pytest.mark.slow
def test_benchmark_starts(tmp_path):
    """The host's script imports psutil."""
    done = run_tool('analysis_tools/benchmark.py', '--help', cwd=tmp_path)
    assert done.code == 0, done.output
