"""Matching in windows gives the matches of the full matrix, bit for bit."""
import numpy as np
import pytest
import torch
from oracles import official_numpy as official

from mmdet_efficientdet.models.anchors import (AnchorBoxCoder, AnchorGenerator,
                                               anchor_targets, match_anchors)
from mmdet_efficientdet.models.window_matching import match_in_windows

# Height and width of the input: even, odd, oblong, small.
INPUTS = ((512, 512), (320, 320), (417, 417), (256, 640), (64, 96))


def grid(sides):
    """Anchors ``(A, 4)`` of levels 3 to 7, and the sizes of these levels."""
    sizes, size = [], sides
    for level in range(1, 8):
        size = tuple(-(-side // 2) for side in size)
        sizes += [size] * (level >= 3)
    return torch.cat(AnchorGenerator().grid_priors(sizes, sides)), sizes


def boxes_of(kind, num, sides, anchors):
    """``(num, 4)`` of one kind."""
    if kind == 'anchors':  # IoU of exactly 1, and of 0.5
        boxes = anchors[torch.randint(len(anchors), (num, ))].clone()
        boxes[::2, 2] += boxes[::2, 2] - boxes[::2, 0]
        return boxes
    center = torch.rand(num, 2) * max(sides)
    side = torch.rand(num, 2)**3 * max(sides) * 0.8
    boxes = torch.cat([center - side / 2, center + side / 2], 1)
    if kind == 'whole pixels':
        boxes = boxes.round()
    elif kind == 'no area':
        boxes[::2, 2:] = boxes[::2, :2]
    elif kind == 'outside':
        boxes += 2 * max(sides)
    elif kind == 'equal':
        boxes[:] = boxes[:1]
    elif kind == 'huge':
        boxes = torch.tensor([-1e4, -1e4, 1e5, 1e5]).repeat(num, 1)
    elif kind == 'one pixel':
        boxes[:, 2:] = boxes[:, :2] + 1
    return boxes


@pytest.mark.parametrize('kind', [
    'random', 'whole pixels', 'no area', 'outside', 'equal', 'huge',
    'one pixel', 'anchors'
])
def test_equal_to_the_matrix(kind):
    """With 1 to 30 boxes, padding, and an image without boxes."""
    positive = 0
    for sides in INPUTS:
        anchors, sizes = grid(sides)
        for num in (1, 7, 30):
            boxes = torch.stack(
                [boxes_of(kind, num, sides, anchors) for _ in range(3)])
            valid = torch.rand(3, num) > 0.3
            valid[0], valid[2] = True, False
            expected = match_anchors(anchors, boxes, valid)
            found = match_in_windows(anchors, sizes, boxes, valid)
            assert torch.equal(found, expected)
            positive += (found >= 0).sum()
    assert positive > 20


def test_equal_to_the_official_loop():
    """The oracle knows no matrix either."""
    anchors, sizes = grid((64, 96))
    boxes = boxes_of('random', 12, (64, 96), anchors)
    found = match_in_windows(anchors, sizes, boxes[None],
                             torch.ones(1, 12, dtype=torch.bool))
    np.testing.assert_array_equal(
        found[0].numpy(), official.match(boxes.numpy(), anchors.numpy()))


@pytest.mark.parametrize('num', [0, 3])
def test_targets(num):
    """The same with the sizes of the levels, when few anchors are encoded."""
    anchors, sizes = grid((96, 64))
    boxes = [
        boxes_of('random', count, (96, 64), anchors)
        for count in (num, 0, 2 * num)
    ]
    labels = [torch.arange(len(x)) % 5 for x in boxes]
    args = anchors, boxes, labels, 5, AnchorBoxCoder()
    expected = anchor_targets(*args)
    for a, b in zip(expected, anchor_targets(*args, sizes), strict=True):
        assert torch.equal(a, b)
    assert (expected[1][2] != 0).any() == (num > 0)
