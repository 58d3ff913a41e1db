"""The comparison of our recipe with effdet's trainer."""
import json
import shutil
import sys
from argparse import Namespace
from collections import Counter

import numpy as np
import pytest
import torch
from helpers.tiny_data import CONFIGS, make_dataset
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

sys.path.append(str(CONFIGS.parents[1] / 'tools' / 'studies'))
import compare_training as study  # noqa: E402
import training_data  # noqa: E402
import training_report  # noqa: E402
import training_runs  # noqa: E402

SIDE = 128
OURS = training_runs.our_settings()


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = make_dataset(tmp_path_factory.mktemp('training') / 'data')
    shutil.move(root / 'JPEGImages', root / 'images')
    return root / 'coco.json'


@pytest.fixture(scope='module')
def batch(data):
    """Of one step, with the settings of ours, and the network."""
    torch.manual_seed(0)
    pictures, classes = training_data.read_data(data)
    assert classes == [5, 15, 25] and len(pictures) == 6
    model = training_runs.build(3, SIDE, 0, OURS)
    batch, = training_data.make_batches(model, pictures, OURS, 0, 1, SIDE)
    return batch, model


def test_one_thing_at_a_time():
    """The names are those of the settings, and every value is another."""
    for name, changes in study.VARIANTS.items():
        assert changes.keys() <= OURS.keys()
        assert not changes.items() & OURS.items()
        assert len(changes) == {
            'ours': 0,
            'effdet': 8,
            'effdet_hold': 7,
            'effdet_ramp': 7,
            'drop_path': 2  # without statistics of the batch it does nothing
        }.get(name, 1)


@pytest.mark.parametrize('start', ['identity', 'official'])
def test_start(start):
    """Neck and head start as the recipe, or as its variant, says."""
    cfg = Config.fromfile(training_runs.RECIPE).model
    assert cfg.neck.identity_init == cfg.bbox_head.identity_init
    model = training_runs.build(3, SIDE, 0, {**OURS, 'start': start})
    for conv in (model.neck.layers[1].nodes[2].conv,
                 model.bbox_head.cls_convs[1]):
        kernel = conv.pointwise.weight[..., 0, 0]
        identity = torch.equal(kernel, torch.eye(len(kernel)))
        assert identity == (start == 'identity')


def test_folder_of_other_runs_is_refused(tmp_path):
    """Results of other conditions are not taken for these."""
    settings = dict(steps=5, ours=OURS)
    study.check_settings(tmp_path, settings)
    study.check_settings(tmp_path, settings)
    changed = dict(settings, ours={**OURS, 'start': 'official'})
    with pytest.raises(SystemExit, match="'official'.*another --out"):
        study.check_settings(tmp_path, changed)
    with pytest.raises(SystemExit, match='steps 5 there and 6 now'):
        study.check_settings(tmp_path, dict(settings, steps=6))


def test_both_trainers_compute_the_same_loss(batch):
    """Without effdet's deviations only rounding is left."""
    data, model = batch
    network, ours = training_runs.our_losses(model)
    bench, theirs = training_runs.effdet_losses(model, 3, SIDE, 0.0)
    for part in (network, bench):
        part.eval()
    assert ours(*data).item() == pytest.approx(theirs(*data).item(), rel=1e-4)
    assert {
        sum(p.numel() for p in part.parameters() if p.requires_grad)
        for part in (network, bench)
    } == {sum(p.numel() for p in model.parameters() if p.requires_grad)}


def test_optimizer_is_that_of_the_recipe(batch):
    """Rates, decay and elements are what mmengine makes of the config."""
    _, model = batch
    wrapper = build_optim_wrapper(
        model,
        Config.fromfile(training_runs.RECIPE).optim_wrapper)
    optimizer = training_runs.make_optimizer(
        training_runs.our_losses(model)[0], OURS)
    for group in optimizer.param_groups:
        group['lr'] = OURS['rate'] * group['part']

    def groups_of(optimizer):
        found = Counter()
        for group in optimizer.param_groups:
            key = round(group['lr'], 9), group['weight_decay'], group['betas']
            found[key] += sum(p.numel() for p in group['params']
                              if p.requires_grad)
        return +found

    assert groups_of(optimizer) == groups_of(wrapper.optimizer)
    assert len(groups_of(optimizer)) == 4


def test_features_are_those_of_the_backbone(batch):
    """The frozen part and the rest are the whole."""
    _, model = batch
    model.eval()
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        x = model.backbone(images)
        *feats, = training_data.frozen_features(model, images)
    for got, expected in zip(feats, x):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize('transform', ['our_transform', 'effdet_transform'])
def test_boxes_follow_their_pixels(transform, data):
    """A red box is red also where it was flipped, resized and cropped."""
    pictures, _ = training_data.read_data(data)
    picture, boxes, labels = pictures[0]
    np.random.seed(0)
    apply = getattr(training_data, transform)(SIDE, (0.8, 1.5))
    for _ in range(8):
        image, found, classes = apply(picture, boxes, labels)
        for (x0, y0, x1, y1), label in zip(found.round().int().tolist(),
                                           classes.tolist()):
            if min(x1 - x0, y1 - y0) > 8:
                inside = image[y0 + 3:y1 - 3, x0 + 3:x1 - 3]
                assert inside.mean((0, 1)).argmax() == 2 - label


@pytest.mark.slow
@pytest.mark.parametrize('name', ['ours', 'effdet'])
def test_run(name, data, batch):
    """The loss falls within a few steps, with every setting in use."""
    args = Namespace(data=(data, data), side=SIDE, steps=12)
    row = training_runs.run(args, training_data.read_data(data), {
        **OURS,
        **study.VARIANTS[name]
    }, 1e-2, 0, {})
    assert row['loss'] < 1.8 and 0 <= row['AP'] <= row['AP50'] <= 1


def test_table(tmp_path):
    """Differences are paired by seed, with the baseline at its best rate."""
    rows = [
        dict(
            variant=name,
            rate=rate,
            seed=seed,
            loss=1.0,
            seconds=1.0,
            AP=ap,
            AP50=ap + seed / 10,
            AP75=0.1,
            AP_small=0.1)
        for name, rate, ap in (('ours', 1e-3, 0.1), ('ours', 1e-2, 0.4),
                               ('effdet', 1e-2, 0.3)) for seed in range(3)
    ]
    rows[-1]['AP'] += 0.03
    rows.append(dict(rows[0], rate=1e-1, AP50=0.9))  # a single run
    (tmp_path / 'runs').mkdir()
    for i, row in enumerate(rows):
        (tmp_path / 'runs' / f'{i}.json').write_text(json.dumps(row))
    args = Namespace(steps=5, side=64, data=(tmp_path, tmp_path))
    training_report.write_results(tmp_path, list(study.VARIANTS), args)
    lines = (tmp_path / 'table.md').read_text().splitlines()
    assert 'ours at 0.01' in lines[0]
    line, = (line for line in lines if line.startswith('| effdet'))
    # The deviation of -0.1, -0.1 and -0.07 is 0.03 / sqrt(3), and the
    # quantile of t for two degrees of freedom 4.303: 4.303 * 0.03 / 3.
    assert '-0.090 +- 0.043' in line and '-0.100' in line
    assert len((tmp_path / 'results.csv').read_text().splitlines()) == 11
    assert (tmp_path / 'results.png').read_bytes()[:4] == b'\x89PNG'
