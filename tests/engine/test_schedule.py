"""The official learning rate of each step, and its scaling."""
import re

import pytest
import torch
from helpers.models import SIZES
from helpers.tiny_data import CONFIGS, make_dataset, run_tool, write_config
from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS

from mmdet_efficientdet.engine.schedule import WarmupCosineLR

# Official values for 128 of 120,000 images, 300 epochs: 937.5 steps each.
GOLDEN = {
    0: 0.008,
    468: 0.0839189,
    936: 0.1598378,
    937: 0.1599956,
    140_156: 0.0800004,
    280_000: 4.9222e-7,
    281_249: 4.4017e-6
}


def sgd(lr=0.16):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


@pytest.mark.parametrize('step', GOLDEN)
def test_golden_learning_rates(step):
    scheduler = WarmupCosineLR(sgd(), warmup=937, end=281_250, by_epoch=False)
    scheduler._global_step = step - 1
    scheduler.step()
    assert scheduler.get_last_value()[0] == pytest.approx(
        GOLDEN[step], rel=2e-5)


def test_rate_of_each_step():
    """The step of the optimizer with index s has the rate of step s."""
    optimizer = sgd()
    scheduler = PARAM_SCHEDULERS.build(
        dict(
            type='mmdet_efficientdet.WarmupCosineLR',
            convert_to_iter_based=True,
            warmup=1,
            end=3,
            optimizer=optimizer,
            epoch_length=4))
    rates = []
    for _ in range(13):
        rates.append(optimizer.param_groups[0]['lr'] / 0.16)
        optimizer.step()
        scheduler.step()
    assert rates[:4] == pytest.approx([0.05, 0.2875, 0.525, 0.7625])
    # (1 + cos(pi * s / 8)) / 2, which is 0 at s = 8 and then rises again
    assert rates[4:12] == pytest.approx(
        [0.5, 0.308658, 0.146447, 0.0380602, 0, 0.0380602, 0.146447, 0.308658],
        abs=1e-6)
    assert rates[12] == rates[11]  # after the end it stays


def test_hold():
    """Until half of the steps the peak, then what torch's cosine gives."""
    held = WarmupCosineLR(
        sgd(), warmup=2, end=12, hold=0.5, start_factor=0.1, by_epoch=False)
    optimizer = sgd()
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    rates = []
    for _ in range(12):
        rates += held.get_last_value()
        held.step()
    expected = [0.016, 0.088, 0.16, 0.16, 0.16, 0.16]
    for _ in range(6):
        expected += cosine.get_last_lr()
        optimizer.step()
        cosine.step()
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize('warmup, end', [(2, 10), (3, 3)])
def test_resumed_beyond_the_end(warmup, end):
    """The rate stays, with and without a checkpoint in between."""
    straight = WarmupCosineLR(sgd(), warmup=warmup, end=end)
    for _ in range(end - 1):
        straight.step()
    last, = straight.get_last_value()
    for _ in range(5):
        straight.step()
        resumed = WarmupCosineLR(sgd(), warmup=warmup, end=end)
        resumed.load_state_dict(straight.state_dict())
        for scheduler in (straight, resumed):
            assert scheduler.optimizer.param_groups[0]['lr'] == last


def test_resumed_with_more_epochs():
    """The curve is that of the config which resumes."""
    short, long, again = (
        WarmupCosineLR(sgd(), warmup=2, end=end) for end in (5, 50, 50))
    for _ in range(5):  # the last one is beyond the end of the short one
        short.step()
        long.step()
    again.load_state_dict(short.state_dict())
    for _ in range(3):
        rate, = (group['lr'] for group in again.optimizer.param_groups)
        assert rate == long.get_last_value()[0]
        again.step()
        long.step()


def test_resumed_with_other_steps(log):
    """Steps of another kind raise, and of another length are named."""
    saved = WarmupCosineLR(sgd(), warmup=2, end=50).state_dict()
    with pytest.raises(ValueError, match='by_epoch=True.*by_epoch=False'):
        WarmupCosineLR(
            sgd(), warmup=2, end=50, by_epoch=False).load_state_dict(saved)
    for warmup in (2, 3):
        WarmupCosineLR(sgd(), warmup=warmup, end=50).load_state_dict(saved)
    message, = log
    assert '(2, 0.0)' in message and '(3, 0.0)' in message


def test_resumed_from_before_hold(log):
    """The config's value is used, and its change is named."""
    saved = WarmupCosineLR(sgd(), warmup=2, end=50).state_dict()
    held = dict(warmup=2, end=50, hold=0.5)
    for name in ('hold', None):
        scheduler = WarmupCosineLR(sgd(), **held)
        scheduler.load_state_dict(saved)
        assert scheduler.hold == 0.5
        saved.pop(name, None)
    assert len(log) == 2 and all('(2, 0.5)' in message for message in log)


def test_all_rates_follow_the_peak():
    """Another peak scales the whole curve, its start and its end, too."""
    one, two = sgd(0.16), sgd(0.01)
    for optimizer in (one, two):
        scheduler = WarmupCosineLR(optimizer, warmup=3, end=9)
        optimizer.seen = [scheduler.get_last_value()[0]]
        for _ in range(8):
            scheduler.step()
            optimizer.seen += scheduler.get_last_value()
    assert [a / 16 for a in one.seen] == pytest.approx(two.seen)


@pytest.mark.parametrize('wrong', [
    dict(hold=1.0),
    dict(hold=-0.1),
    dict(warmup=-1),
    dict(start_factor=1.5),
])
def test_wrong_schedule(wrong):
    with pytest.raises(ValueError, match='warmup'):
        WarmupCosineLR(sgd(), **wrong)


def test_end_is_that_of_the_loop():
    """The length of the training stands in one place of the configs."""
    for path in [
            *SIZES.values(),
            CONFIGS / 'efficientdet_d0_1xb8-finetune-50e_coco.py'
    ]:
        scheduler, = Config.fromfile(path).param_scheduler
        assert not {'end', 'T_max', 'begin'} & scheduler.keys()


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp('optim') / 'data')


@pytest.mark.slow
def test_scaled_by_accumulated_batches(root, tmp_path):
    """0.64 for 128 images is 0.04 for twice 4 of them; resuming keeps it.

    The batches are those of a sampler, which the host's scaling overlooks.
    """
    config = write_config(
        tmp_path / 'mine.py',
        root,
        extra='optim_wrapper = dict(optimizer=dict(lr=0.64), '
        'accumulative_counts=2)\ntrain_cfg = dict(val_interval=9)\n'
        'train_dataloader.update(batch_sampler=dict('
        "type='AspectRatioBatchSampler', batch_size=4))")
    for epochs, rate, options in ((1, 0.64, []), (2, 0.02, ['--resume'])):
        done = run_tool(
            'train.py',
            config,
            '--auto-scale-lr',
            '--cfg-options',
            f'train_cfg.max_epochs={epochs}',
            f'optim_wrapper.optimizer.lr={rate}',
            *options,
            cwd=tmp_path)
        assert done.code == 0, done.output
        assert ('uses 8 images (1 processes x 4 images x 2 accumulated)'
                in done.output)
        now, message = ((0.002, ''),
                        (0, 'The learning rate stays 0.04, as in the '
                         'checkpoint. That of this config, 0.00125,'))[epochs -
                                                                       1]
        assert f'Base learning rate 0.04, and {now} at this' in done.output
        assert message in done.output
        assert ('The learning rate stays' in done.output) == bool(message)
        rates = re.findall(r'base_lr: (\S+) lr: (\S+) ', done.output)
        # The second step of an epoch: 0.002 + 0.038 / 2, then the cosine
        # at 3 of 4 - 2 steps, 0.04 * (1 + cos(3 / 2 * pi)) / 2
        assert rates[-1] == (('2.1000e-02', ) * 2,
                             ('2.0000e-02', ) * 2)[epochs - 1]
