"""The head's nets and losses against literals, formulas and effdet."""
import math

import numpy as np
import pytest
import torch
from effdet.anchors import AnchorLabeler, Anchors
from effdet.loss import loss_fn
from mmdet.models import losses as host_losses
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from oracles import official_numpy as official
from oracles.official_numpy import YX
from torch import nn
from torchvision.ops import distance_box_iou_loss, generalized_box_iou_loss

from mmdet_efficientdet.models.anchors import AnchorGenerator, anchor_targets
from mmdet_efficientdet.models.efficientdet_head import EfficientDetHead

PAIRS = official.PAIRS
# Deviations of the kernels by width: depthwise, pointwise.
DEVIATIONS = {
    64: (0.04167, 0.125),
    88: (0.03553, 0.10660),
    112: (0.03150, 0.09449),
    160: (0.02635, 0.07906),
    224: (0.02227, 0.06682),
    288: (0.01964, 0.05893),
    384: (0.01701, 0.05103),
}
PRIOR = -4.59511985
NEGATIVE, POSITIVE = 7.537752e-6, 1.134066  # focal terms of that logit
# One square anchor per cell, of two levels of 16x16 and 8x8 cells.
SQUARES = dict(
    type='mmdet_efficientdet.AnchorGenerator',
    scales_per_octave=1,
    aspect_pairs=[(1.0, 1.0)])


def feature_sizes(image_size, num_levels=5):
    return official.feature_sizes(image_size, num_levels + 2)


def make_feats(channels, image_size, num_levels=5, batch=1):
    return [
        torch.randn(batch, channels, *size)
        for size in feature_sizes(image_size, num_levels)
    ]


def bias_only(head):
    """Zeroes all kernels of an initialised head."""
    head.init_weights()
    for key, parameter in head.named_parameters():
        if key.endswith('wise.weight'):
            nn.init.zeros_(parameter)
    return head.eval()


def outputs(head, image_size, batch=1, logit=PRIOR):
    """Constant logits and zero deltas of the head's shapes."""
    sizes = feature_sizes(image_size, head.num_levels)
    num = head.num_base_priors
    return ([
        torch.full((batch, num * head.num_classes, *s), logit) for s in sizes
    ], [torch.zeros(batch, num * 4, *s) for s in sizes])


def truth(boxes=(), labels=None):
    """Boxes of one image as the head gets them."""
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    labels = [0] * len(boxes) if labels is None else labels
    return InstanceData(
        bboxes=boxes, labels=torch.tensor(labels, dtype=torch.long))


def losses(head, outs, truths, image_size):
    metas = [dict(batch_input_shape=tuple(image_size))] * len(truths)
    return head.loss_by_feat(*outs, truths, metas)


def flat(maps, width):
    """Level maps (N, A * width, H, W) as (N, anchors, width), by hand."""
    return torch.cat([
        x.reshape(x.shape[0], -1, width, *x.shape[2:]).permute(
            0, 3, 4, 1, 2).reshape(x.shape[0], -1, width) for x in maps
    ], 1)


@pytest.mark.parametrize('num_classes, expected', [(90, 33.31204),
                                                   (80, 29.61070)])
def test_initial_class_loss(num_classes, expected):
    """The loss of a 512x512 image without objects, from biases alone.

    It grows with the number of images, since zero positives divide by 1.
    """
    head = bias_only(EfficientDetHead(num_classes, 4))
    for batch in (1, 2):
        outs = head(make_feats(4, (512, 512), batch=batch))
        loss = losses(head, outs, [truth()] * batch, (512, 512))
        assert loss['loss_cls'].item() == pytest.approx(
            batch * expected, rel=2e-5)
        assert loss['loss_bbox'] == 0


@pytest.mark.parametrize('num_boxes', [1, 2, 3])
def test_focal_terms_and_normaliser(num_boxes):
    """Each small box has one positive anchor; N positives divide by N + 1."""
    head = EfficientDetHead(6, 4)
    boxes = [(90. + 30 * i, 60., 94. + 30 * i, 64.) for i in range(num_boxes)]
    outs = outputs(head, (256, 256))
    loss = losses(head, outs, [truth(boxes, [5] * num_boxes)], (256, 256))
    num_terms = 6 * 9 * sum(h * w for h, w in feature_sizes((256, 256)))
    total = num_boxes * POSITIVE + (num_terms - num_boxes) * NEGATIVE
    assert loss['loss_cls'].item() == pytest.approx(
        total / (num_boxes + 1), rel=1e-5)


def small_box_case(head, target):
    """A box that is `target` away from the one anchor it claims."""
    # The 32x32 anchor of cell (6, 9) has its centre at (76, 52).
    dx, dy, dw, dh = target
    side_x, side_y = 32 * math.exp(dw), 32 * math.exp(dh)
    x, y = 76 + 32 * dx, 52 + 32 * dy
    box = (x - side_x / 2, y - side_y / 2, x + side_x / 2, y + side_y / 2)
    return truth([box]), (slice(None), slice(0, 4), 6, 9)


@pytest.mark.parametrize('error, expected', [
    ((0.05, 0, 0, 0), 0.00125),
    ((0, 0.1, 0, 0), 0.005),
    ((0, 0, -1.0, 0), 0.095),
    ((0, 0, 0, -0.05), 0.00125),
    ((-0.05, 0.1, 1.0, 0), 0.10125),
    ((0.1, 0.1, 0.1, 0.1), 0.02),
    ((0, 0, 0, 0), 0.0),
])
def test_huber_terms(error, expected):
    """The box loss of one positive is 50 * Huber(0.1) / (4 * 2).

    What is predicted at all other anchors does not matter.
    """
    head = EfficientDetHead(3, 4, num_levels=2, anchor_generator=SQUARES)
    target = (0.05, -0.03, -0.4, -0.36)
    instances, place = small_box_case(head, target)
    cls_scores, bbox_preds = outputs(head, (128, 128))
    for level in bbox_preds:
        level.normal_()
    bbox_preds[0][place] = torch.tensor(target) + torch.tensor(error)
    loss = losses(head, (cls_scores, bbox_preds), [instances], (128, 128))
    assert loss['loss_bbox'].item() == pytest.approx(
        50 * expected / 8, rel=2e-4, abs=1e-7)


def test_targets_of_zero_cost_nothing():
    """The mask is by value: a coordinate that fits exactly is left out."""
    head = EfficientDetHead(3, 4, num_levels=2, anchor_generator=SQUARES)
    cls_scores, bbox_preds = outputs(head, (128, 128))
    for level in bbox_preds:
        level.fill_(0.7).requires_grad_()
    # Exactly the anchor of cell (6, 9); its four neighbours have IoU 0.6.
    box = (60., 36., 92., 68.)
    loss = losses(head, (cls_scores, bbox_preds), [truth([box])], (128, 128))
    loss['loss_bbox'].backward()
    found = {tuple(i) for i in bbox_preds[0].grad[0].nonzero().tolist()}
    # (coordinate, row, column): neighbours differ in one coordinate each.
    assert found == {(0, 6, 8), (0, 6, 10), (1, 5, 9), (1, 7, 9)}
    assert not bbox_preds[1].grad.any()


@pytest.mark.parametrize('logit, y, expected', [
    (PRIOR, 0, NEGATIVE),
    (PRIOR, 1, POSITIVE),
    (0.0, 1, 0.25 * 0.5**1.5 * math.log(2)),
    (-800.0, 1, 200.0),
    (800.0, 1, 0.0),
])
def test_official_focal_literals(logit, y, expected):
    """The transcription is right itself, and its slopes are."""
    assert official.focal(np.float64(logit), y)[0] == pytest.approx(
        expected, rel=1e-6)
    x, step = np.linspace(-30, 30, 121), 1e-6
    for label in (0, 1):
        above, below = (official.focal(x + d, label)[0] for d in (step, -step))
        np.testing.assert_allclose(
            official.focal(x, label)[1], (above - below) / (2 * step),
            rtol=1e-6,
            atol=1e-8)


@pytest.mark.parametrize('error, expected, slope', [
    (0.05, 0.00125, 0.05),
    (0.1, 0.005, 0.1),
    (-1.0, 0.095, -0.1),
])
def test_official_huber_literals(error, expected, slope):
    """The transcription is right itself."""
    assert official.huber(error) == pytest.approx((expected, slope))


@pytest.mark.parametrize('image_size', [(128, 192), (64, 256), (97, 131)])
@pytest.mark.parametrize('num_classes', [1, 5])
@pytest.mark.parametrize('octaves, pairs', [
    (3, PAIRS),
    (1, ((1, 1), (2, 0.5), (0.5, 2))),
])
def test_losses_and_gradients_equal_the_official_formulas(
        monkeypatch, image_size, num_classes, octaves, pairs):
    """A mixed batch, with a crowd, all in float64.

    With the second anchors there are ties, exact halves and zero targets. Of
    an input of 64x256, the two upper levels have one row.
    """
    head = EfficientDetHead(
        num_classes,
        4,
        anchor_generator=dict(
            type='mmdet_efficientdet.AnchorGenerator',
            scales_per_octave=octaves,
            aspect_pairs=pairs))
    single = head.prior_generator.grid_priors
    monkeypatch.setattr(
        head.prior_generator, 'grid_priors',
        lambda *args, **kwargs: [x.double() for x in single(*args, **kwargs)])
    batch = official.mixed_batch(image_size, num_classes)
    cls_scores, bbox_preds = ([
        torch.randn(len(batch), *x.shape[1:], dtype=torch.double) * 3
        for x in maps
    ] for maps in outputs(head, image_size))
    for x in (*cls_scores, *bbox_preds):
        x.requires_grad_()
    metas = [dict(batch_input_shape=image_size)] * len(batch)
    loss = head.loss_by_feat(
        cls_scores,
        bbox_preds,
        [truth(boxes[:, YX].tolist(), labels) for boxes, labels in batch],
        metas,
        batch_gt_instances_ignore=[truth([(8, 8, 90, 60)])] * len(batch))

    def numpy(maps, width):
        return flat([x.detach() for x in maps], width).numpy()

    expected = official.losses(
        numpy(cls_scores, num_classes),
        numpy(bbox_preds, 4)[..., YX], batch,
        official.anchors(image_size, pairs=pairs, octaves=octaves))
    assert loss['loss_cls'].item() == pytest.approx(expected[0], rel=1e-12)
    assert loss['loss_bbox'].item() == pytest.approx(expected[1], rel=1e-12)
    for name, maps, grad in (('loss_cls', cls_scores, expected[2]),
                             ('loss_bbox', bbox_preds, expected[3][..., YX])):
        got = numpy(torch.autograd.grad(loss[name], maps), grad.shape[-1])
        np.testing.assert_allclose(
            got, grad, rtol=0, atol=1e-12 * np.abs(grad).max())


def test_losses_equal_effdet():
    """effdet's loss of random outputs and boxes, with its gradients."""
    size, swap, num_classes = (128, 192), [1, 0, 3, 2], 90
    head = EfficientDetHead(num_classes, 4)
    outs = [[torch.randn(3, *x.shape[1:]).requires_grad_() for x in maps]
            for maps in outputs(head, size)]
    images = []
    for num in (5, 0, 12):
        corner = torch.rand(num, 2) * 90
        boxes = torch.cat([corner, corner + 2 + torch.rand(num, 2) * 60], 1)
        images.append(
            truth(boxes.tolist(),
                  torch.randint(num_classes, (num, )).tolist()))
    loss = losses(head, outs, images, size)
    grads = torch.autograd.grad(loss['loss_cls'] + loss['loss_bbox'],
                                outs[0] + outs[1])

    labeler = AnchorLabeler(Anchors(3, 7, 3, PAIRS, 4.0, size), num_classes)
    targets = labeler.batch_label_anchors(
        [image.bboxes[:, swap] for image in images],
        [image.labels + 1 for image in images])
    boxes = [x.unflatten(1, (9, 4))[:, :, swap].flatten(1, 2) for x in outs[1]]
    total, cls, box = loss_fn(
        outs[0],
        boxes,
        *targets,
        num_classes=num_classes,
        alpha=0.25,
        gamma=1.5,
        delta=0.1,
        box_loss_weight=50.0)
    torch.testing.assert_close(loss['loss_cls'], cls, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss['loss_bbox'], 50 * box, rtol=1e-4, atol=0)
    for a, b in zip(grads, torch.autograd.grad(total, outs[0] + outs[1])):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_config_equals_defaults(model_cfg):
    """The losses written out in the config of D0 are the default ones."""
    default = EfficientDetHead(90, 64)
    written = MODELS.build(model_cfg('d0').bbox_head)
    for name in ('loss_cls', 'loss_bbox'):
        assert vars(getattr(default, name)).items() >= {
            k: v
            for k, v in vars(getattr(written, name)).items()
            if not k.startswith('_')
        }.items()
    assert vars(default.prior_generator) == vars(written.prior_generator)


def test_ignored_boxes_make_no_difference():
    """Crowds are background: with them alone, all of it is negative."""
    head = EfficientDetHead(3, 4).eval()
    head.init_weights()
    feats = make_feats(4, (128, 128))
    results = []
    for ignored in ([], [(10, 10, 90, 90)]):
        for boxes in ([], [(20, 30, 50, 60)]):
            sample = DetDataSample(metainfo=dict(batch_input_shape=(128, 128)))
            sample.gt_instances = truth(boxes)
            sample.ignored_instances = truth(ignored)
            results.append(head.loss(feats, [sample]))
    assert results[0] == results[2] and results[1] == results[3]
    assert results[0]['loss_bbox'] == 0 < results[1]['loss_bbox']
    loss = losses(head, head(feats), [truth()], (128, 128))
    assert loss == results[0]


def test_losses_are_float32():
    """Half precision outputs of the nets are summed up in float32."""
    head = EfficientDetHead(90, 4)
    instances = [truth([(5, 5, 9, 9)])]
    half = [[x.half() for x in maps] for maps in outputs(head, (256, 256))]
    single = [[x.float() for x in maps] for maps in half]
    loss = losses(head, half, instances, (256, 256))
    expected = losses(head, single, instances, (256, 256))
    for key, value in loss.items():
        assert value.dtype == torch.float32
        assert value == expected[key]


def test_double_precision_stays():
    """Outputs in float64 are neither rounded in the loss nor in boxes."""
    head = EfficientDetHead(3, 4)
    outs = [[torch.randn(x.shape, dtype=torch.double) for x in maps]
            for maps in outputs(head, (64, 64))]
    loss = losses(head, outs, [truth([(5, 5, 40, 50)])], (64, 64))
    result, = head.predict_by_feat(
        *outs, batch_img_metas=[dict(batch_input_shape=(64, 64))])
    for value in (*loss.values(), result.bboxes, result.scores):
        assert value.dtype == torch.float64


def test_gradients_reach_everything():
    """All parameters get finite gradients; a box net needs a box."""
    for boxes in ([], [(20, 30, 50, 60), (0, 0, 100, 127)]):
        head = EfficientDetHead(3, 8)
        head.init_weights()
        outs = head(make_feats(8, (128, 128), batch=2))
        loss = losses(head, outs, [truth(boxes), truth()], (128, 128))
        sum(loss.values()).backward()
        for key, parameter in head.named_parameters():
            assert parameter.grad.isfinite().all(), key
            learns = 'cls' in key or (boxes and 'norms' not in key)
            assert not learns or parameter.grad.any(), key


@pytest.mark.parametrize('anchor', [0, 4, 8])
@pytest.mark.parametrize('label', [0, 2, 4])
def test_channel_of_a_class(anchor, label):
    """The channel of a class is anchor * K + class, as in the official net.

    Boxes of the anchor's shape and that label come out, and a loss of next
    to nothing for a box that is exactly this anchor.
    """
    num_classes = 5
    head = bias_only(EfficientDetHead(num_classes, 4))
    bias = head.conv_cls.pointwise.bias
    nn.init.constant_(bias, -20.0)
    bias.data[anchor * num_classes + label] = 3.0
    outs = head(make_feats(4, (128, 128)))
    for level in outs[0]:
        assert level.shape[1] == 9 * num_classes
    metas = [dict(batch_input_shape=(128, 128))]
    num_cells = sum(h * w for h, w in feature_sizes((128, 128)))
    boxes = head.predict_by_feat(
        *outs,
        batch_img_metas=metas,
        cfg=dict(nms_pre=num_cells),
        with_nms=False)[0]
    assert (boxes.labels == label).all()
    side = 4 * 2**(anchor // 3 / 3)
    aspect_x, aspect_y = PAIRS[anchor % 3]
    shapes = (boxes.bboxes[:, 2:] - boxes.bboxes[:, :2]) / side
    strides = [8.] * 256 + [16.] * 64 + [32.] * 16 + [64.] * 4 + [128.]
    expected = [[stride * aspect_x, stride * aspect_y] for stride in strides]
    torch.testing.assert_close(
        shapes.sort(0).values, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    flat_scores = flat(outs[0], num_classes)
    assert (flat_scores.argmax(-1)[0, anchor::9] == label).all()


@pytest.mark.parametrize('anchor', [0, 5])
@pytest.mark.parametrize('coordinate', range(4))
def test_channel_of_a_coordinate(anchor, coordinate):
    """The channel of a delta is anchor * 4 + (dx, dy, dw, dh)."""
    head = bias_only(EfficientDetHead(1, 4))
    metas = [dict(batch_input_shape=(128, 128))]
    cfg = dict(nms_pre=9 * 341)

    def boxes():
        outs = head(make_feats(4, (128, 128)))
        # One anchor after the other, so that the order is known.
        start = 0
        for level in outs[0]:
            size = level.numel()
            order = torch.arange(start, start + size).float() / -1000
            level.copy_(order.view(*level.shape[2:], 9).permute(2, 0, 1)[None])
            start += size
        return head.predict_by_feat(
            *outs, batch_img_metas=metas, cfg=cfg, with_nms=False)[0].bboxes

    with torch.no_grad():
        plain = boxes()
        head.conv_reg.pointwise.bias[anchor * 4 + coordinate] = 1.0
        moved = boxes()
    changed = torch.zeros(len(plain), dtype=torch.bool)
    changed[anchor::9] = True
    assert torch.equal(moved[~changed], plain[~changed])
    a, b = plain[changed], moved[changed]
    side = (a[:, 2:] - a[:, :2])[:, coordinate % 2]
    axis = [coordinate % 2, coordinate % 2 + 2]
    if coordinate < 2:
        expected = a[:, axis] + side[:, None]
    else:
        grow = side * (math.e - 1) / 2
        expected = a[:, axis] + torch.stack([-grow, grow], 1)
    torch.testing.assert_close(b[:, axis], expected)
    other = [1 - axis[0], 3 - axis[0]]
    torch.testing.assert_close(b[:, other], a[:, other])


def test_no_residual_connections():
    """After a repeat without kernels nothing is left of the input."""
    head = EfficientDetHead(2, 4, num_levels=2)
    head.init_weights()
    head.eval()
    for convs in (head.cls_convs, head.reg_convs):
        nn.init.zeros_(convs[1].depthwise.weight)
    outs = [head(make_feats(4, (32, 32), 2)) for _ in range(2)]
    for a, b in zip(outs[0][0] + outs[0][1], outs[1][0] + outs[1][1]):
        assert torch.equal(a, b)


@pytest.mark.parametrize('net, width', [('cls', 9), ('reg', 36)])
def test_norms_by_repeat_and_level(net, width):
    """Each repeat and level has a norm of its own, in that order.

    With identities for convolutions, output = (x * w1 + b1) * w2 + b2.
    """
    head = EfficientDetHead(
        1, 1, stacked_convs=2, num_levels=3, act_cfg=dict(type='ReLU')).eval()
    norms = getattr(head, f'{net}_norms')
    assert [len(level_norms) for level_norms in norms] == [3, 3]
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
            module.weight.data[:, :, module.kernel_size[0] // 2,
                               module.kernel_size[1] // 2] = 1
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name in ('cls', 'reg'):
        for repeat, level_norms in enumerate(getattr(head, f'{name}_norms')):
            for level, norm in enumerate(level_norms):
                norm.running_var.fill_(1 - norm.eps)
                nn.init.constant_(norm.weight, 2 + 3 * repeat + level)
                nn.init.constant_(norm.bias, 11 * repeat + 7 * level)
    # Only the net in question is right.
    for level_norms in getattr(head,
                               dict(cls='reg', reg='cls')[net] + '_norms'):
        for norm in level_norms:
            nn.init.zeros_(norm.weight)
    outs = head([torch.full((1, 1, 3, 3), 5.0)] * 3)[net == 'reg']
    for level, out in enumerate(outs):
        first = 5 * (2 + level) + 7 * level
        expected = first * (5 + level) + 11 + 7 * level
        assert out.shape == (1, width, 3, 3)
        torch.testing.assert_close(out, torch.full_like(out, expected))


def test_convolutions_are_shared():
    """Equal levels give equal outputs while their norms are equal."""
    head = EfficientDetHead(2, 4, num_levels=3).eval()
    head.init_weights()
    feat = torch.randn(1, 4, 6, 5)
    for maps in head([feat] * 3):
        assert torch.equal(maps[0], maps[1]) and torch.equal(maps[0], maps[2])
    keys = [k for k in head.state_dict() if 'convs' in k]
    assert len(keys) == 2 * 3 * 3


def test_activation_follows_the_norm():
    """Where the last norm gives -1, only the predictor's bias is left."""
    head = EfficientDetHead(2, 4, num_levels=2, act_cfg=dict(type='ReLU'))
    for norms in (head.cls_norms[-1], head.reg_norms[-1]):
        for norm in norms:
            nn.init.zeros_(norm.weight)
            nn.init.constant_(norm.bias, -1.0)
    cls_scores, bbox_preds = head(make_feats(4, (64, 64), 2))
    for maps, part in ((cls_scores, head.conv_cls), (bbox_preds,
                                                     head.conv_reg)):
        bias = part.pointwise.bias.view(1, -1, 1, 1)
        assert bias.any()
        for x in maps:
            assert torch.equal(x, bias.expand_as(x))


def test_predictors_are_linear():
    """No activation after the predictors, and no norm in them."""
    head = EfficientDetHead(2, 4, num_levels=2, act_cfg=dict(type='ReLU'))
    for maps in head(make_feats(4, (64, 64), 2)):
        assert min(x.min() for x in maps) < 0
    for part in (head.conv_cls, head.conv_reg):
        assert list(part.state_dict()) == [
            'depthwise.weight', 'pointwise.weight', 'pointwise.bias'
        ]


def test_wrong_number_of_levels_raises():
    """Both numbers are named."""
    with pytest.raises(ValueError, match='4 levels.*num_levels=5.*num_outs'):
        EfficientDetHead(2, 4)(make_feats(4, (64, 64), 4))


@pytest.mark.parametrize('width', DEVIATIONS)
def test_initialisers(width):
    """Kernels have a deviation of sqrt(1 / fan-in) after truncation."""
    with torch.no_grad():
        head = EfficientDetHead(2, width)
        head.init_weights()
        for kind, deviation in zip(('depthwise', 'pointwise'),
                                   DEVIATIONS[width]):
            kernels = torch.cat([
                v.flatten() for k, v in head.state_dict().items()
                if k.endswith(f'{kind}.weight')
            ])
            tolerance = 4 / math.sqrt(2 * len(kernels))
            assert kernels.std().item() == pytest.approx(
                deviation, rel=tolerance)
            # Truncated at two deviations of the normal distribution.
            limit = 2 * deviation / .87962566
            assert 0.9 * limit < kernels.abs().max() < 1.001 * limit
    assert head.conv_cls.pointwise.bias.tolist() == pytest.approx([PRIOR] * 18)
    for key, value in head.state_dict().items():
        if key.endswith('bias') and 'conv_cls' not in key:
            assert not value.any(), key
        elif 'norms' in key and key.endswith('weight'):
            assert (value == 1).all(), key


@pytest.mark.parametrize('num_classes', (1, 2))  # 9 * 2 is the width, too
def test_identity_init(num_classes):
    """Only what is between features of the same width changes."""
    start = {}
    for flag in (False, True):
        torch.manual_seed(0)
        head = EfficientDetHead(num_classes, 18, identity_init=flag)
        head.init_weights()
        start[flag] = head.state_dict()
    for key, value in start[True].items():
        if 'convs' in key and key.endswith('pointwise.weight'):
            assert torch.equal(value[..., 0, 0], torch.eye(18)), key
        else:
            assert torch.equal(value, start[False][key]), key


def test_without_norm():
    """norm_cfg=None leaves the norms out."""
    head = EfficientDetHead(2, 4, num_levels=2, norm_cfg=None)
    assert not [k for k in head.state_dict() if 'norm' in k]
    head(make_feats(4, (16, 16), 2))


def test_losses_of_boxes():
    """With reg_decoded_bbox, boxes in pixels are compared at positives."""
    size, box = (128, 192), [(20., 30., 60., 64.)]
    for kind, formula in (('GIoULoss', generalized_box_iou_loss),
                          ('DIoULoss', distance_box_iou_loss)):
        head = EfficientDetHead(
            3, 4, reg_decoded_bbox=True, loss_bbox=dict(type=kind))
        cls_scores, bbox_preds = outputs(head, size, batch=2)
        bbox_preds = [
            torch.randn(x.shape).mul(0.2).requires_grad_() for x in bbox_preds
        ]
        truths = [truth(box), truth()]
        loss = losses(head, (cls_scores, bbox_preds), truths, size)
        anchors = torch.cat(
            head.prior_generator.grid_priors([x.shape[2:] for x in cls_scores],
                                             size))
        positive = anchor_targets(anchors, [truths[0].bboxes],
                                  [truths[0].labels], 3,
                                  head.bbox_coder)[0][0] < 3
        preds = head.bbox_coder.decode(anchors, flat(bbox_preds, 4)[0])
        num = int(positive.sum())
        expected = formula(preds[positive], truths[0].bboxes.expand(num, -1))
        torch.testing.assert_close(loss['loss_bbox'],
                                   expected.sum() / (num + 1))
        grads = torch.autograd.grad(loss['loss_bbox'], bbox_preds)
        moved = flat(grads, 4).any(-1)
        assert torch.equal(moved[0], positive) and not moved[1].any()
        # A good prediction costs nothing, whatever is predicted elsewhere.
        deltas = head.bbox_coder.encode(anchors, truths[0].bboxes) + 1e-6
        deltas = torch.where(positive[:, None], deltas, 1e4)
        maps, start = [], 0
        for x in bbox_preds:
            end = start + x[0].numel() // 4
            part = deltas[start:end].view(*x.shape[2:], -1).permute(2, 0, 1)
            maps.append(part[None].repeat(2, 1, 1, 1))
            start = end
        loss = losses(head, (cls_scores, maps), truths, size)
        assert abs(loss['loss_bbox']) < 1e-5
        # Without boxes the box net still gets its gradient of zero.
        loss = losses(head, (cls_scores, bbox_preds), [truth()] * 2, size)
        assert loss['loss_bbox'] == 0 and loss['loss_bbox'].requires_grad


HOST_LOSSES = sorted(name for name, kind in vars(host_losses).items()
                     if isinstance(kind, type) and name in MODELS.module_dict)


@pytest.mark.parametrize('decoded', [False, True])
@pytest.mark.parametrize('part', ['loss_cls', 'loss_bbox'])
@pytest.mark.parametrize('name', HOST_LOSSES)
def test_each_loss_of_the_host(name, part, decoded):
    """It trains, or is refused by its name with the ones that can be used."""
    kind = dict(
        type=name, use_sigmoid=True) if part == 'loss_cls' else dict(type=name)
    usable = name in ('FocalLoss', 'CrossEntropyLoss') if part == 'loss_cls' \
        else decoded and name.endswith('IoULoss') or name in (
            'SmoothL1Loss', 'L1Loss', 'BalancedL1Loss', 'MSELoss')
    args = {part: kind, 'reg_decoded_bbox': decoded}
    if not usable:
        with pytest.raises(ValueError) as error:
            EfficientDetHead(3, 4, **args)
        for word in (f'{part}={name}', 'FocalLoss'
                     if part == 'loss_cls' else 'reg_decoded_bbox=True'):
            assert word in str(error.value)
        return
    head = EfficientDetHead(3, 4, **args)
    head.init_weights()
    outs = head(make_feats(4, (64, 64), batch=2))
    loss = losses(head, outs, [truth([(5, 5, 40, 50)]), truth()], (64, 64))
    sum(loss.values()).backward()
    assert all(0 < value < 1e5 for value in loss.values())
    for net in (head.conv_cls, head.conv_reg):
        assert net.pointwise.weight.grad.isfinite().all()
        assert net.pointwise.weight.grad.any()


def test_own_parts_are_not_refused():
    """Losses and task units of users have names that nobody knows."""

    class MyIoULoss(host_losses.SmoothL1Loss):
        pass

    class MyAnchors(AnchorGenerator):
        pass

    head = EfficientDetHead(
        3,
        4,
        loss_bbox=dict(type=MyIoULoss),
        anchor_generator=dict(type=MyAnchors, octave_base_scale=3.0))
    assert type(head.loss_bbox) is MyIoULoss
    assert head.prior_generator.octave_base_scale == 3.0


@pytest.mark.parametrize('settings, words', [
    (dict(train_cfg=dict(assigner=dict(type='MaxIoUAssigner'))),
     ('train_cfg', 'assigner', 'None')),
    (dict(loss_cls=dict(type='CrossEntropyLoss')),
     ('CrossEntropyLoss', 'use_sigmoid=True', 'background')),
    (dict(loss_cls=dict(type='FocalLoss', use_sigmoid=False)),
     ("'use_sigmoid': False", 'use_sigmoid=True')),
    (dict(test_cfg=dict(nms_post=100)), ('nms_post', 'nms_pre', 'clip_boxes')),
    (dict(test_cfg=dict(nms=dict(type='nms', iou_thr=0.5))),
     ('iou_thr', 'test_cfg.nms', 'iou_threshold', 'class_agnostic')),
    (dict(test_cfg=dict(nms=dict(type='soft_nms', split_thr=100))),
     ('split_thr', 'test_cfg.nms', 'sigma')),
    (dict(test_cfg=dict(nms=dict(type='fast_nms'))),
     ('fast_nms', "'soft_nms', 'nms'")),
    (dict(test_cfg=dict(nms=dict(type='soft_nms', method='naive'))),
     ('naive', "'gaussian', 'linear'")),
    (dict(test_cfg=dict(nms=None)), ('test_cfg.nms=None', 'a dict')),
    (dict(anchor_generator=dict(type='AnchorGenerator', octave_base_scale=4,
                                scales_per_octave=3, aspect_pairs=[(1, 1)])),
     ('anchor_generator=AnchorGenerator',
      'mmdet_efficientdet.AnchorGenerator')),
    (dict(anchor_generator=dict(type='AnchorGenerator', scales=[8],
                                ratios=[1.0], strides=[8, 16, 32, 64, 128])),
     ('anchor_generator=AnchorGenerator',
      'mmdet_efficientdet.AnchorGenerator')),
    (dict(bbox_coder=dict(type='mmdet.DeltaXYWHBBoxCoder')),
     ('bbox_coder=DeltaXYWHBBoxCoder', 'mmdet_efficientdet.AnchorBoxCoder')),
])  # yapf: disable
def test_settings_are_refused(settings, words):
    """At construction: what is given, what is allowed, and the way out."""
    with pytest.raises(ValueError) as error:
        EfficientDetHead(3, 4, **settings)
    for word in words:
        assert word in str(error.value)


def test_settings_of_the_host_work():
    """What a RetinaNet of the host has in its test_cfg."""
    head = EfficientDetHead(
        3,
        4,
        test_cfg=dict(
            nms_pre=1000,
            min_bbox_size=0,
            score_thr=0.05,
            nms=dict(type='nms', iou_threshold=0.5, class_agnostic=False),
            max_per_img=-1))
    found, = head.predict_by_feat(
        *outputs(head, (128, 128), logit=0.0),
        batch_img_metas=[dict(batch_input_shape=(128, 128))])
    assert len(found) > 100
