"""How well anchors fit boxes, and which would fit better."""
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from check_dataset import recall_table, snippet
from check_parts.anchor_advice import advise, recall_and_iou
from mmdet.registry import TRANSFORMS
from mmengine.config import Config
from torchvision.ops import box_iou

from mmdet_efficientdet import AnchorGenerator
from mmdet_efficientdet.datasets.anchor_fit import (InputBoxes, best_iou,
                                                    check_anchors, to_input)


def brute_force(generator, boxes, size, levels=5):
    """The best IoU of each box, by a loop over all anchors."""
    cells = [[-(-n // 2**(3 + i)) for n in size] for i in range(levels)]
    anchors = torch.cat(generator.grid_priors(cells, size)).double().numpy()
    best = []
    for x1, y1, x2, y2 in boxes:
        top = 0.0
        for a1, b1, a2, b2 in anchors:
            inter = max(0,
                        min(x2, a2) - max(x1, a1)) * max(
                            0,
                            min(y2, b2) - max(y1, b1))
            union = (x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - inter
            top = max(top, inter / union)
        best.append(top)
    return best


def random_boxes(low, high, size=512, number=300):
    generator = np.random.default_rng(0)
    sides = np.exp(generator.uniform(np.log(low), np.log(high), (number, 2)))
    corner = generator.uniform(0, 1, (number, 2)) * (size - sides)
    inputs = np.full((number, 2), size)
    return InputBoxes(
        np.concatenate([corner, corner + sides], 1), inputs, np.zeros(number))


@pytest.mark.parametrize('size', [[128, 128], [70, 150]])
def test_best_iou_is_exact(size):
    """Looking at one cell of each level loses nothing, at borders neither."""
    generator = AnchorGenerator(3.0)
    boxes = random_boxes(4, 60, 64, 12).boxes
    boxes = np.concatenate([boxes, [[0, 0, 5, 5], [-9, 60, 40, 70]]])
    data = InputBoxes(boxes, np.tile(size, (len(boxes), 1)), np.zeros(1))
    np.testing.assert_allclose(
        best_iou(generator, data, 5),
        brute_force(generator, boxes, size),
        atol=1e-6)


def test_small_boxes_get_smaller_anchors():
    """Sides of 8 to 12 pixels: anchors of 32 miss them, the proposal not."""
    data, now = random_boxes(8, 12), AnchorGenerator()
    assert recall_and_iou(best_iou(now, data, 5))[0] == 0
    proposal = advise(now, data, 5)
    after, _ = recall_and_iou(best_iou(proposal, data, 5))
    # Cells of 8 pixels are too wide apart for more.
    assert after > 0.5
    assert proposal.octave_base_scale < 2
    assert proposal.num_base_priors == now.num_base_priors
    lines = recall_table(data, best_iou(now, data, 5),
                         best_iou(proposal, data, 5))
    assert [line.split()[-4::2]
            for line in lines[1:]] == [['0.000', f'{after:.3f}']] * 2
    cfg = Config.fromstring(snippet(proposal), '.py')
    anchors = cfg.model.bbox_head.anchor_generator
    again = AnchorGenerator(**anchors)
    assert best_iou(again, data, 5).tolist() == best_iou(proposal, data,
                                                         5).tolist()


def test_long_boxes_get_other_aspects():
    """Boxes of 1 to 6 need another shape, not another scale alone."""
    data, now = random_boxes(40, 200), AnchorGenerator()
    corner = data.boxes[:, :2] * 0.5
    long = np.concatenate([corner, corner + [30, 180]], 1)
    data = data._replace(boxes=long)
    proposal = advise(now, data, 5)
    assert recall_and_iou(best_iou(now, data, 5))[0] < 0.1
    assert recall_and_iou(best_iou(proposal, data, 5))[0] > 0.9
    assert any(h > 3 * w for w, h in proposal.aspect_pairs)
    assert proposal.num_base_priors == now.num_base_priors


def test_fitting_anchors_are_kept():
    """Shapes of the default anchors need no other."""
    now = AnchorGenerator()
    cells = [[512 // 2**(3 + i)] * 2 for i in range(5)]
    anchors = torch.cat(now.grid_priors(cells, [512, 512])).double().numpy()
    boxes = anchors[np.random.default_rng(0).choice(len(anchors), 300)]
    data = InputBoxes(boxes, np.full((300, 2), 512), np.zeros(300))
    assert advise(now, data, 5) is None


def test_boxes_are_scaled_as_in_testing():
    """ResizeCrop fits, Resize multiplies; inputs are padded."""
    boxes = np.array([[10., 20., 30., 40.]])
    size = np.array([[96., 128.]])  # height, width

    def scale(divisor, **transform):
        return to_input(boxes, size, [0], [TRANSFORMS.build(transform)],
                        divisor)

    fit = scale(64, type='mmdet_efficientdet.ResizeCrop', image_size=64,
                ratio_range=(1., 1.))  # yapf: disable
    assert fit.boxes.tolist() == [[5, 10, 15, 20]]
    assert fit.inputs.tolist() == [[64, 64]]
    more = scale(128, type='Resize', scale_factor=1.5, keep_ratio=True)
    assert more.boxes.tolist() == [[15, 30, 45, 60]]
    assert more.inputs.tolist() == [[256, 256]]
    whole = scale((192, 128), type='Resize', scale=(64, 64), keep_ratio=True)
    assert whole.inputs.tolist() == [[192, 128]]
    wide = scale(1, type='Resize', scale=(256, 96), keep_ratio=False)
    assert wide.boxes.tolist() == [[20, 20, 60, 40]]
    assert wide.inputs.tolist() == [[96, 256]]


@pytest.mark.parametrize('fitting, missed', [(4, None), (2, 8)])
def test_recall_that_is_too_low(fitting, missed):
    """Below 0.3 the anchors are named; real data has less than 1, too."""
    data, now = random_boxes(8, 12, number=10), AnchorGenerator()
    corner = np.full((fitting, 2), 256 - 16)
    data.boxes[:fitting] = np.concatenate([corner, corner + 32], 1)
    head = SimpleNamespace(prior_generator=now, num_levels=5)
    found = check_anchors(head, data, ['berry'])
    assert [f'{missed} of 10 boxes' in finding.text
            for finding in found] == [True] * bool(missed)


def test_input_that_fits_small_boxes():
    """The class is named, with the recall now and at the least input."""
    data, now = random_boxes(8, 12, number=40), AnchorGenerator()
    whole = np.array([0., 0, 512, 512])
    data = InputBoxes(
        np.concatenate([data.boxes, np.tile(whole, (60, 1))]),
        np.full((100, 2), 512), np.repeat([1, 0], [40, 60]))
    head = SimpleNamespace(prior_generator=now, num_levels=5)
    finding, = check_anchors(head, data, ['bush', 'berry'])
    example, = finding.examples
    assert "'berry': recall 0.00 at 512 pixels" in example
    assert '40 of 100 boxes' in finding.text
    size = int(re.search(r'image_size=(\d+)', example)[1])
    recall = float(re.search(r'([\d.]+) at image_size', example)[1])
    assert size % 128 == 0
    recalls = []
    for side in (size - 128, size):
        cells = [[side // 2**(3 + i)] * 2 for i in range(5)]
        anchors = torch.cat(now.grid_priors(cells, [side, side])).double()
        berries = torch.from_numpy(data.boxes[:40] * side / 512)
        best = box_iou(berries, anchors).amax(1)
        recalls.append((best >= 0.5).double().mean().item())
    assert recalls[0] < 0.7 <= recalls[1] == pytest.approx(recall, abs=0.005)
