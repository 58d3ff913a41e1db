"""The recipes of the shipped configs: averages, norms and rates."""
import copy
import re

import pytest
import torch
from helpers.models import SIZES, batch, new_model
from helpers.tiny_data import (CLASSES, CONFIGS, D0, LITE0, make_dataset,
                               run_tool)
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS as ENGINE_MODELS
from mmengine.registry import init_default_scope

GN, FINETUNE, ADVPROP, ADAMW = (
    CONFIGS / f'efficientdet_d0_{name}_coco.py'
    for name in ('1xb8-gn-300e', '1xb8-finetune-50e', '8xb16-advprop-300e',
                 '1xb8-adamw-1k'))
TREES = CONFIGS / 'efficientdet_lite0_1xb8_trees.py'


def averages_of(model):
    """The averaged copy of a model that the configs ask for."""
    config = dict(Config.fromfile(D0).default_hooks.ema)
    assert config.pop('type') == 'EMAHook' and config['strict_load']
    del config['priority']  # its effect is in test_safe_checkpoint.py
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


def train_briefly(path, **options):
    """Three steps with the optimizer of a config; returns model and log."""
    config = path if isinstance(path, Config) else Config.fromfile(path)
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


@pytest.mark.parametrize('path', [ADAMW, TREES])
def test_recipe_for_small_data(path):
    """Neck and head learn, the backbone above stride 16 slowly."""
    config = Config.fromfile(path)
    config.optim_wrapper.optimizer.lr = 1e-3  # there is no warm-up here
    before = copy.deepcopy(config.model.backbone)
    model, log, changed = train_briefly(config)
    assert changed == {'neck', 'bbox_head'}
    assert log[-1]['loss'] < 0.95 * log[0]['loss']
    assert before.norm_cfg.momentum == 0.01
    assert {
        m.momentum
        for part in (model.neck, model.bbox_head)
        for m in part.modules() if isinstance(m, torch.nn.BatchNorm2d)
    } == {0.1}
    last = model.backbone.level_ends[4]  # of stride 16
    assert [
        all(p.requires_grad for p in block.parameters())
        for block in model.backbone.blocks
    ] == [i > last for i in range(len(model.backbone.blocks))]


@pytest.mark.parametrize('path, steps', [(ADAMW, 1000), (TREES, 1200)])
def test_one_number_is_the_length(path, steps):
    """Only ``max_iters`` is for more data; all else counts steps."""
    config = Config.fromfile(path)
    assert config.train_cfg.max_iters == steps
    schedule, = config.param_scheduler
    assert not schedule.by_epoch and 'end' not in schedule
    assert 10 * schedule.warmup <= config.train_cfg.max_iters
    assert config.train_dataloader.sampler.infinite
    hooks, head = config.default_hooks, config.train_cfg
    assert head.type == 'mmdet_efficientdet.SeededIterBasedTrainLoop'
    assert not hooks.checkpoint.by_epoch and hooks.checkpoint.interval == 100
    assert not config.log_processor.by_epoch
    # Averages of the last tenth, of however many steps
    averaged = averages_of(torch.nn.Linear(1, 1))
    for steps in (300, 1000, 5000):
        averaged.steps.fill_(steps)
        share = averaged.momentum, 1 / (steps / averaged.gamma + 1)
        assert max(share) == pytest.approx(9 / steps, rel=0.05)


def test_ordinary_training_changes_statistics():
    """The recipes above differ from this."""
    assert train_briefly(LITE0)[2] == {'backbone', 'neck', 'bbox_head'}


@pytest.mark.parametrize('path, rate', [(GN, 0.01), (FINETUNE, 0.005),
                                        (ADAMW, 6e-3)])
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


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['COCO', 'VOC'])
def test_config_of_the_readme(kind, tmp_path):
    """Both forms of the data train and are evaluated."""
    root = make_dataset(tmp_path / 'data')
    readme = (CONFIGS.parents[1] / 'README.md').read_text()
    config, voc = (
        text for text in re.findall(r'```python\n(.*?)```', readme, re.S)
        if 'adamw' in text or 'VOCDataset' in text)
    lines = '''
train_dataloader.update(num_workers=0, persistent_workers=False)
val_dataloader.update(num_workers=0, persistent_workers=False)
train_cfg = dict(max_iters=2, val_interval=2)
'''
    text = config + voc * (kind == 'VOC') + lines
    for old, new in (("'configs/efficientdet", f"'{CONFIGS}"),
                     ("'d1', image_size=640",
                      "'lite0', image_size=128"), ("['cat', 'dog']",
                                                   str(CLASSES)),
                     ('data/pets', str(root)), ('images/', 'JPEGImages/'),
                     ('train.json', 'coco.json'), ('val.json', 'coco.json'),
                     ('train.txt', 'ids.txt'), ('val.txt', 'ids.txt')):
        assert old in text or kind == 'COCO'
        text = text.replace(old, new)
    (tmp_path / 'mine.py').write_text(text)
    done = run_tool('train.py', tmp_path / 'mine.py', cwd=tmp_path)
    assert done.code == 0, done.output
    key = dict(COCO='coco/bbox_mAP', VOC='pascal_voc/mAP')[kind]
    assert f'{key}: ' in done.output
    saved, = (tmp_path / 'work_dirs' / 'mine').glob('best_*.pth')
    assert saved.name == f'best_{key.replace("/", "_")}_iter_2.pth'
