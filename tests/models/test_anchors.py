"""Anchors, box coding and targets against the official formulas."""
import math

import numpy as np
import pytest
import torch
from effdet.anchors import AnchorLabeler, Anchors, decode_box_outputs
from effdet.object_detection import (ArgMaxMatcher, BoxList,
                                     FasterRcnnBoxCoder, IouSimilarity,
                                     TargetAssigner)
from mmdet.registry import TASK_UTILS
from mmdet.structures.bbox import HorizontalBoxes
from oracles import official_numpy as official
from oracles.effdet_reference import anchors as effdet_anchors
from oracles.official_numpy import YX, feature_sizes

from mmdet_efficientdet.models.anchors import (AnchorBoxCoder, AnchorGenerator,
                                               anchor_targets, match_anchors)

ROOT2 = math.sqrt(2)
PUBLISHED = official.PAIRS
EQUAL_AREA = ((1.0, 1.0), (ROOT2, 1 / ROOT2), (1 / ROOT2, ROOT2))
# With these the anchors' corners are integers, and equal IoUs really equal.
INTEGER = dict(octaves=1, pairs=((1, 1), (2, 0.5), (0.5, 2)))
# Anchors (y1, x1, y2, x2) of the first cell of D0, by index.
GOLDEN = {
    PUBLISHED: {
        0: (-12, -12, 20, 20),
        1: (-7.2, -18.4, 15.2, 26.4),
        2: (-18.4, -7.2, 26.4, 15.2),
        3: (-16.15874, -16.15874, 24.15874, 24.15874),
        4: (-10.11112, -24.22223, 18.11112, 32.22223),
        6: (-21.39842, -21.39842, 29.39842, 29.39842)
    },
    EQUAL_AREA: {
        0: (-12, -12, 20, 20),
        1: (-7.31371, -18.62742, 15.31371, 26.62742),
        2: (-18.62742, -7.31371, 26.62742, 15.31371),
        3: (-16.15874, -16.15874, 24.15874, 24.15874),
        4: (-10.25438, -24.50876, 18.25438, 32.50876),
        6: (-21.39842, -21.39842, 29.39842, 29.39842)
    }
}


def make(image_size, max_level=7, **kwargs):
    """The anchors of all levels in one tensor."""
    return torch.cat(
        AnchorGenerator(**kwargs).grid_priors(
            feature_sizes(image_size, max_level), image_size))


@pytest.mark.parametrize('pairs', GOLDEN)
def test_golden_anchors(pairs):
    """The first cell of D0, for both aspect conventions."""
    anchors = make((512, 512), aspect_pairs=pairs)
    for index, (y1, x1, y2, x2) in GOLDEN[pairs].items():
        assert anchors[index].tolist() == pytest.approx([x1, y1, x2, y2],
                                                        abs=1e-5)


def test_default_aspects():
    """By default, the aspects are those of the published D0-D7x."""
    assert torch.equal(
        make((256, 256)), make((256, 256), aspect_pairs=PUBLISHED))
    assert AnchorGenerator().num_base_priors == [9]
    generator = TASK_UTILS.build(
        dict(
            type='mmdet_efficientdet.AnchorGenerator',
            scales_per_octave=2,
            aspect_pairs=[(1.0, 1.0), (2.0, 0.5)]))
    assert generator.num_base_priors == [4]
    assert generator.grid_priors([(1, 1)], (8, 8))[0].tolist() == [
        [-12, -12, 20, 20],
        [-28, -4, 36, 12],
        pytest.approx(
            [4 - 16 * ROOT2, 4 - 16 * ROOT2, 4 + 16 * ROOT2, 4 + 16 * ROOT2]),
        pytest.approx(
            [4 - 32 * ROOT2, 4 - 8 * ROOT2, 4 + 32 * ROOT2, 4 + 8 * ROOT2]),
    ]


@pytest.mark.parametrize('side, max_level, count', [
    (320, 7, 19_206),
    (384, 7, 27_621),
    (448, 7, 37_629),
    (512, 7, 49_104),
    (640, 7, 76_725),
    (768, 7, 110_484),
    (896, 7, 150_381),
    (1024, 7, 196_416),
    (1280, 7, 306_900),
    (1536, 7, 441_936),
    (1536, 8, 442_260),
])
def test_counts(side, max_level, count):
    """Number of anchors of every published size."""
    anchors = make((side, side), max_level)
    assert anchors.shape == (count, 4)
    assert anchors.dtype == torch.float32


@pytest.mark.parametrize('side, cells, stride', [
    (320, 3, 106.6667),
    (448, 4, 112.0),
    (512, 4, 128.0),
])
def test_stride_of_the_last_level(side, cells, stride):
    """Strides are fractions where the side is no multiple of 128."""
    level = AnchorGenerator().grid_priors(
        feature_sizes((side, side)), (side, side))[-1]
    level = level.view(cells, cells, 9, 4)
    centers = (level[..., :2] + level[..., 2:]) / 2
    step = centers[:, 1:, 0, 0] - centers[:, :-1, 0, 0]
    torch.testing.assert_close(
        step, torch.full_like(step, stride), rtol=1e-6, atol=1e-4)
    assert centers[0, 0].flatten().tolist() == pytest.approx([stride / 2] * 18)
    assert (level[0, 0, 0, 2] - level[0, 0, 0, 0]).item() == pytest.approx(
        4 * stride)


@pytest.mark.parametrize('image_size, kwargs', [
    ((512, 512), {}),
    ((640, 1280), {}),
    ((511, 513), {}),
    ((97, 131), dict(scale=3.0)),
    ((448, 320), dict(scale=3.0, pairs=EQUAL_AREA)),
    ((256, 384), dict(scale=5.0, max_level=8)),
])
def test_anchors_equal_the_official_loops(image_size, kwargs):
    """Level, row, column, octave, aspect: the order of the official loops."""
    expected = official.anchors(image_size, **kwargs)[:, YX]
    anchors = make(
        image_size,
        kwargs.get('max_level', 7),
        octave_base_scale=kwargs.get('scale', 4.0),
        aspect_pairs=kwargs.get('pairs', PUBLISHED))
    assert anchors.shape == expected.shape
    np.testing.assert_allclose(anchors, expected, rtol=1e-7, atol=1e-5)


@pytest.mark.parametrize('name, image_size, kwargs', [
    ('d0', (512, 512), {}),
    ('d0', (256, 384), {}),
    ('d7', (256, 384), dict(octave_base_scale=5.0)),
    ('d7x', (384, 512), dict(max_level=8)),
    ('lite0', (320, 320), dict(octave_base_scale=3.0)),
])
def test_equals_effdet(name, image_size, kwargs):
    """effdet's anchors of the published models are the same."""
    torch.testing.assert_close(
        make(image_size, **kwargs),
        effdet_anchors(name, image_size),
        rtol=1e-6,
        atol=1e-5)


def test_no_stale_anchors():
    """Another size, scale or aspect in between changes nothing."""
    kwargs = [
        dict(image_size=(128, 256)),
        dict(image_size=(256, 128)),
        dict(image_size=(128, 256), octave_base_scale=3.0),
        dict(image_size=(128, 256), aspect_pairs=EQUAL_AREA),
        dict(image_size=(128, 256), scales_per_octave=2),
    ]
    first = [make(**k) for k in kwargs]
    for anchors, k in zip(first, kwargs):
        assert torch.equal(anchors, make(**k))
    for a, b in zip(first[1:], first):
        assert a.shape != b.shape or not torch.equal(a, b)
    # The same features of a smaller input: another stride.
    generator = AnchorGenerator()
    large, = generator.grid_priors([(4, 4)], (32, 32))
    small, = generator.grid_priors([(4, 4)], (28, 30))
    assert large[0].tolist() == [-12, -12, 20, 20]
    assert small[0].tolist() == [-11.25, -10.5, 18.75, 17.5]


@pytest.mark.parametrize('pairs', [
    (),
    (1.0, 2.0, 0.5),
    ((1.0, 1.0), (1.4, 0.7, 1.0)),
])
def test_aspects_that_are_no_pairs_raise(pairs):
    """Ratios, as other generators have them, are refused."""
    with pytest.raises(ValueError, match=r'pairs \(width, height\)'):
        AnchorGenerator(aspect_pairs=pairs)


def test_anchors_of_inference_serve_training():
    """Anchors first made in inference mode can enter a graph."""
    sizes = feature_sizes((72, 88))
    with torch.inference_mode():
        AnchorGenerator().grid_priors(sizes, (72, 88))
    anchors = torch.cat(AnchorGenerator().grid_priors(sizes, (72, 88)))
    assert not anchors.is_inference()
    deltas = torch.zeros(len(anchors), 4, requires_grad=True)
    AnchorBoxCoder().decode(anchors, deltas).sum().backward()
    assert deltas.grad.abs().sum() > 0


def random_boxes(num, low=0.0):
    corner = torch.rand(num, 2) * 100 - 20
    return torch.cat([corner, corner + low + torch.rand(num, 2) * 80], 1)


def test_coder_literals():
    """Offsets are in sides of the anchor, sizes are logarithms of ratios."""
    anchors = torch.tensor([[0., 0., 10., 20.]] * 4)
    boxes = torch.tensor([[5., 5., 25., 25.], [0., 0., 10., 20.],
                          [10., 0., 20., 20.], [0., 20., 10., 40.]])
    deltas = torch.tensor([[1., .25, math.log(2), 0.], [0., 0., 0., 0.],
                           [1., 0., 0., 0.], [0., 1., 0., 0.]])
    torch.testing.assert_close(AnchorBoxCoder().encode(anchors, boxes), deltas)
    torch.testing.assert_close(AnchorBoxCoder().decode(anchors, deltas), boxes)


def test_decode_is_the_inverse():
    """decode(encode(x)) = x, whatever dimensions are in front."""
    coder = AnchorBoxCoder()
    anchors, boxes = random_boxes(300, 1), random_boxes(300, 1)
    torch.testing.assert_close(
        coder.decode(anchors, coder.encode(anchors, boxes)),
        boxes,
        rtol=1e-4,
        atol=1e-3)
    several = boxes.view(3, 100, 4)
    torch.testing.assert_close(
        coder.encode(anchors.view(3, 100, 4), several).view(-1, 4),
        coder.encode(anchors, HorizontalBoxes(boxes)),
        rtol=0,
        atol=0)


def test_decode_has_no_limits():
    """No clamp on the exponent, and no clipping to the image."""
    anchor = torch.tensor([[0., 0., 10., 20.]])
    deltas = torch.tensor([[0., 0., 0., 6.], [0., 0., -7., 0.]])
    boxes = AnchorBoxCoder().decode(
        anchor.expand(2, 4), deltas, max_shape=(32, 32))
    half = 20 * math.exp(6) / 2
    assert boxes[0].tolist() == pytest.approx([0, 10 - half, 10, 10 + half])
    assert (boxes[1, 2] - boxes[1, 0]).item() == pytest.approx(
        10 * math.exp(-7), rel=1e-3)


def test_coder_equals_the_official_formulas():
    """In float64, but for the order of the coordinates, to rounding."""
    boxes, anchors = (random_boxes(300, n).double() for n in (0, 1))
    boxes[:3, 2:] = boxes[:3, :2]  # without area
    codes = AnchorBoxCoder().encode(anchors, boxes)
    expected = official.encode(boxes.numpy()[:, YX], anchors.numpy()[:, YX])
    np.testing.assert_allclose(codes, expected[:, YX], rtol=1e-12, atol=1e-12)
    codes = torch.randn(300, 4, dtype=torch.double) * 3
    expected = official.decode(codes.numpy()[:, YX], anchors.numpy()[:, YX])
    decoded = AnchorBoxCoder().decode(anchors, codes)
    np.testing.assert_allclose(decoded, expected[:, YX], rtol=1e-11)


def test_coder_equals_effdet():
    """The official coder, but for the order of the coordinates."""
    swap = [1, 0, 3, 2]
    anchors, boxes = random_boxes(300, 1), random_boxes(300)
    expected = FasterRcnnBoxCoder().encode(
        BoxList(boxes[:, swap]), BoxList(anchors[:, swap]))
    deltas = AnchorBoxCoder().encode(anchors, boxes)
    torch.testing.assert_close(deltas, expected[:, swap], rtol=1e-5, atol=1e-5)
    deltas = torch.randn(300, 4)
    expected = decode_box_outputs(deltas[:, swap], anchors[:, swap], True)
    torch.testing.assert_close(
        AnchorBoxCoder().decode(anchors, deltas),
        expected,
        rtol=1e-5,
        atol=1e-4)


def test_boxes_without_area_are_coded():
    """Sides are at least 1e-8, so that the logarithm is finite."""
    anchor = torch.tensor([[0., 0., 8., 8.]])
    box = torch.tensor([[4., 4., 4., 4.]])
    deltas = AnchorBoxCoder().encode(anchor, box)[0].tolist()
    size = math.log(1e-8 / 8)
    assert deltas == pytest.approx([0, 0, size, size], rel=1e-5)


def grid_boxes(rng, num, grid):
    """Boxes with small integer corners, hence with many equal IoUs."""
    corner = rng.integers(0, grid - 1, (num, 2))
    return np.hstack([
        corner,
        np.minimum(corner + rng.integers(1, grid // 2 + 1, (num, 2)), grid)
    ]).astype(np.float32)


def random_case(seed):
    """Anchors and a batch of boxes on a coarse grid."""
    rng = np.random.default_rng(seed)
    grid = rng.integers(4, 13)
    anchors = grid_boxes(rng, rng.integers(1, 40), grid)
    batch = [
        grid_boxes(rng, num, grid)
        for num in rng.integers(0, 12, rng.integers(1, 5))
    ]
    # Some boxes are anchors, and some lie where no anchor is.
    for boxes in batch:
        if len(boxes) > 2:
            boxes[0] = anchors[rng.integers(len(anchors))]
            boxes[2] += 100
    return anchors, batch


def match(anchors, batch):
    """match_anchors on a list of arrays."""
    size = max(map(len, batch))
    boxes = torch.full((len(batch), size, 4), 3.0)  # padding that overlaps
    valid = torch.zeros(len(batch), size, dtype=torch.bool)
    for i, image in enumerate(batch):
        boxes[i, :len(image)] = torch.as_tensor(image)
        valid[i, :len(image)] = True
        boxes[i, len(image):, 2:] = 9.0
    return match_anchors(torch.as_tensor(anchors), boxes, valid)


def test_matches_equal_the_official_loop():
    """Hundreds of batches with many ties, image by image."""
    ties = forced = background = 0
    for seed in range(300):
        anchors, batch = random_case(seed)
        matches = match(anchors, batch).numpy()
        assert matches.shape == (len(batch), len(anchors))
        for image, boxes in zip(matches, batch):
            expected = official.match(boxes, anchors)
            np.testing.assert_array_equal(image, expected, f'seed {seed}')
            background += (expected < 0).sum()
            forced += len(boxes) > 2 and 2 in expected
            ties += len(np.unique(boxes, axis=0)) < len(boxes)
    assert ties > 20 and forced > 100 and background > 1000


def test_matches_equal_effdet():
    """effdet's matcher, also ported from the official one, agrees."""
    assigner = TargetAssigner(
        IouSimilarity(),
        ArgMaxMatcher(
            0.5,
            unmatched_threshold=0.5,
            negatives_lower_than_unmatched=True,
            force_match_for_each_row=True), FasterRcnnBoxCoder())
    for seed in range(300, 400):
        anchors, batch = random_case(seed)
        for boxes, matches in zip(batch, match(anchors, batch)):
            if len(boxes):
                *_, expected = assigner.assign(
                    BoxList(torch.from_numpy(anchors)),
                    BoxList(torch.from_numpy(boxes)), torch.ones(len(boxes)))
                assert torch.equal(matches, expected.match_results.long())


@pytest.mark.parametrize('anchors, boxes, expected', [
    # An IoU of exactly 0.5 is positive, a little less is not.
    ([[0, 0, 10, 10], [0, 0, 10, 20]], [[0, 0, 10, 20]], [0, 0]),
    ([[0, 0, 10, 9], [0, 0, 10, 20]], [[0, 0, 10, 20]], [-1, 0]),
    # There is no band between positive and negative.
    ([[0, 0, 100, 45], [0, 0, 100, 100]], [[0, 0, 100, 100]], [-1, 0]),
    # A small box claims its best anchor, of equal ones the first.
    ([[0, 0, 9, 9], [0, 0, 8, 8], [2, 2, 10, 10]], [[4, 4, 6, 6]],
     [-1, 0, -1]),
    # Of two boxes that claim one anchor, the first has it.
    ([[0, 0, 9, 9], [20, 0, 29, 9]], [[4, 4, 6, 6], [1, 1, 3, 3]], [0, -1]),
    ([[0, 0, 9, 9], [20, 0, 29, 9]], [[1, 1, 3, 3], [1, 1, 8, 8]], [0, -1]),
    # Of two boxes that overlap an anchor alike, the first has it.
    ([[9, 9, 10, 10], [0, 0, 4, 4], [0, 0, 4, 4]],
     [[0, 0, 4, 4], [0, 0, 4, 4]], [-1, 0, 0]),
    # A claim is stronger than another box's better overlap.
    ([[0, 0, 10, 10], [50, 50, 60, 60]], [[0, 0, 2, 2], [0, 0, 10, 10]],
     [0, -1]),
    # A box that overlaps nothing claims the first anchor.
    ([[0, 0, 9, 9], [20, 0, 29, 9]], [[50, 50, 60, 60]], [0, -1]),
    ([[0, 0, 9, 9], [20, 0, 29, 9]], [[20, 0, 29, 9], [50, 50, 60, 60],
                                      [70, 50, 80, 60]], [1, 0]),
])  # yapf: disable
def test_match_literals(anchors, boxes, expected):
    """Every rule once, by hand."""
    anchors, boxes = np.float32(anchors), np.float32(boxes)
    assert match(anchors, [boxes])[0].tolist() == expected
    assert official.match(boxes, anchors).tolist() == expected


def test_no_boxes_at_all():
    """Without boxes all is background, with an empty axis, too."""
    anchors = make((64, 64))
    matches = match_anchors(anchors, torch.zeros(3, 0, 4),
                            torch.zeros(3, 0, dtype=torch.bool))
    assert matches.shape == (3, len(anchors))
    assert (matches == -1).all()
    padding = torch.tensor([[[0., 0., 64., 64.]]])
    matches = match_anchors(anchors, padding, torch.tensor([[False]]))
    assert (matches == -1).all()


def targets(batch_boxes, batch_labels, anchors, num_classes=7):
    return anchor_targets(anchors, batch_boxes, batch_labels, num_classes,
                          AnchorBoxCoder())


def test_targets_of_a_batch_are_those_of_its_images():
    """Images with no, one and many boxes do not disturb each other."""
    anchors = make((128, 192))
    numbers = (0, 1, 30, 0, 3)
    boxes = [random_boxes(n, 1).clamp(0, 127) for n in numbers]
    labels = [torch.randint(7, (n, )) for n in numbers]
    batch = targets(boxes, labels, anchors)
    assert batch[0].shape == (5, len(anchors))
    assert batch[1].shape == (5, len(anchors), 4)
    single = [
        targets([HorizontalBoxes(b)], [label], anchors)
        for b, label in zip(boxes, labels)
    ]
    for i, image in enumerate(single):
        assert torch.equal(batch[0][i], image[0][0])
        assert torch.equal(batch[1][i], image[1][0])
    assert batch[2] == sum(image[2] for image in single)
    assert [int(image[2]) > 0 for image in single] == [n > 0 for n in numbers]


@pytest.mark.parametrize('image_size', [(128, 192), (64, 256), (128, 64),
                                        (97, 131)])
@pytest.mark.parametrize('kwargs', [{}, INTEGER])
def test_targets_equal_the_official_formulas(image_size, kwargs):
    """Labels, codes and number of positives of a mixed batch, in float64.

    Of an input of 64x256, the two upper levels have one row.
    """
    priors = official.anchors(image_size, **kwargs)
    batch = official.mixed_batch(image_size, num_classes=7)
    labels, deltas, num_positive = targets(
        [torch.from_numpy(boxes[:, YX]) for boxes, _ in batch],
        [torch.from_numpy(labels) for _, labels in batch],
        torch.from_numpy(priors[:, YX]))
    count = 0
    for i, image in enumerate(batch):
        classes, codes, positives = official.targets(*image, priors, 7)
        one_hot = torch.nn.functional.one_hot(labels[i], 8)[:, :7]
        np.testing.assert_array_equal(one_hot, classes)
        np.testing.assert_allclose(
            deltas[i], codes[:, YX], rtol=1e-12, atol=1e-14)
        count += positives
    assert num_positive == count


def test_mixed_batch_is_mixed():
    """What the batch claims to contain really occurs."""
    priors = official.anchors((128, 192), **INTEGER)
    batch = official.mixed_batch((128, 192), num_classes=7)
    assert {len(boxes) for boxes, _ in batch} >= {0, 1}
    boxes = batch[0][0]
    iou = official.pairwise_iou(boxes, priors)
    matches = official.match(boxes, priors)
    best = iou.max(0)
    assert ((best == 0.5) & (matches >= 0)).any()
    assert ((best < 0.5) & (matches >= 0)).sum() > 1  # forced
    assert ((iou == best).sum(0)[best >= 0.5] > 1).any()  # boxes tie
    assert ((iou == iou.max(1, keepdims=True)).sum(1) > 1).any()  # anchors
    assert len(np.unique(iou.argmax(1))) < len(boxes)  # claim the same
    assert (iou == 1).any() and (iou.max(1) == 0).any()


def test_targets_equal_effdet():
    """Labels and deltas of effdet's labeler at the sizes of a detector."""
    swap = [1, 0, 3, 2]
    labeler = AnchorLabeler(Anchors(3, 7, 3, PUBLISHED, 4.0, (256, 384)), 90)
    boxes = [random_boxes(n, 1) for n in (7, 0, 40)]
    labels = [torch.randint(90, (n, )) for n in (7, 0, 40)]
    cls, box, num_positive = labeler.batch_label_anchors(
        [b[:, swap] for b in boxes], [label + 1 for label in labels])
    cls = torch.cat([level.flatten(1) for level in cls], 1)
    box = torch.cat([level.reshape(3, -1, 4) for level in box], 1)
    got = targets(boxes, labels, make((256, 384)), 90)
    assert torch.equal(got[0], torch.where(cls < 0, 90, cls))
    assert torch.equal(got[1], box[..., swap])
    assert got[2] == num_positive.sum()


def test_box_without_area_has_a_finite_target():
    """A box of zero area claims the first anchor, with finite deltas."""
    anchors = make((64, 64))
    labels, deltas, num_positive = targets([torch.tensor([[9., 9., 9., 9.]])],
                                           [torch.tensor([2])], anchors)
    assert num_positive == 1
    assert labels[0, 0] == 2 and (labels[0, 1:] == 7).all()
    assert deltas.isfinite().all()
