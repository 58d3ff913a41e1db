"""Learning rate, batch and norms are checked for the real batch."""
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from helpers.broken_data import (build_model, find_faults, lines, names_of,
                                 write_broken)
from mmengine.config import Config

from mmdet_efficientdet.engine.recipe_checks import (check_last_batch,
                                                     check_recipe)


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
    found = check_last_batch(config, build_model(config), gpus,
                             config.train_dataloader.dataset)
    assert names_of(found) == [('ERROR', 'last_batch')] * alone


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
    assert bool(
        check_last_batch(config, build_model(config), 1,
                         config.train_dataloader.dataset)) == alone


@pytest.mark.parametrize('side, fails', [(128, True), (192, False)])
def test_one_pixel_of_one_image(side, fails, tmp_path):
    """The neck raises just where the pre-flight says so."""
    config = Config.fromfile(write_broken(tmp_path, lines('')))
    config.train_dataloader.batch_size = 1
    config.train_dataloader.dataset.pipeline[-2].image_size = side
    config.model.data_preprocessor.pad_size_divisor = side
    model = build_model(config)
    assert bool(check_last_batch(config, model, 1, None)) == fails
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
