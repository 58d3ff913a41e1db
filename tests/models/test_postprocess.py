"""Selection and suppression against the official NumPy loops."""
import io
import math
from functools import partial

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mmcv.ops import soft_nms
from mmdet.structures import DetDataSample
from oracles import official_numpy as official
from oracles.official_numpy import YX
from torchvision.ops import nms

from mmdet_efficientdet.deploy.postprocess import decode, select, suppress
from mmdet_efficientdet.models.anchors import AnchorBoxCoder
from mmdet_efficientdet.models.efficientdet_head import EfficientDetHead

SIZES = official.feature_sizes((128, 192))


def random_candidates(seed, num, num_classes, extent=100.):
    """Boxes that overlap, partly beyond the image, and distinct scores."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-extent / 2, extent, (num, 2))
    boxes = np.hstack([corner, corner + rng.uniform(2, 50, (num, 2))])
    # From 1 down to below the least score that survives.
    scores = np.sort(10**rng.uniform(-4, 0, num))[::-1]
    labels = rng.integers(num_classes, size=num)
    return boxes.astype(np.float32), scores.astype(np.float32), labels


def as_rows(result, image=0):
    """What suppress returned for an image, without empty slots."""
    boxes, scores, labels = (x[image].numpy() for x in result)
    rows = np.column_stack([boxes, scores, labels])
    return rows[scores > 0]


def tensors(*arrays):
    return [torch.as_tensor(x.copy())[None] for x in arrays]


@pytest.mark.parametrize('num', [60, 30])
def test_select_is_global(num):
    """The strongest pairs of anchor and class of the whole image.

    Fewer pairs than anchors are looked for among the best anchors.
    """
    logits = torch.randn(3, 50, 7)
    logits[0, 11] = 9.0 + torch.arange(7.)
    values, index, labels = select(logits, num)
    for image, v, i, label in zip(logits, values, index, labels):
        order = np.argsort(-image.numpy().ravel(), kind='stable')[:num]
        np.testing.assert_array_equal(v, image.numpy().ravel()[order])
        np.testing.assert_array_equal(i, order // 7)
        np.testing.assert_array_equal(label, order % 7)
    # An anchor counts once for each of its classes.
    assert index[0, :7].tolist() == [11] * 7
    assert labels[0, :7].tolist() == [6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize('least', [0, 2])
def test_select_orders_equal_logits(least):
    """By class and then by anchor, as they stand after the official code."""
    logits = torch.randint(-3, 4, (2, 40, 5)).float()
    logits[1] = 0.5
    num = int((logits[0] > least).sum())
    assert (num < 40) == (least == 2)
    values, index, labels = select(logits, num)
    flat = logits[0].numpy().ravel()
    anchor, label = np.divmod(np.arange(len(flat)), 5)
    order = np.lexsort((anchor, label, -flat))[:num]
    np.testing.assert_array_equal(values[0], flat[order])
    np.testing.assert_array_equal(index[0], anchor[order])
    np.testing.assert_array_equal(labels[0], label[order])
    _, index, labels = select(logits, 0)
    assert index[1].tolist() == list(range(40)) * 5
    assert labels[1].tolist() == sorted(list(range(5)) * 40)


def test_select_takes_all_of_fewer():
    """Fewer pairs than asked for are all selected."""
    values, index, labels = select(torch.randn(2, 3, 4), 5000)
    assert values.shape == (2, 12)
    for i, label in zip(index, labels):
        assert sorted((i * 4 + label).tolist()) == list(range(12))


@pytest.mark.parametrize('num', [0, -1])
def test_select_all(num):
    """A number below 1 stands for all pairs."""
    assert select(torch.randn(2, 3, 4), num)[0].shape == (2, 12)


def test_decode_uses_the_selected():
    """Deltas and anchors are those of the index, image by image."""
    anchors = torch.tensor([[0., 0., 8., 8.], [4., 4., 12., 20.]])
    preds = torch.zeros(2, 2, 4)
    preds[1, 1] = torch.tensor([1., 0., 0., 0.])
    boxes = decode(preds, anchors, torch.tensor([[1, 0, 1], [1, 1, 0]]),
                   AnchorBoxCoder())
    first, second, moved = [0, 0, 8, 8], [4, 4, 12, 20], [12, 4, 20, 20]
    assert boxes.tolist() == [[second, first, second], [moved, moved, first]]


def test_soft_nms_golden():
    """An IoU of 0.5 multiplies the score by exp(-0.5) = 0.60653."""
    boxes = torch.tensor([[[0., 0., 9., 9.], [0., 0., 9., 19.],
                           [0., 0., 9., 19.]]])
    scores = torch.tensor([[0.9, 0.8, 0.7]])
    kept, kept_scores, labels = suppress(boxes, scores,
                                         torch.tensor([[4, 4, 5]]))
    assert labels.tolist() == [[4, 5, 4]]
    assert kept_scores[0].tolist() == pytest.approx(
        [0.9, 0.7, 0.8 * 0.60653066])
    assert kept.tolist() == [[[0, 0, 9, 9], [0, 0, 9, 19], [0, 0, 9, 19]]]


@pytest.mark.parametrize('sigma, factor', [(0.5, math.exp(-2)),
                                           (0.25, math.exp(-4)),
                                           (2.0, math.exp(-0.5))])
def test_sigma(sigma, factor):
    """Equal boxes decay by exp(-1 / sigma)."""
    boxes = torch.tensor([[[3., 3., 7., 8.]] * 2])
    _, scores, _ = suppress(
        boxes, torch.tensor([[0.5, 0.4]]), torch.zeros(1, 2), sigma=sigma)
    assert scores[0].tolist() == pytest.approx([0.5, 0.4 * factor])


def test_min_score():
    """What has decayed below the minimum is gone; the first of a class not."""
    boxes = torch.tensor([[[0., 0., 9., 9.], [0., 0., 9., 9.],
                           [50., 0., 59., 9.], [90., 0., 99., 9.]]])
    scores = torch.tensor([[0.5, 0.4, 0.02, 0.01]])
    labels = torch.tensor([[0, 0, 0, 1]])
    kept = suppress(boxes, scores, labels, min_score=0.06)
    assert as_rows(kept)[:,
                         4:] == pytest.approx(np.array([[0.5, 0], [0.01, 1]]))
    kept = suppress(boxes, scores, labels, min_score=0.05)
    assert as_rows(kept)[:, 4:] == pytest.approx(
        np.array([[0.5, 0], [0.4 * math.exp(-2), 0], [0.01, 1]]))


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('num, num_classes, extent', [
    (60, 1, 60.),
    (250, 3, 100.),
    (400, 90, 100.),
    (400, 3, 3000.),
])
def test_soft_nms_equals_the_official_loop(seed, num, num_classes, extent):
    """Same boxes, order, labels and scores as class by class."""
    candidates = random_candidates(seed, num, num_classes, extent)
    expected = official.per_class(*candidates)
    rows = as_rows(suppress(*tensors(*candidates)))
    assert rows.shape == expected.shape
    np.testing.assert_array_equal(rows[:, [0, 1, 2, 3, 5]],
                                  expected[:, [0, 1, 2, 3, 5]])
    np.testing.assert_allclose(rows[:, 4], expected[:, 4], rtol=1e-4)
    assert (rows[:, :2] < 0).any()
    if extent == 3000.:
        full = official.per_class(*candidates, num=400)
        assert len(full) > 100 == len(rows)


def test_weak_class_is_kept():
    """A class whose strongest score is tiny still gives one box."""
    boxes, scores, _ = random_candidates(3, 30, 1)
    labels = np.zeros(30, dtype=int)
    labels[-4:] = 1
    scores[-4:] = [4e-4, 3e-4, 2e-4, 1e-4]
    rows = as_rows(suppress(*tensors(boxes, scores, labels)))
    np.testing.assert_allclose(rows[rows[:, 5] == 1][:, 4], [4e-4])
    np.testing.assert_allclose(
        rows, official.per_class(boxes, scores, labels), rtol=1e-4)


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('threshold', [0.3, 0.5])
def test_hard_nms_equals_torchvision(seed, threshold):
    """Same boxes in the same order as torchvision, class by class."""
    boxes, scores, labels = tensors(*random_candidates(seed, 300, 4))
    keep = []
    for label in range(4):
        index = (labels[0] == label).nonzero()[:, 0]
        keep.append(index[nms(boxes[0, index], scores[0, index], threshold)])
    keep = torch.cat(keep).sort().values  # scores fall with the index
    assert len(keep) > 40
    for num in (30, 300):
        rows = as_rows(
            suppress(
                boxes,
                scores,
                labels,
                num,
                type='nms',
                iou_threshold=threshold))
        expected = torch.column_stack([boxes[0], scores[0],
                                       labels[0].float()])[keep[:num]]
        np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize('offset, expected', [
    (None, [0.9, 0.8, 0]),
    (0, [0.9, 0.8, 0]),
    (1, [0.9, 0, 0]),
])
def test_hard_nms_may_count_the_last_pixel(offset, expected):
    """An IoU equal to the threshold survives, a larger one does not."""
    # The IoUs are 1/2 and 10/11, or 11/21 and 11/12 with the last pixel.
    boxes = torch.tensor([[[0., 0., 10., 10.], [0., 0., 10., 20.],
                           [0., 0., 10., 11.]]])
    scores = torch.tensor([[0.9, 0.8, 0.7]])
    _, kept, _ = suppress(
        boxes, scores, torch.zeros(1, 3), type='nms', offset=offset)
    assert kept[0].tolist() == pytest.approx(expected)


def test_soft_nms_without_the_last_pixel():
    """With offset=0, boxes that touch do not overlap."""
    boxes = torch.tensor([[[0., 0., 10., 10.], [10., 0., 20., 10.]]])
    scores = torch.tensor([[0.9, 0.8]])
    _, kept, _ = suppress(boxes, scores, torch.zeros(1, 2), offset=0)
    assert kept[0].tolist() == pytest.approx([0.9, 0.8])
    _, kept, _ = suppress(boxes, scores, torch.zeros(1, 2))
    factor = math.exp(-2 * (11 / 231)**2)
    assert kept[0].tolist() == pytest.approx([0.9, 0.8 * factor])


def test_suppress_leaves_its_input_alone():
    """Scores are not changed in place."""
    arrays = random_candidates(0, 50, 2)
    given = tensors(*arrays)
    suppress(*given)
    for tensor, array in zip(given, arrays):
        np.testing.assert_array_equal(tensor[0], array)


@pytest.mark.parametrize('kind', ['soft_nms', 'nms'])
def test_suppress_batch_equals_single(kind):
    """Images of a batch do not disturb each other."""
    images = [tensors(*random_candidates(seed, 150, 3)) for seed in range(4)]
    batch = suppress(*map(torch.cat, zip(*images)), 40, type=kind)
    assert batch[0].shape == (4, 40, 4)
    for i, image in enumerate(images):
        single = suppress(*image, 40, type=kind)
        for a, b in zip(batch, single):
            assert torch.equal(a[i], b[0])


@pytest.mark.parametrize('key, value, known', [
    ('type', 'fast_nms', "'soft_nms', 'nms'"),
    ('method', 'naive', "'gaussian', 'linear'"),
])
def test_unknown_type_raises(key, value, known):
    """The known ones are named."""
    with pytest.raises(ValueError, match=f"{key} '{value}'.*{known}"):
        suppress(*tensors(*random_candidates(0, 5, 1)), **{key: value})


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('threshold, min_score', [(0.3, 0.001), (0.5, 0.05)])
def test_linear_decay_equals_mmcv(seed, offset, threshold, min_score):
    """Same boxes, order and scores as of the host's operator."""
    boxes, _, labels = random_candidates(seed, 200, 1)
    # Distinct, and none too weak, since mmcv drops even the first of a class.
    scores = np.linspace(1, 1.1 * min_score, 200, dtype=np.float32)
    settings = dict(
        iou_threshold=threshold,
        min_score=min_score,
        method='linear',
        offset=offset)
    expected, _ = soft_nms(boxes, scores, **settings)
    rows = as_rows(suppress(*tensors(boxes, scores, labels), 200, **settings))
    assert 20 < len(expected) == len(rows)
    np.testing.assert_allclose(rows[:, :5], expected, rtol=1e-4)
    gaussian = as_rows(suppress(*tensors(boxes, scores, labels), 200))
    assert not np.allclose(gaussian[:20, 4], rows[:20, 4])


@pytest.mark.parametrize('kind', ['soft_nms', 'nms'])
def test_class_agnostic(kind):
    """As if all were of one class; each keeps its label."""
    boxes, scores, labels = tensors(*random_candidates(2, 200, 5))
    rows = as_rows(
        suppress(boxes, scores, labels, type=kind, class_agnostic=True))
    alone = as_rows(suppress(boxes, scores, 0 * labels, type=kind))
    np.testing.assert_array_equal(rows[:, :5], alone[:, :5])
    by_box = {tuple(box.tolist()): label
              for box, label in zip(boxes[0], labels[0])}  # yapf: disable
    assert [by_box[tuple(row[:4])] for row in rows] == rows[:, 5].tolist()
    assert len(as_rows(suppress(boxes, scores, labels,
                                type=kind))) > 100 * (kind == 'soft_nms') - 1
    assert len(set(rows[:, 5])) == 5


def test_all_boxes_are_kept():
    """A negative max_per_img stands for no limit, as in the host."""
    candidates = tensors(*random_candidates(0, 300, 50, 3000.))
    rows = as_rows(suppress(*candidates, -1))
    assert len(rows) > 200
    np.testing.assert_array_equal(rows, as_rows(suppress(*candidates, 300)))


@pytest.mark.parametrize('kind', ['soft_nms', 'nms'])
@pytest.mark.parametrize('rank', [0, 2, 4])
def test_boxes_that_overflow(kind, rank):
    """Infinite boxes, also twice the same, leave the others as they are."""
    boxes, scores, labels = tensors(*random_candidates(1, 60, 1))
    plain = as_rows(suppress(boxes, scores, labels, 60, type=kind))
    infinite = torch.tensor([-math.inf, 0., math.inf, 9.]).expand(1, 2, 4)
    boxes = torch.cat([boxes[:, :rank], infinite, boxes[:, rank:]], 1)
    high = torch.linspace(1.1, 1.2, 2).view(1, 2)
    scores = torch.cat([scores[:, :rank], high, scores[:, rank:]], 1)
    labels = torch.zeros_like(scores)
    rows = as_rows(suppress(boxes, scores, labels, 62, type=kind))
    assert np.isinf(rows[:2, 0]).all()
    np.testing.assert_array_equal(rows[2:, :5], plain[:, :5])


def in_onnx_runtime(function, given, other, **kwargs):
    """Exports a function of tensors; runs it on inputs of other sizes.

    Returns:
        tuple: The outputs for ``other`` and the number of ONNX loops.
    """

    class Module(torch.nn.Module):

        def forward(self, *inputs):
            return function(*inputs, **kwargs)

    names = [f'input_{i}' for i in range(len(given))]
    file = io.BytesIO()
    torch.onnx.export(
        Module().eval(),
        tuple(given),
        file,
        dynamo=False,
        opset_version=16,
        input_names=names,
        dynamic_axes={name: [0, 1]
                      for name in names})
    nodes = onnx.load_from_string(file.getvalue()).graph.node
    session = onnxruntime.InferenceSession(file.getvalue())
    outputs = session.run(None, {k: x.numpy() for k, x in zip(names, other)})
    return outputs, sum(node.op_type == 'Loop' for node in nodes)


def difficult_candidates(ties):
    """Two images with boxes that overflow and, perhaps, many equal scores."""
    images = [tensors(*random_candidates(seed, 150, 3)) for seed in (1, 2)]
    boxes, scores, labels = map(torch.cat, zip(*images))
    boxes[:, 3:5] = torch.tensor([-math.inf, 0., math.inf, 9.])
    if ties:
        boxes[:, 5:] = boxes[:, 5:].round()
        scores = (scores * 8).ceil() / 8
    return boxes, scores, labels


SUPPRESSIONS = [
    dict(),
    dict(max_per_img=7, sigma=0.3, min_score=0.05, offset=0),
    dict(type='nms'),
    dict(max_per_img=150, type='nms', iou_threshold=0.3, offset=1),
    dict(method='linear', iou_threshold=0.3, offset=0),
    dict(class_agnostic=True),
]


@pytest.mark.parametrize('ties', [False, True])
@pytest.mark.parametrize('kwargs', SUPPRESSIONS, ids=str)
def test_scripted_suppression(kwargs, ties):
    """TorchScript computes the same to the last bit, run after run."""
    candidates = difficult_candidates(ties)
    scripted = torch.jit.script(suppress)
    for _ in range(3):  # The first runs are not optimised yet.
        for a, b in zip(
                scripted(*candidates, **kwargs),
                suppress(*candidates, **kwargs)):
            assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize('ties', [False, True])
@pytest.mark.parametrize('kwargs', SUPPRESSIONS, ids=str)
@pytest.mark.parametrize('scripted', [False, True])
def test_exported_suppression(kwargs, ties, scripted):
    """ONNX Runtime keeps the same boxes; scripted, it needs one loop."""
    function = suppress
    if scripted:
        function = torch.jit.script(suppress)
    else:  # Each step is exported by itself.
        kwargs = {**kwargs, 'max_per_img': 5}
    candidates = difficult_candidates(ties)
    outputs, loops = in_onnx_runtime(function,
                                     [x[:1, :100] for x in candidates],
                                     candidates, **kwargs)
    assert loops == scripted
    boxes, scores, labels = suppress(*candidates, **kwargs)
    np.testing.assert_array_equal(outputs[0], boxes)
    np.testing.assert_allclose(outputs[1], scores, rtol=1e-5)
    np.testing.assert_array_equal(outputs[2], labels)


@pytest.mark.parametrize('scripted', [False, True])
def test_scripted_and_exported_selection(scripted):
    """Both select the same pairs in the same order, also of equal logits."""
    given = torch.randn(1, 30, 5)
    other = torch.randint(-3, 4, (2, 40, 5)).float()
    num = int((other > 0).flatten(1).sum(1).min())
    other[1] = torch.randn(40, 5)
    function = torch.jit.script(select) if scripted else select
    expected = select(other, num)
    for a, b in zip(function(other, num), expected):
        assert torch.equal(a, b)
    outputs, _ = in_onnx_runtime(function, [given], [other], num=num)
    for a, b in zip(outputs, expected):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('num, max_per_img', [(5, 0), (0, 100), (3, 100)])
def test_few_boxes(num, max_per_img):
    """No boxes asked for, none there, or fewer than asked for."""
    boxes, scores, labels = tensors(*random_candidates(0, num, 1, 5000.))
    size = min(num, max_per_img)
    kept = suppress(boxes, scores, labels, max_per_img)
    assert [tuple(x.shape) for x in kept] == [(1, size, 4), (1, size),
                                              (1, size)]
    assert [x.dtype
            for x in kept] == [x.dtype for x in (boxes, scores, labels)]


def predictions(batch=1, num_classes=4, spread=2.0):
    """Random outputs of a head for 128x192 pixels."""
    return ([
        torch.randn(batch, 9 * num_classes, *size) * spread - 4
        for size in SIZES
    ], [torch.randn(batch, 36, *size) * 0.3 for size in SIZES])


def predict(head, outs, scale=1.0, cfg=None, shapes=None, **kwargs):
    metas = [
        dict(
            batch_input_shape=(128, 192),
            scale_factor=(scale, scale),
            **(shapes or {}))
    ] * len(outs[0][0])
    return head.predict_by_feat(
        *outs, batch_img_metas=metas, cfg=cfg, **kwargs)


@pytest.mark.parametrize('nms, function', [
    (dict(type='soft_nms', sigma=0.5, min_score=0.001), official.soft_nms),
    (dict(type='nms', iou_threshold=0.5), partial(official.hard_nms,
                                                  offset=0)),
    (dict(type='nms', iou_threshold=0.5,
          offset=1), partial(official.hard_nms, offset=1)),
])
@pytest.mark.parametrize('ties', [False, True])
def test_detections_equal_the_official_ones(nms, function, ties):
    """Boxes, scores, classes and their order, from the same logits.

    Ties are between anchors and between classes; boxes reach beyond the
    image on all sides, and more survive than are wanted.
    """
    cls_scores, bbox_preds = predictions(batch=2)
    if ties:
        cls_scores = [(x * 2).round() / 2 for x in cls_scores]
    flat = [
        torch.cat([x.permute(0, 2, 3, 1).reshape(2, -1, width)
                   for x in maps], 1).double().numpy()
        for maps, width in ((cls_scores, 4), (bbox_preds, 4))
    ]
    # The number is the first image's, where no tie is cut.
    num = int((flat[0][0] > -1.2).sum())
    results = predict(
        EfficientDetHead(4, 8), (cls_scores, bbox_preds),
        0.4,
        dict(nms_pre=num, nms=nms, max_per_img=100),
        rescale=True)
    priors = official.anchors((128, 192))
    for i in range(1 if ties else 2):
        expected, everything = (
            official.detections(
                flat[0][i],
                flat[1][i][:, YX],
                priors,
                0.4,
                num,
                nms=function,
                num=limit) for limit in (100, num))
        result = results[i]
        assert len(everything) > 100 == len(expected) == len(result.scores)
        assert (len(np.unique(expected[:, 4])) < 100) == ties
        assert (expected[:, :2] < 0).any()
        np.testing.assert_array_equal(result.labels, expected[:, 5])
        np.testing.assert_allclose(
            result.bboxes, expected[:, YX], rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(result.scores, expected[:, 4], rtol=1e-4)
        assert result.labels.dtype == torch.int64


def test_defaults_are_the_official_ones():
    """Without a test_cfg: 5000 pairs, soft-NMS, 100 boxes, no threshold."""
    outs = predictions(num_classes=20)
    outs = [x - 8 for x in outs[0]], outs[1]  # weak boxes count, too
    cfg = dict(
        nms_pre=5000,
        score_thr=0.0,
        nms=dict(type='soft_nms', sigma=0.5, min_score=0.001),
        max_per_img=100)
    default, = predict(EfficientDetHead(20, 8), outs)
    written, = predict(EfficientDetHead(20, 8, test_cfg=cfg), outs)
    assert len(default.scores) == 100
    for key, value in default.items():
        assert torch.equal(value, written[key])
    selected, = predict(EfficientDetHead(20, 8), outs, with_nms=False)
    assert len(selected.scores) == 5000
    assert (selected.scores.diff() <= 0).all()


@pytest.mark.parametrize('scale', [0.4, 1.6])
def test_one_scale_maps_back(scale):
    """Boxes are divided by one number; nothing is clipped."""
    head, outs = EfficientDetHead(4, 8), predictions()
    plain, = predict(head, outs, scale)
    mapped, = predict(head, outs, scale, rescale=True)
    torch.testing.assert_close(mapped.bboxes, plain.bboxes / scale)
    assert torch.equal(mapped.scores, plain.scores)
    assert plain.bboxes.min() < 0
    assert plain.bboxes[:, 2].max() > 192


SHAPES = dict(img_shape=(100, 150), ori_shape=(250, 375, 3))


@pytest.mark.parametrize('rescale, width, height', [(True, 375, 250),
                                                    (False, 150, 100)])
@pytest.mark.parametrize('with_nms', [True, False])
def test_boxes_are_clipped(rescale, width, height, with_nms):
    """To the image by default; nothing but the boxes changes."""
    head, outs = EfficientDetHead(4, 8), predictions(2)
    kwargs = dict(shapes=SHAPES, rescale=rescale, with_nms=with_nms)
    official, results = (
        predict(head, outs, 0.4, cfg, **kwargs)
        for cfg in (dict(clip_boxes=False), None))
    for clipped, plain in zip(results, official):
        assert (plain.bboxes < 0).any() and (plain.bboxes > width).any()
        limits = torch.tensor([width, height, width, height])
        assert torch.equal(clipped.bboxes,
                           plain.bboxes.clamp(min=0).minimum(limits))
        assert (clipped.bboxes[:, 2:] >= clipped.bboxes[:, :2]).all()
        assert torch.equal(clipped.scores, plain.scores)
        assert torch.equal(clipped.labels, plain.labels)


def test_two_factors_map_back():
    """Each axis has its own scale; without one, there was no resizing."""
    head, outs = EfficientDetHead(4, 8), predictions()
    plain, = predict(head, outs)
    for meta, factors in ((dict(scale_factor=(0.5, 0.25)), [0.5, 0.25] * 2),
                          (dict(), [1.0] * 4)):
        mapped, = head.predict_by_feat(
            *outs,
            batch_img_metas=[dict(batch_input_shape=(128, 192), **meta)],
            rescale=True)
        torch.testing.assert_close(mapped.bboxes,
                                   plain.bboxes / torch.tensor(factors))


@pytest.mark.parametrize('clip', [True, False])
def test_small_boxes_are_dropped(clip):
    """Sides of the final boxes, in pixels, as in the host."""
    head, outs = EfficientDetHead(4, 8), predictions()

    def run(least):
        cfg = dict(min_bbox_size=least, clip_boxes=clip)
        return predict(head, outs, 0.4, cfg, SHAPES, rescale=True)[0]

    plain = run(-1)
    assert len(plain) == 100
    shorter = (plain.bboxes[:, 2:] - plain.bboxes[:, :2]).amin(1)
    for least in (0, shorter.median().item()):
        for key, value in run(least).items():
            assert torch.equal(value, plain[key][shorter > least])


def test_predict_batch_equals_single():
    """Each image of a batch is predicted as if alone."""
    head, outs = EfficientDetHead(4, 8), predictions(3)
    outs = [x - torch.arange(3.).view(3, 1, 1, 1) for x in outs[0]], outs[1]
    cfg = dict(score_thr=0.3)
    results = predict(head, outs, cfg=cfg)
    assert len({len(result.scores) for result in results}) > 1
    for i, result in enumerate(results):
        single, = predict(
            head, [[x[i:i + 1] for x in maps] for maps in outs], cfg=cfg)
        for key, value in result.items():
            assert torch.equal(value, single[key])


def test_score_threshold():
    """score_thr drops weaker boxes of the result, and only those."""
    head, outs = EfficientDetHead(4, 8), predictions()
    plain, = predict(head, outs)
    threshold = plain.scores[40].item()
    strong, = predict(head, outs, cfg=dict(score_thr=threshold))
    assert len(plain.scores) == 100
    assert torch.equal(strong.bboxes, plain.bboxes[:40])


def test_no_boxes_wanted():
    """max_per_img=0 gives empty results of the right shapes."""
    result, = predict(
        EfficientDetHead(4, 8), predictions(), cfg=dict(max_per_img=0))
    assert result.bboxes.shape == (0, 4)
    assert result.scores.shape == result.labels.shape == (0, )


def test_head_predict():
    """From features to boxes of the original image, through the host."""
    head = EfficientDetHead(4, 8).eval()
    feats = [torch.randn(1, 8, *size) for size in SIZES]
    sample = DetDataSample(
        metainfo=dict(batch_input_shape=(128, 192), scale_factor=(.5, .5)))
    with torch.no_grad():
        result, = head.predict(feats, [sample], rescale=True)
        expected, = predict(head, head(feats), 0.5, rescale=True)
    assert torch.equal(result.bboxes, expected.bboxes)
