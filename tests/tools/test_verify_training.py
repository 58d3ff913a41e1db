"""The tool that trains beside effdet finds us equal, and finds what is not."""
import sys

import numpy as np
import pytest
import torch
import verify_training
from helpers.tiny_data import CLASSES, make_dataset, write_config
from verify_training import (BOUND, COLUMNS, DROP_PATH, LOSSES, MOMENTUM,
                             NOTHING, NUM_CLASSES, SINGLE, WAYS, build_ours,
                             learning_rates, relative, report, train_ours,
                             verify)

from mmdet_efficientdet.models import efficientdet_head

# Nearly all need the five trainings of `found`.
pytestmark = pytest.mark.slow
STEPS = 3
PEAK = 0.02


@pytest.fixture(scope='module')
def batches():
    """Three batches of two small images."""
    return verify_training.drawn_batches(64, 2, STEPS)


@pytest.fixture(scope='module')
def found(batches):
    """What the tool finds for D0, in every way."""
    verify_training.register_all_modules()
    return verify('d0', batches, NUM_CLASSES, PEAK, WAYS[:-1])


def test_batches(batches):
    """The number of objects grows, from none; all are inside."""
    truth = [x.gt_instances for y in batches for x in y['data_samples']]
    assert [len(x.bboxes) for x in truth] == [0, 1, 1, 2, 2, 3]
    boxes = torch.cat([x.bboxes for x in truth])
    assert boxes.min() >= 0 and boxes.max() <= 64
    assert (boxes[:, 2:] - boxes[:, :2]).min() >= 8
    # The schedule: warm-up from a twentieth, then half a cosine.
    assert learning_rates(20,
                          1.0)[:3] == pytest.approx([0.05, 0.525, 0.9755283])
    assert learning_rates(20, 1.0)[10] == pytest.approx(0.5)


def test_equal(found):
    """Both losses of each step, and then all weights and statistics."""
    ours, theirs, differences = found[NOTHING]
    assert ours.shape == theirs.shape == (STEPS, 2)
    assert len(differences) == len(COLUMNS)
    assert max(differences) < 1e-11
    # It did learn, and from other batches each time.
    assert np.ptp(ours, 0).min() > 1e-3


def test_each_way_shows(found):
    """Rounding is small, momentum shows in statistics only."""
    differences = {way: x[-1] for way, x in found.items()}
    assert tuple(differences) == WAYS[:-1]
    assert 1e-8 < max(differences[SINGLE][:2]) < 1e-3
    assert 1e-9 < max(differences[LOSSES][:2]) < 1e-5
    assert max(differences[MOMENTUM][:3]) < 1e-11
    assert differences[MOMENTUM][3] > 0.1
    assert min(differences[DROP_PATH][:2]) > 1e-3


@pytest.mark.parametrize('key, value, first', [
    ('model.bbox_head.loss_cls.gamma', 2.0, 0),
    ('model.bbox_head.loss_bbox.beta', 0.2, 0),
    ('model.bbox_head.anchor_generator.octave_base_scale', 3.0, 0),
    ('optim_wrapper.clip_grad.max_norm', 9.0, 1),
    ('optim_wrapper.optimizer.weight_decay', 0.0, 1),
    ('optim_wrapper.optimizer.momentum', 0.8, 2),
    (None, None, 0),
])
def test_every_constant_counts(monkeypatch, batches, found, key, value, first):
    """A wrong one is found, and in the first step where it matters."""
    if key is None:  # the positives are divided by without adding 1
        targets = efficientdet_head.anchor_targets
        monkeypatch.setattr(
            efficientdet_head, 'anchor_targets', lambda *args:
            (*targets(*args)[:2], targets(*args)[2] - 1))
    model, cfg = build_ours(
        'd0', NUM_CLASSES, options={key: value} if key else None)
    losses = train_ours(model.double(), [
        dict(batch, inputs=batch['inputs'].double())
        for batch in batches[:first + 1]
    ], learning_rates(STEPS, PEAK), cfg.optim_wrapper)
    wrong = relative(losses, found[NOTHING][1][:first + 1]).max(1) > BOUND
    assert wrong.tolist() == [False] * first + [True]


def run(monkeypatch, found, *args):
    """The tool's command, with what it would have found."""
    monkeypatch.setattr(verify_training, 'verify', lambda *_: found)
    # Other tests read what is logged.
    monkeypatch.setattr(verify_training.MMLogger, 'get_instance',
                        lambda *_, **__: None)
    monkeypatch.setattr(sys, 'argv',
                        ['verify_training.py', '--steps', '2', *args])
    verify_training.main()


def test_table_and_picture(monkeypatch, capsys, tmp_path, found):
    """A row for each step and way, and a picture."""
    picture = tmp_path / 'curves.png'
    run(monkeypatch, found, '--out', str(picture))
    rows = capsys.readouterr().out.splitlines()
    for title in (*range(STEPS), *WAYS[:-1]):
        assert sum(row.startswith(f'| {title} ') for row in rows) == 1
    assert picture.read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('column', range(len(COLUMNS)))
@pytest.mark.parametrize('value', [2 * BOUND, float('nan')])
def test_difference_fails(monkeypatch, found, column, value):
    """In the losses as in the weights and statistics, if not a number, too."""
    differences = list(found[NOTHING][2])
    differences[column] = value
    found = {NOTHING: (*found[NOTHING][:2], differences)}
    assert not report(found)[1]
    with pytest.raises(SystemExit, match='are not equal'):
        run(monkeypatch, found)


def test_data_of_a_config(tmp_path):
    """Pictures and boxes of a user's config, as its training sees them."""
    config = write_config(tmp_path / 'own.py', make_dataset(tmp_path / 'data'))
    batches, num_classes = verify_training.batches_of(config, 3, 2)
    assert num_classes == len(CLASSES) and len(batches) == 2
    for batch in batches:
        assert batch['inputs'].shape == (3, 3, 64, 64)
        assert abs(batch['inputs'].mean()) < 3  # normalised
        assert len(batch['data_samples']) == 3
