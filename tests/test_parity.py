"""The whole network against effdet's, with the same random weights."""
import effdet_reference as reference
import pytest
import torch
from effdet.anchors import Anchors, generate_detections
from effdet.bench import _post_process

from mmdet_efficientdet.scaling import SCALING

CASES = [
    ('d0', (384, 256)),
    ('d0', (512, 512)),
    ('d1', (320, 448)),
    ('d1', (257, 193)),
    ('d6', (384, 256)),
    ('d7x', (384, 256)),
    ('lite0', (320, 320)),
    ('lite0', (193, 321)),
]


def build_both(build_detector, name, size, num_classes=90):
    """effdet's network, and ours with its weights."""
    theirs = reference.build(name, size, num_classes)
    state_dict = reference.convert(theirs.state_dict(), SCALING[name].backbone)
    # Straight from the meta device: drawing weights takes most of the time.
    ours = build_detector(name, num_classes, 'meta').eval()
    ours.load_state_dict({
        k: v.clone()
        for k, v in state_dict.items()
    },
                         assign=True)
    assert not any(v.is_meta for v in ours.state_dict().values())
    return theirs, ours


def assert_close(maps, expected):
    """Equal shapes, and differences below 1e-5 of the largest value."""
    assert len(maps) == len(expected)
    for a, b in zip(maps, expected):
        assert a.shape == b.shape
        assert b.std() > 0
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


def to_xy(maps):
    """Box maps of (ty, tx, th, tw) as (dx, dy, dw, dh)."""
    return [
        x.unflatten(1, (9, 4))[:, :, [1, 0, 3, 2]].flatten(1, 2) for x in maps
    ]


@pytest.mark.parametrize('name, size', CASES)
@torch.no_grad()
def test_outputs_equal_effdet(build_detector, name, size):
    """Backbone, neck, classes and boxes, at even, odd and oblong sizes."""
    theirs, ours = build_both(build_detector, name, size)
    image = torch.randn(1, 3, *size)
    levels = theirs.backbone(image)
    assert_close(ours.backbone(image), levels)
    feats = theirs.fpn([x.clone() for x in levels])
    assert_close(ours.extract_feat(image), feats)
    cls_scores, bbox_preds = ours(image, mode='tensor')
    assert_close(cls_scores, theirs.class_net(feats))
    assert_close(bbox_preds, to_xy(theirs.box_net(feats)))


@torch.no_grad()
def test_detections_equal_effdet(build_detector):
    """The same outputs give the same boxes, with hard suppression."""
    size = (256, 384)
    theirs, ours = build_both(build_detector, 'd0', size, num_classes=20)
    cls_scores, bbox_preds = theirs(torch.randn(2, 3, *size))
    results = ours.bbox_head.predict_by_feat(
        cls_scores,
        to_xy(bbox_preds),
        batch_img_metas=[dict(batch_input_shape=size)] * 2,
        cfg=dict(
            nms_pre=5000,
            nms=dict(type='nms', iou_threshold=0.5),
            max_per_img=100))
    cls, box, index, labels = _post_process(cls_scores, bbox_preds, 5, 20)
    anchors = Anchors.from_config(theirs.config).boxes
    for i, result in enumerate(results):
        expected = generate_detections(cls[i], box[i], anchors, index[i],
                                       labels[i], None, None)
        rows = torch.column_stack(
            [result.scores, result.labels + 1, result.bboxes])
        # Sorted again, since equal scores stand in any order.
        rows, expected = (
            torch.tensor(sorted(x.tolist()))
            for x in (rows, expected[:, [4, 5, 0, 1, 2, 3]]))
        assert len(rows) == 100
        torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-3)


def test_gradients_equal_effdet(build_detector):
    """Gradients of a training step, in float64, reach the same tensors."""
    size = (128, 256)
    theirs, ours = build_both(build_detector, 'd0', size, num_classes=3)
    for block in ours.backbone.blocks:
        assert isinstance(block.drop_path, torch.nn.Identity)
    for module in theirs.backbone.modules():
        if hasattr(module, 'drop_path_rate'):
            module.drop_path_rate = 0.0
        if hasattr(module, 'drop_path'):
            module.drop_path = torch.nn.Identity()
    theirs.double().train()
    ours.double().train()
    image = torch.randn(2, 3, *size, dtype=torch.double)
    torch.manual_seed(1)
    sums = []
    for cls, box in (theirs(image), ours(image, mode='tensor')):
        if sums:
            torch.manual_seed(1)
        else:
            box = to_xy(box)
        sums.append(
            sum((x *
                 torch.randn_like(x, memory_format=torch.contiguous_format)
                 ).sum() for x in [*cls, *box]))
    torch.testing.assert_close(*sums, rtol=1e-9, atol=0)
    for total in sums:
        total.backward()
    keys = dict(theirs.named_parameters())
    expected = reference.convert({k: p.grad for k, p in keys.items()}, 'b0')
    got = dict(ours.named_parameters())
    assert set(got) == set(expected)
    scale = max(grad.abs().max() for grad in expected.values())
    for key, parameter in got.items():
        difference = (parameter.grad - expected[key]).abs().max()
        assert difference < 1e-9 * scale, key
    state = reference.convert(theirs.state_dict(), 'b0')
    for key, buffer in ours.named_buffers():
        if key.endswith('running_mean') and not key.startswith('backbone'):
            torch.testing.assert_close(buffer, state[key], msg=key)
