"""Learning rate, batch and norms are checked for the real batch."""
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from helpers.broken_data import (build_model, find_faults, lines, names_of,
                                 text_of, write_broken)
from helpers.tiny_data import CLASSES, CONFIGS
from mmdet.registry import DATASETS
from mmengine.config import Config

from mmdet_efficientdet.engine.recipe_checks import (check_length,
                                                     check_recipe, stale_share)


def last_batches(config, gpus=1):
    """Findings of a single image in the last batch."""
    images = len(DATASETS.build(config.train_dataloader.dataset))
    found = check_length(config, build_model(config), gpus, images)
    return [pair for pair in names_of(found) if pair[1] == 'last_batch']


@pytest.mark.parametrize('options, gpus, alone', [
    ({}, 1, True),
    ({'train_dataloader.drop_last': True}, 1, False),
    ({'train_dataloader.batch_size': 6}, 1, False),
    ({'train_dataloader.batch_size': 1}, 1, True),
    ({'train_dataloader.sampler.infinite': True}, 1, False),
    ({'train_dataloader.dataset.indices': 8}, 1, False),
    ({'train_dataloader.batch_size': 4}, 4, True),
    ({'train_dataloader.batch_size': 4,
      'train_dataloader.dataset.indices': 36}, 4, True),
    ({'model.neck.norm_cfg': None, 'model.bbox_head.norm_cfg': None}, 1,
     False),
    ({'train_dataloader.batch_size': 4, 'sync_bn': 'torch'}, 4, False),
    ({'sync_bn': 'torch'}, 1, True),
    ({'model.norm_eval': True}, 1, False),
    ({'model.backbone.norm_eval': True}, 1, True),
    ({'train_dataloader.sampler': None}, 1, True),
    ({'train_dataloader.num_batch_per_epoch': 2}, 1, False),
    ({'train_dataloader.batch_sampler': dict(drop_last=True)}, 1, False),
    ({'train_dataloader.batch_sampler': dict(batch_size=5)}, 1, False),
    ({'train_dataloader.batch_size': 5,
      'train_dataloader.batch_sampler': dict(batch_size=4)}, 1, True),
    ({'model.data_preprocessor.pad_size_divisor': 256}, 1, False),
    ({'model.data_preprocessor.pad_size_divisor': (64, 256)}, 1, False),
    ({'model.data_preprocessor.pad_size_divisor': (64, 128)}, 1, True),
    ({'train_cfg': dict(max_iters=3)}, 1, False),
    ({'train_cfg': dict(max_iters=5)}, 1, True),
    ({'train_dataloader.dataset.pipeline': [
        dict(type='Resize', scale=(100, 128), keep_ratio=False)]}, 1, True),
    ({'train_dataloader.dataset.pipeline': [
        dict(type='Resize', scale=(100, 129), keep_ratio=False)]}, 1, False),
    ({'train_dataloader.dataset.pipeline': [
        dict(type='Resize', scale=(64, 64), keep_ratio=True)]}, 1, False),
])  # yapf: disable
def test_last_batch_of_one_image(options, gpus, alone, tmp_path):
    """33 images, 8 at a time, or 9 on each of 4 GPUs, 4 at a time."""
    fault = lines("train_dataloader['dataset'].update(indices=33)\n"
                  'sync_bn = None')
    config = Config.fromfile(write_broken(tmp_path, fault))
    config.merge_from_dict(options)
    assert last_batches(config, gpus) == [('ERROR', 'last_batch')] * alone


@pytest.mark.parametrize('sides, alone',
                         [((64, 128), True), ((64, 256), False),
                          ((256, 64), False)])
def test_last_batch_of_several_files(sides, alone, tmp_path):
    """The image that is alone may be a large one."""
    config = Config.fromfile(write_broken(tmp_path, lines('')))
    config.sync_bn = None
    parts = []
    for side in sides:
        part = deepcopy(config.train_dataloader.dataset)
        part.pipeline[-2].image_size = side
        parts.append(dict(part, indices=4))
    config.train_dataloader.batch_size = 7
    config.train_dataloader.dataset = dict(
        type='ConcatDataset', datasets=parts)
    config.model.data_preprocessor.pad_size_divisor = 1
    assert bool(last_batches(config)) == alone


@pytest.mark.parametrize('side, fails', [(128, True), (192, False)])
def test_one_pixel_of_one_image(side, fails, tmp_path):
    """The neck raises just where the pre-flight says so."""
    config = Config.fromfile(write_broken(tmp_path, lines('')))
    config.train_dataloader.batch_size = 1
    config.train_dataloader.dataset.pipeline[-2].image_size = side
    config.model.data_preprocessor.pad_size_divisor = side
    model = build_model(config)
    assert bool(last_batches(config)) == fails
    image = torch.zeros(1, 3, side, side)
    with pytest.raises(ValueError, match='1x1 pixels') if fails \
            else nullcontext():
        model.bbox_head(model.extract_feat(image))


@pytest.mark.parametrize('norm, gpus, warns', [('BN', 8, True),
                                               ('SyncBN', 8, False),
                                               ('SyncBN', 1, True)])
def test_norms_over_all_gpus(norm, gpus, warns, tmp_path):
    config = Config.fromfile(write_broken(tmp_path, lines('')))
    config.sync_bn, config.auto_scale_lr = None, None
    config.train_dataloader.batch_size = 2
    model = torch.nn.Sequential(
        dict(BN=torch.nn.BatchNorm2d, SyncBN=torch.nn.SyncBatchNorm)[norm](4))
    assert bool(check_recipe(config, model, gpus)) == warns


@pytest.mark.parametrize('gpus, options, names', [
    (1, {}, ['learning_rate', 'batch_norm', 'last_batch']),
    (8, {}, []),
    (1, {'auto_scale_lr.enable': True}, ['batch_norm', 'last_batch']),
    (1, {'optim_wrapper.accumulative_counts': 8},
     ['batch_norm', 'last_batch']),
    (8, {'sync_bn': None}, ['batch_norm', 'last_batch']),
    # Without batch norms in training there is no group.
    (1, {'auto_scale_lr.enable': True, 'model.neck.norm_cfg': None,
         'model.bbox_head.norm_cfg': None,
         'model.backbone.norm_eval': True}, []),
])  # yapf: disable
def test_options(gpus, options, names, tmp_path):
    """The number of GPUs and --auto-scale-lr change what is right."""
    config = write_broken(tmp_path, lines("sync_bn = 'torch'"))
    options['train_dataloader.batch_size'] = 1
    found = find_faults(config, False, gpus, options)
    assert names_of(found) == [('ERROR' if name == 'last_batch' else 'WARNING',
                                name) for name in names]


@pytest.mark.parametrize('batch, warns', [(4, True), (5, False), (15, False),
                                          (16, True)])
def test_rate_of_another_batch(batch, warns, tmp_path):
    """The recipes for 8 images are also for 4 and 16, with another rate."""
    config = write_broken(tmp_path, lines(''))
    found = find_faults(
        config, images=False, options={'train_dataloader.batch_size': batch})
    assert (('WARNING', 'learning_rate') in names_of(found)) == warns


def found_with(folder, text, **options):
    """Names of what is found in sound data with these lines."""
    config = write_broken(folder, lines(text))
    return [f.name for f in find_faults(config, False, options=options)]


@pytest.mark.parametrize('images, epochs, names', [
    (1, 300, ['few_boxes', 'last_batch', 'few_images', 'cold_norms']),
    (5, 300, ['few_boxes', 'few_images', 'cold_norms']),
    (20, 300, ['few_boxes', 'few_images', 'cold_norms']),
    (36, 300, []),
])
def test_few_images(images, epochs, names, tmp_path):
    """Each thing that is missing is named once."""
    text = f"""
import json
data = json.load(open(dataset['data_root'] + 'train.json'))
data['images'] = data['images'][:{images}]
ids = [image['id'] for image in data['images']]
data['annotations'] = [
    box for box in data['annotations'] if box['image_id'] in ids]
json.dump(data, open(dataset['data_root'] + 'few.json', 'w'))
del data, ids
dataset['ann_file'] = 'few.json'
train_cfg = dict(max_epochs={epochs})
"""
    # One image in each epoch is a batch of one pixel on the last level.
    assert sorted(found_with(tmp_path, text)) == sorted(names)


def test_three_steps(tmp_path):
    """Too few for anything; the warm-up is one that fits."""
    text = """
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=3)
param_scheduler = [dict(type='mmdet_efficientdet.WarmupCosineLR', warmup=30,
                        by_epoch=False)]
"""
    config = write_broken(tmp_path, lines(text))
    found = {f.name: f for f in find_faults(config, images=False)}
    assert found.keys() == {'steps', 'warmup', 'cold_norms'}
    assert 'max_iters=300' in found['steps'].fix
    assert 'warmup=1,' in found['warmup'].fix
    assert '30 steps of 3' in found['warmup'].text
    assert not any(finding.error for finding in found.values())


@pytest.mark.slow
def test_written_warmup_is_right(tmp_path):
    """The lines of the fix end the finding, in a loop of epochs."""
    text = ("param_scheduler = [dict(type='mmdet_efficientdet.WarmupCosineLR',"
            ' warmup=31, convert_to_iter_based=True)]')
    finding, = find_faults(write_broken(tmp_path, lines(text)), images=False)
    fixed = finding.fix.partition('trainings too: ')[2]
    assert found_with(tmp_path / 'fixed', fixed) == []


@pytest.mark.parametrize('schedule, warns', [
    (dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=149), False),
    (dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=151), True),
    (dict(type='LinearLR', start_factor=0.1, end=31), True),
    (dict(type='MultiStepLR', milestones=[1], end=300), False),
])
def test_schedules_of_the_host(schedule, warns, tmp_path):
    text = f'param_scheduler = [{schedule}]'
    assert found_with(tmp_path, text) == ['warmup'] * warns


@pytest.mark.parametrize('ema, steps, share', [
    (dict(momentum=2e-4), 1000, 0.9),
    (dict(momentum=0.02), 1000, 0.0),
    (dict(ema_type='MomentumAnnealingEMA', momentum=2e-4, gamma=9), 20, 0.0),
    (dict(ema_type='mmdet_efficientdet.ForeachEMA', momentum=2e-4,
          gamma=9), 20, 0.0),
    (dict(ema_type='StochasticWeightAverage'), 100, 0.5),
])
def test_share_of_the_first_half(ema, steps, share):
    """Of an average of momentum m, (1 - m)^(steps / 2) is that old."""
    found = stale_share(dict(type='EMAHook', priority=49, **ema), steps)
    assert found == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize('threads, cores, names', [(2, 2, ['threads']),
                                                   (1, 2, []), (2, 3, [])])
def test_threads(threads, cores, names, tmp_path, monkeypatch):
    """Beside one worker."""
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    monkeypatch.setattr('os.sched_getaffinity', lambda _: range(cores))
    assert found_with(tmp_path, "train_dataloader['num_workers'] = 1") == names


RECIPES = {
    'd0_8xb16-300e_coco': 8,
    'd0_1xb8-adamw-1k_coco': 1,
    'd0_1xb8-finetune-50e_coco': 1,
    'd0_1xb8-gn-300e_coco': 1,
    'lite0_8xb16-300e_coco': 8,
    'lite0_1xb8_trees': 1
}


@pytest.mark.slow
@pytest.mark.parametrize('name', RECIPES)
def test_no_false_alarm(name, tmp_path, monkeypatch):
    """Shipped recipes, with good data and a machine that they are for."""
    monkeypatch.setattr('os.sched_getaffinity', lambda _: range(64))
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 1)
    trees = name.endswith('trees')

    def fault(train, val, root):
        for part in (train, val) if trees else ():
            part['categories'] = [dict(id=5, name='Tree')]
            for box in part['annotations']:
                box['category_id'] = 5

    write_broken(tmp_path, fault)
    size, root = name.split('_')[0], f'{tmp_path}/data/'
    classes = ['Tree'] if trees else CLASSES
    image_size = 256 if trees else None
    config = tmp_path / 'shipped.py'
    config.write_text(f"""_base_ = {str(CONFIGS / f'efficientdet_{name}.py')!r}
from mmdet_efficientdet.scaling import scale_config
scale_config(_base_, {size!r}, {image_size}, {classes})
train_dataloader = dict(dataset=dict(_delete_=True, type='RepeatDataset',
    times=30, dataset=dict(_base_.train_dataloader.dataset, data_root={root!r},
    ann_file='train.json', data_prefix=dict(img='train/'))))
val_dataloader = dict(dataset=dict(data_root={root!r}, ann_file='val.json',
    data_prefix=dict(img='val/')))
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(ann_file={root!r} + 'val.json')
""")
    found = find_faults(config, False, RECIPES[name])
    assert not found, text_of(found)
