"""The official schedule, averages and weight decay, and their scaling."""
import re

import pytest
import torch
from helpers.models import SIZES, batch, new_model
from helpers.tiny_data import (CONFIGS, D0, LITE0, make_dataset, run_tool,
                               write_config)
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS as ENGINE_MODELS
from mmengine.registry import PARAM_SCHEDULERS, init_default_scope

from mmdet_efficientdet.engine.schedule import WarmupCosineLR

GN, FINETUNE, ADVPROP = (
    CONFIGS / f'efficientdet_d0_{name}_coco.py'
    for name in ('1xb8-gn-300e', '1xb8-finetune-50e', '8xb16-advprop-300e'))

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

# Kernels under weight decay: tensors and elements, for 90 classes.
DECAYED = {
    'd0': (150, 3_820_384),
    'd1': (200, 6_535_488),
    'd2': (216, 7_993_088),
    'd3': (251, 11_887_032),
    'd4': (297, 20_510_664),
    'd5': (331, 33_364_464),
    'd6': (381, 51_475_632),
    'd7': (381, 51_475_632),
    'd7x': (462, 76_618_528),
    'lite0': (118, 3_193_184),
    'lite1': (149, 4_180_528),
    'lite2': (165, 5_173_104),
    'lite3': (194, 8_235_904),
    'lite3x': (194, 9_155_904),
    'lite4': (228, 14_958_864)
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


@pytest.mark.parametrize('warmup, end, message', [
    (1, 1, '1 of 1 steps'),
    (100, 200, '100 of 200 steps'),
    (100, 300, '0 at step 200 and then rises again to 49%'),
    (1000, 4000, '0 at step 3000 and then rises again to 25%'),
    (100, 999, '0 at step 899 and then rises again to 3%'),
    (100, 1000, None),
    (0, 1, None),
])
def test_short_schedules(warmup, end, message, logged):
    """A warning if the rate has no time to fall."""
    scheduler = WarmupCosineLR(sgd(), warmup=warmup, end=end, by_epoch=False)
    assert len(logged) == bool(message)
    if not message:
        return
    assert message in logged[0] and 'shorter warmup' in logged[0]
    if 'rises' in message:
        rates = []
        for _ in range(end):
            rates += scheduler.get_last_value()
            scheduler.step()
        turn = int(re.search(r'0 at step (\d+)', message)[1])
        assert min(range(end), key=lambda s: rates[s]) == turn
        assert f'{rates[-1] / 0.16:.0%}' in message


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


def test_resumed_with_other_steps(logged):
    """Steps of another kind raise, and of another length are named."""
    saved = WarmupCosineLR(sgd(), warmup=2, end=50).state_dict()
    with pytest.raises(ValueError, match='by_epoch=True.*by_epoch=False'):
        WarmupCosineLR(
            sgd(), warmup=2, end=50, by_epoch=False).load_state_dict(saved)
    for warmup in (2, 3):
        WarmupCosineLR(sgd(), warmup=warmup, end=50).load_state_dict(saved)
    message, = logged
    assert 'checkpoint has 2 steps, but that of the config has 3' in message


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
    dict(warmup=-1),
    dict(start_factor=1.5),
])
def test_wrong_schedule(wrong):
    with pytest.raises(ValueError, match='warmup'):
        WarmupCosineLR(sgd(), **wrong)


def test_end_is_that_of_the_loop():
    """The length of the training stands in one place of the configs."""
    for path in [*SIZES.values(), FINETUNE]:
        scheduler, = Config.fromfile(path).param_scheduler
        assert not {'end', 'T_max', 'begin'} & scheduler.keys()


@pytest.mark.parametrize('name', DECAYED)
def test_decayed_kernels(name, build_detector):
    """Two groups: the official kernels, and all else without decay."""
    model = build_detector(name, 90, 'meta')
    wrapper = build_optim_wrapper(model,
                                  Config.fromfile(SIZES[name]).optim_wrapper)
    decayed, spared = wrapper.optimizer.param_groups
    assert decayed['weight_decay'] == 4e-5 and spared['weight_decay'] == 0
    assert decayed['lr'] == spared['lr'] == 0.16
    kernels = decayed['params']
    assert (len(kernels), sum(k.numel() for k in kernels)) == DECAYED[name]
    assert all(kernel.ndim == 4 for kernel in kernels)
    assert all(other.ndim < 2 for other in spared['params'])
    everything = {id(p) for p in model.parameters()}
    assert everything == {id(p) for p in kernels + spared['params']}
    assert wrapper.optimizer.defaults['nesterov'] is False
    assert wrapper.optimizer.defaults['momentum'] == 0.9
    assert wrapper.clip_grad_kwargs == dict(max_norm=10, norm_type=2)


def test_fusion_weights_do_not_decay(model_cfg):
    """Not even those that have a row for each channel."""
    cfg = model_cfg('d0')
    cfg.neck.fusion = 'channel_softmax'
    with torch.device('meta'):
        model = MODELS.build(cfg)
    wrapper = build_optim_wrapper(model,
                                  Config.fromfile(SIZES['d0']).optim_wrapper)
    decayed, spared = wrapper.optimizer.param_groups
    assert len(decayed['params']) == DECAYED['d0'][0]
    assert {p.ndim for p in spared['params']} == {1, 2}


def test_groups_keep_their_options():
    """The trees' backbone learns more slowly; frozen blocks not at all."""
    config = Config.fromfile(CONFIGS / 'efficientdet_lite0_1xb8_trees.py')
    config.model.backbone.init_cfg = None
    init_default_scope('mmdet')
    model = MODELS.build(config.model)
    groups = build_optim_wrapper(model,
                                 config.optim_wrapper).optimizer.param_groups
    assert {(round(g['lr'], 9), g['weight_decay'])
            for g in groups} == {(6e-4, 1e-2), (6e-4, 0), (6e-3, 1e-2),
                                 (6e-3, 0)}
    assert len(groups) == 4
    for group in groups:
        assert {p.ndim > 1
                for p in group['params']} == {group['weight_decay'] > 0}
    learned = [p for p in model.parameters() if p.requires_grad]
    assert sum(len(group['params']) for group in groups) == len(learned)
    assert len(learned) < len(list(model.parameters()))


def test_decay_of_a_key():
    """A key's own decay_mult counts for all that it names."""
    model = torch.nn.ModuleDict({
        name: torch.nn.Conv2d(1, 1, 1)
        for name in ('slow', 'decayed', 'other')
    })
    wrapper = build_optim_wrapper(
        model,
        dict(
            constructor='mmdet_efficientdet.GroupedOptimWrapperConstructor',
            optimizer=dict(type='SGD', lr=1, weight_decay=0.1),
            paramwise_cfg=dict(
                flat_decay_mult=0,
                custom_keys=dict(
                    slow=dict(lr_mult=0.5), decayed=dict(decay_mult=1)))))
    found = {
        id(parameter): (group['lr'], group['weight_decay'])
        for group in wrapper.optimizer.param_groups
        for parameter in group['params']
    }
    assert [
        found[id(parameter)] for name in ('slow', 'decayed', 'other')
        for parameter in (model[name].weight, model[name].bias)
    ] == [(0.5, 0.1), (0.5, 0), (1, 0.1), (1, 0.1), (1, 0.1), (1, 0)]


def test_decay_of_norms_is_the_users():
    """Without a key the host's own order of rules counts."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    rules = dict(flat_decay_mult=0, norm_decay_mult=1)
    optimizer = dict(type='SGD', lr=1, weight_decay=0.1)
    ours, hosts = (
        build_optim_wrapper(
            model,
            dict(
                optimizer=optimizer,
                paramwise_cfg=rules,
                constructor=constructor)) for constructor in (
                    'mmdet_efficientdet.GroupedOptimWrapperConstructor',
                    'DefaultOptimWrapperConstructor'))
    decay = [{
        id(p): group['weight_decay']
        for group in wrapper.optimizer.param_groups
        for p in group['params']
    } for wrapper in (ours, hosts)]
    assert decay[0] == decay[1]
    assert sorted(decay[0].values()) == [0, 0.1, 0.1, 0.1]


def test_shared_parameter():
    """It would be stepped twice, and its gradient counted twice."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].weight = model[0].weight
    config = dict(
        constructor='mmdet_efficientdet.GroupedOptimWrapperConstructor',
        optimizer=dict(type='SGD', lr=1),
        paramwise_cfg=dict(flat_decay_mult=0))
    with pytest.raises(ValueError, match='0.weight is shared'):
        build_optim_wrapper(model, config)
    config['paramwise_cfg']['bypass_duplicate'] = True
    group, = build_optim_wrapper(model, config).optimizer.param_groups
    assert len(group['params']) == 3


def averages_of(model):
    """The averaged copy of a model that the configs ask for."""
    config = dict(Config.fromfile(D0).default_hooks.ema)
    assert config.pop('type') == 'EMAHook' and config.pop('priority') == 49
    assert config['strict_load']
    hook = EMAHook(**config)
    return ENGINE_MODELS.build(
        dict(hook.ema_cfg), default_args=dict(model=model))


def test_averages_follow_the_official_ramp():
    """Decay min(0.9998, (1 + n) / (10 + n)), two updates late.

    The official counter n is 1 at the first update. At its first the host
    copies the weights, and then has n = 0 at the second.
    """
    model = torch.nn.BatchNorm1d(1)
    averaged = averages_of(model)

    def decay_at(steps):
        """How much of the average stays in the update after ``steps``."""
        averaged.steps.fill_(steps)
        with torch.no_grad():
            averaged.module.weight.fill_(1)
            model.weight.fill_(0)
            averaged.module.running_mean.fill_(1)
            model.running_mean.fill_(0)
        averaged.update_parameters(model)
        kept = averaged.module.weight.item()
        # Statistics of norms are averaged, not copied.
        assert averaged.module.running_mean.item() == pytest.approx(kept)
        return kept

    assert decay_at(0) == 0
    for steps, n in ((1, 0), (2, 1), (1001, 1000), (44_000, 43_999)):
        assert decay_at(steps) == pytest.approx((1 + n) / (10 + n), abs=2e-7)
    for steps in (44_991, 300_000):
        assert decay_at(steps) == pytest.approx(0.9998, abs=2e-7)


def test_averages_agree_within_50_steps():
    """What two updates of delay do to the average of a training's weights."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(100, generator=generator).cumsum(0).tolist()
    model = torch.nn.Linear(1, 1)
    averaged = averages_of(model)
    official, differences = weights[0], []
    for n, now in enumerate(weights, 1):
        official += (1 - min(0.9998, (1 + n) / (10 + n))) * (now - official)
        torch.nn.init.constant_(model.bias, now)
        averaged.update_parameters(model)
        differences.append(abs(official - averaged.module.bias.item()))
    spread = max(weights) - min(weights)
    assert max(differences) > 0.01 * spread
    assert max(differences[50:]) < 0.005 * spread


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


def train_briefly(path, **options):
    """Three steps with the optimizer of a config; returns model and log."""
    config = Config.fromfile(path)
    config.merge_from_dict(options)
    model = new_model(config)
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    data = batch((128, 128), (96, 128), num_classes=2)
    before = {key: b.clone() for key, b in model.named_buffers()}
    log = [model.train_step(data, wrapper) for _ in range(3)]
    changed = {
        key.split('.')[0]
        for key, b in model.named_buffers() if not torch.equal(b, before[key])
    }
    return model, log, changed


def test_recipe_with_group_norm():
    """Neck and head have no batch norms; the backbone's stay as they are."""
    model, log, changed = train_briefly(GN)
    assert not changed
    assert all(step['loss'].isfinite() for step in log)
    for part in (model.neck, model.bbox_head):
        norms = [
            m for m in part.modules() if isinstance(m, torch.nn.GroupNorm)
        ]
        assert norms and all(norm.num_groups == 8 for norm in norms)
        assert not any('running_mean' in key for key in part.state_dict())


def test_recipe_of_fine_tuning():
    """No statistics change, but scales and offsets are learned."""
    config = Config.fromfile(FINETUNE)
    assert (config.transfer_classes, config.train_cfg.max_epochs,
            config.load_from) == (True, 50, 'effdet://tf_efficientdet_d0')
    crop = config.train_dataloader.dataset.pipeline[-2]
    assert crop.type == 'mmdet_efficientdet.ResizeCrop'
    assert crop.ratio_range == (0.5, 1.5)
    model, log, changed = train_briefly(FINETUNE)
    assert not changed
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert log[-1]['loss'] < log[0]['loss']


def test_ordinary_training_changes_statistics():
    """The two recipes above differ from this."""
    assert train_briefly(LITE0)[2] == {'backbone', 'neck', 'bbox_head'}


@pytest.mark.parametrize('path, rate', [(GN, 0.01), (FINETUNE, 0.005)])
def test_rate_fits_the_batch(path, rate):
    """Each rate stands beside the batch that it is for."""
    config = Config.fromfile(path)
    assert config.auto_scale_lr.base_batch_size == 8
    assert config.train_dataloader.batch_size == 8
    assert config.optim_wrapper.optimizer.lr == rate


def test_group_norm_fits_every_size():
    """The kind of a width that 8 groups do not divide would raise."""
    assert all(
        Config.fromfile(path).model.neck.out_channels % 8 == 0
        for path in SIZES.values())


def test_inputs_of_advprop():
    """Black is -1, also where the image is padded."""
    config = Config.fromfile(ADVPROP)
    config.model.data_preprocessor.pad_size_divisor = 8
    init_default_scope('mmdet')
    preprocessor = MODELS.build(config.model.data_preprocessor)
    image = torch.tensor([0, 255, 0], dtype=torch.uint8).view(3, 1, 1)
    inputs = preprocessor(
        dict(inputs=[image.expand(3, 4, 8)], data_samples=None))['inputs']
    assert inputs[0, :, 0, 0].tolist() == [-1, 1, -1]
    assert (inputs[0, :, 4:] == -1).all()
