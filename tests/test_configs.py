"""Every shipped config, and what users write on top of them."""
import math
import re
from collections import Counter

import pytest
import torch
from helpers.models import SIZES, batch, sizes_in
from helpers.tiny_data import CONFIGS, D0
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from oracles.official_sizes import TABLE

from mmdet_efficientdet.scaling import scale_config

ALL = sorted(CONFIGS.parent.rglob('*.py'))


def small_detector(name, image_size=(64, 128)):
    """A detector of full width and depth, on small images."""
    init_default_scope('mmdet')
    config = Config.fromfile(SIZES[name])
    scale_config(config._cfg_dict, name, image_size=image_size)
    config.model.backbone.init_cfg = None
    return MODELS.build(config.model).eval()


def check_loss_and_results(model, data, num_classes=80):
    """Losses are finite and positive, results are boxes of the classes."""
    data = model.data_preprocessor(data, training=True)
    with torch.no_grad():
        losses = model(**data, mode='loss')
        results = model(**data, mode='predict')
    assert set(losses) == {'loss_cls', 'loss_bbox'}
    for loss in losses.values():
        assert loss.shape == () and loss.isfinite() and loss > 0
    assert len(results) == len(data['inputs'])
    for result in results:
        found = result.pred_instances
        num = len(found)
        assert 0 < num <= 100
        assert found.bboxes.shape == (num, 4)
        assert found.bboxes.isfinite().all()
        # Equal for a box beyond the image, which is clipped to its border.
        assert (found.bboxes[:, 2:] >= found.bboxes[:, :2]).all()
        assert found.scores.shape == found.labels.shape == (num, )
        assert (found.scores[:-1] >= found.scores[1:]).all()
        assert 0 < found.scores[-1] and found.scores[0] <= 1
        assert found.labels.dtype == torch.int64
        assert 0 <= found.labels.min() and found.labels.max() < num_classes
    return data['inputs'], losses, results


def test_one_config_for_each_size():
    """Names follow the host's pattern, and 600 epochs are for D7 and D7x."""
    of_coco = set(CONFIGS.glob('*00e_coco.py'))
    recipes = {
        path
        for path in of_coco if re.search('-(gn|advprop)-', path.stem)
    }
    assert set(SIZES.values()) == of_coco - recipes
    for path in ALL:
        if path.parent == CONFIGS:
            assert re.fullmatch(
                r'efficientdet_[a-z0-9]+_\d+xb\d+(-[a-z]+)?(-\d+[ek])?_[a-z]+',
                path.stem)


def test_basenames_are_unique():
    """mim finds a config by its basename alone."""
    counts = Counter(path.name for path in ALL)
    assert max(counts.values()) == 1


@pytest.mark.parametrize('path', ALL, ids=lambda path: path.stem)
def test_dump_is_the_same_config(path, tmp_path):
    """What a run stores beside its checkpoints is what was run."""
    config = Config.fromfile(path)
    config.dump(tmp_path / 'dumped.py')
    again = Config.fromfile(tmp_path / 'dumped.py')
    assert again.to_dict() == config.to_dict()
    assert '_base_' not in again
    assert len(again) > 3


@pytest.mark.parametrize('name', [n for n in TABLE if n != 'd0'])
def test_size_is_a_few_lines(name):
    """D0 is spelled out; the others only name their size."""
    lines = SIZES[name].read_text().splitlines()
    assert len(lines) <= 8
    assert lines[0] == f'_base_ = {"./" + D0.name!r}'
    assert f"scale_config(_base_, '{name}')" in lines


@pytest.mark.parametrize('name', TABLE)
def test_numbers_of_the_size(name):
    """A config holds its size's own numbers, and none of D0's."""
    (arch, channels, side, width, layers, depth, anchor_scale, level, fusion,
     act, epochs, checkpoint, (mean, std)) = TABLE[name]
    config = Config.fromfile(SIZES[name])
    model = config.model
    assert config.image_size == side
    assert model.data_preprocessor.pad_size_divisor == side
    assert (model.data_preprocessor.mean,
            model.data_preprocessor.std) == (list(mean), list(std))
    # The pipelines by themselves and inside the three loaders.
    assert sizes_in(config.to_dict()) == [side] * 5
    assert (model.backbone.arch,
            model.backbone.init_cfg.checkpoint) == (arch, checkpoint)
    assert model.neck.in_channels == list(channels)
    assert model.neck.out_channels == model.bbox_head.in_channels == width
    assert model.neck.num_outs == model.bbox_head.num_levels == level - 2
    assert model.neck.stack_times == layers
    assert model.neck.fusion == fusion
    assert model.bbox_head.stacked_convs == depth
    assert model.bbox_head.anchor_generator.octave_base_scale == anchor_scale
    assert config.train_cfg.max_epochs == epochs

    text = config.pretty_text
    if side != 512 and 512 not in channels:
        assert not re.search(r'\b512\b', text)
    if arch != 'b0':
        assert not re.search(r'\bb0\b', text)
    if act != 'SiLU':
        assert 'SiLU' not in text
    if fusion == 'sum':
        assert 'fast_normalized' not in text
    if epochs == 600:
        assert not re.search(r'\b(300|299)\b', text)
    if mean[0] == 127:
        assert '123.675' not in text and '58.395' not in text


def test_official_recipe():
    """The numbers of the official training that D0's config spells out."""
    config = Config.fromfile(D0)
    # 0.08 for 64 images, and 8 GPUs with 16 images each
    assert config.optim_wrapper.optimizer.to_dict() == dict(
        type='SGD', lr=0.16, momentum=0.9, weight_decay=4e-5)
    assert config.optim_wrapper.clip_grad.max_norm == 10
    assert config.auto_scale_lr.base_batch_size == 128
    assert config.train_dataloader.batch_size == 16
    assert config.sync_bn == 'torch'  # statistics of all 128 images
    assert config.train_dataloader.dataset.filter_cfg.filter_empty_gt is False
    # from 0.008 in the first epoch
    assert config.param_scheduler[0].start_factor == 0.05
    # decay min(0.9998, (1 + n) / (10 + n)), running statistics included
    assert config.default_hooks.ema.to_dict() == dict(
        type='EMAHook',
        ema_type='mmdet_efficientdet.ForeachEMA',
        momentum=2e-4,
        gamma=9,
        update_buffers=True,
        strict_load=True,
        priority=49)
    assert config.train_pipeline[4].ratio_range == (0.1, 2.0)
    assert config.train_pipeline[3].prob == 0.5
    assert config.test_pipeline[1].ratio_range == (1.0, 1.0)
    head = config.model.bbox_head
    assert (head.loss_cls.alpha, head.loss_cls.gamma) == (0.25, 1.5)
    # 50 * Huber(delta=0.1) / 4
    assert (head.loss_bbox.beta, head.loss_bbox.loss_weight) == (0.1, 1.25)
    assert head.anchor_generator.scales_per_octave == 3
    assert head.anchor_generator.aspect_pairs == [(1.0, 1.0), (1.4, 0.7),
                                                  (0.7, 1.4)]
    assert config.model.test_cfg.to_dict() == dict(
        nms_pre=5000,
        nms=dict(type='soft_nms', sigma=0.5, min_score=0.001),
        max_per_img=100)
    for part in ('backbone', 'neck', 'bbox_head'):
        assert config.model[part].norm_cfg.to_dict() == dict(
            type='BN', momentum=0.01, eps=1e-3)


@pytest.mark.parametrize('name', TABLE)
def test_every_size_runs(name):
    """Loss and prediction work at full width and depth."""
    model = small_detector(name)
    inputs, _, _ = check_loss_and_results(model, batch((64, 96)))
    assert inputs.shape == (1, 3, 64, 128)


def test_config_of_a_user(tmp_path):
    """A few lines give a consistent model with nothing of the old size."""
    (tmp_path / 'mine.py').write_text(f'''_base_ = {str(D0)!r}

from mmdet_efficientdet.scaling import scale_config

scale_config(_base_, 'd3', image_size=256, classes=['cat', 'dog'])
train_dataloader = dict(batch_size=4)
''')
    config = Config.fromfile(tmp_path / 'mine.py')
    text = config.pretty_text
    assert not re.search(r'\b(512|896|b0|80)\b', text)
    assert sizes_in(config.to_dict()) == [256] * 5
    assert config.train_dataloader.batch_size == 4
    for loader in ('train', 'val', 'test'):
        dataset = config[f'{loader}_dataloader'].dataset
        assert dataset.metainfo.classes == ('cat', 'dog')
    config.model.backbone.init_cfg = None
    model = MODELS.build(config.model).eval()
    inputs, _, _ = check_loss_and_results(
        model, batch((160, 256), num_classes=2), num_classes=2)
    assert inputs.shape == (1, 3, 256, 256)
    # A user's own lines win over the function, as over any base.
    with open(tmp_path / 'mine.py', 'a') as file:
        file.write("model = dict(neck=dict(fusion='softmax'))\n")
    config = Config.fromfile(tmp_path / 'mine.py')
    assert config.model.neck.fusion == 'softmax'
    assert config.model.neck.out_channels == 160


@pytest.fixture(scope='module')
def lite0():
    """A Lite0 whose norms fit its features, so that images matter."""
    torch.manual_seed(0)
    model = small_detector('lite0', image_size=128).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(4, 3, 128, 128))
    return model.eval()


def test_batch_of_mixed_sizes(lite0):
    """Images of any size are padded at the right and the bottom."""
    data = batch((100, 128), (128, 80), (64, 64))
    inputs, _, _ = check_loss_and_results(lite0, data)
    assert inputs.shape == (3, 3, 128, 128)
    assert (inputs[0, :, 100:] == 0).all()
    assert (inputs[1, :, :, 80:] == 0).all()
    assert (inputs[2, :, 64:] == 0).all() and (inputs[2, :, :, 64:] == 0).all()
    # The normalisation of Lite, and RGB.
    expected = (data['inputs'][0].flip(0).float() - 127) / 128
    torch.testing.assert_close(inputs[0, :, :100], expected)


def test_images_of_a_batch_do_not_mix(lite0):
    """The network says the same of an image, alone or with others."""
    images = batch((128, 128), (128, 128))
    images['inputs'][1].zero_()
    together = lite0.data_preprocessor(images)
    with torch.no_grad():
        both = lite0(**together, mode='tensor')
        first = lite0(together['inputs'][:1], mode='tensor')
    for maps, single in zip(both, first):
        for x, y in zip(maps, single):
            torch.testing.assert_close(x[:1], y, rtol=1e-4, atol=1e-5)


def test_boxes_are_of_the_original_image(lite0):
    """Boxes are divided by the scale factor."""
    data = lite0.data_preprocessor(batch((128, 128)))
    with torch.no_grad():
        scaled, plain = (
            lite0.predict(
                data['inputs'], data['data_samples'],
                rescale=rescale)[0].pred_instances.bboxes.clone()
            for rescale in (True, False))
    torch.testing.assert_close(scaled, plain * 2)


def test_image_without_boxes(lite0):
    """Nothing to find costs classification, and no box."""
    data = batch((128, 128))
    sample = data['data_samples'][0]
    sample.gt_instances = InstanceData(
        bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    data = lite0.data_preprocessor(data, training=True)
    with torch.no_grad():
        losses = lite0(**data, mode='loss')
    assert losses['loss_bbox'] == 0
    # Divided by 1, not by 0 plus a tiny number.
    assert 0 < losses['loss_cls'] < 1e6


@pytest.mark.parametrize('shape', [(63, 128), (128, 32), (1, 1)])
def test_too_small_input(lite0, shape):
    """The message names the input, the limit and the way out."""
    image = torch.zeros(1, 3, *shape)
    for mode in ('tensor', 'predict', 'loss'):
        with pytest.raises(ValueError) as error:
            lite0(image, [DetDataSample()], mode=mode)
        message = str(error.value)
        assert '{}x{} pixels'.format(*shape) in message
        assert 'at least 64' in message
        assert 'pad_size_divisor' in message


# By hand: each level is half the one below, rounded up.
LEVELS = [
    ('d0', (64, 64), [(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)]),
    ('d0', (97, 131), [(13, 17), (7, 9), (4, 5), (2, 3), (1, 2)]),
    ('d0', (64, 256), [(8, 32), (4, 16), (2, 8), (1, 4), (1, 2)]),
    ('d0', (512, 512), [(64, 64), (32, 32), (16, 16), (8, 8), (4, 4)]),
    ('d0', (640, 384), [(80, 48), (40, 24), (20, 12), (10, 6), (5, 3)]),
    ('d7x', (384, 256), [(48, 32), (24, 16), (12, 8), (6, 4), (3, 2), (2, 1)]),
    ('lite0', (320, 320), [(40, 40), (20, 20), (10, 10), (5, 5), (3, 3)]),
]


@pytest.mark.parametrize('name, shape, levels', LEVELS)
def test_level_sizes(name, shape, levels, build_detector):
    """Any input size gives the levels that TensorFlow's SAME gives."""
    model = build_detector(name, 80, 'meta').eval()
    image = torch.empty(2, 3, *shape, device='meta')
    with torch.no_grad():
        feats = model.extract_feat(image)
        cls_scores, bbox_preds = model(image)
    width = TABLE[name][3]
    assert [x.shape for x in feats] == [(2, width, *s) for s in levels]
    assert [x.shape for x in cls_scores] == [(2, 9 * 80, *s) for s in levels]
    assert [x.shape for x in bbox_preds] == [(2, 9 * 4, *s) for s in levels]


def test_number_of_anchors(lite0):
    """Nine anchors on every cell of every level."""
    anchors = lite0.bbox_head.prior_generator.grid_priors(
        LEVELS[-1][2], (320, 320))
    # 9 * (40^2 + 20^2 + 10^2 + 5^2 + 3^2)
    assert sum(map(len, anchors)) == 19206
    width, height = (anchors[0][:9, 2:] - anchors[0][:9, :2]).unbind(1)
    sides = (width * height).sqrt()
    # stride 8, anchor scale 3, three octaves; the pairs 1.4 x 0.7 lose 1 %
    assert math.isclose(sides.min(), 24 * math.sqrt(0.98), rel_tol=1e-5)
    assert math.isclose(sides.max(), 24 * 2**(2 / 3), rel_tol=1e-5)
