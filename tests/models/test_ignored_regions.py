"""Ignored regions are background, or cost nothing."""
import pytest
import torch
from helpers.broken_data import build_model, lines, write_broken
from helpers.tiny_data import CROWD
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.structures import InstanceData

from mmdet_efficientdet import EfficientDetHead

BOXES = [[20., 20, 56, 52], [80, 80, 112, 112]]
REGIONS = [[41.3, 20.7, 128, 128], [0, 80.9, 60.1, 128]]


def inside(anchor, threshold):
    """Whether more than this share of an anchor is in one of the regions."""
    x1, y1, x2, y2 = anchor
    shares = [
        max(0,
            min(x2, right) - max(x1, left)) *
        max(0,
            min(y2, bottom) - max(y1, top)) / ((x2 - x1) * (y2 - y1))
        for left, top, right, bottom in REGIONS
    ]
    return max(shares) > threshold


def losses_and_gradient(threshold, regions, logits, deltas):
    """Of two images, the first of which has boxes and the regions."""
    head = EfficientDetHead(2, 8, num_levels=1, ignore_iof_thr=threshold)
    logits = logits.clone().requires_grad_()
    truth = [
        InstanceData(bboxes=torch.tensor(BOXES), labels=torch.tensor([1, 1])),
        InstanceData(
            bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    ]
    metas = [dict(batch_input_shape=(128, 128))] * 2
    losses = head.loss_by_feat([logits], [deltas], truth, metas, regions)
    gradient, = torch.autograd.grad(losses['loss_cls'], logits)
    # (2, 9 * 2, 16, 16) to (2, A, 2), in the order of the anchors
    return losses, gradient.permute(0, 2, 3, 1).reshape(2, -1, 2), head


@pytest.mark.parametrize('threshold', [0.25, 0.5, 0.9])
def test_background_in_regions_costs_nothing(threshold):
    """The gradient vanishes there, and is the same everywhere else."""
    logits, deltas = torch.randn(2, 18, 16, 16), torch.randn(2, 36, 16, 16)
    regions = [InstanceData(bboxes=torch.tensor(REGIONS)), None]
    off, before, head = losses_and_gradient(None, regions, logits, deltas)
    on, after, _ = losses_and_gradient(threshold, regions, logits, deltas)
    anchors, = head.prior_generator.grid_priors([(16, 16)], (128, 128))
    covered = torch.tensor([inside(a, threshold) for a in anchors.tolist()])
    # Only the class of a box has a falling loss where its anchors are.
    positive = before[0, :, 1] < 0
    assert covered.any() and (covered & positive).any()
    dropped = covered & ~positive
    assert (after[0, dropped] == 0).all()
    assert torch.equal(after[0, ~dropped], before[0, ~dropped])
    assert torch.equal(after[1], before[1])
    assert on['loss_cls'] < off['loss_cls']
    assert on['loss_bbox'] == off['loss_bbox']


@pytest.mark.parametrize('regions', [
    None, [None, None], [InstanceData(bboxes=torch.zeros(0, 4)), None]
])  # yapf: disable
def test_no_regions(regions):
    logits, deltas = torch.randn(2, 18, 16, 16), torch.randn(2, 36, 16, 16)
    off, _, _ = losses_and_gradient(None, None, logits, deltas)
    on, _, _ = losses_and_gradient(0.5, regions, logits, deltas)
    assert on == off


def test_crowd_of_a_file(tmp_path):
    """It goes through dataset, transforms and preprocessor."""
    config = Config.fromfile(write_broken(tmp_path, lines('')))
    config.val_dataloader.dataset.test_mode = False
    dataset = DATASETS.build(config.val_dataloader.dataset)
    model = build_model(config).train()
    items = [dataset[0], dataset[CROWD[0]]]
    data = model.data_preprocessor(pseudo_collate(items), True)
    assert len(data['data_samples'][1].ignored_instances) == 1
    with torch.no_grad():
        off = model(**data, mode='loss')
        model.bbox_head.ignore_iof_thr = 0.5
        try:
            on = model(**data, mode='loss')
        finally:
            model.bbox_head.ignore_iof_thr = None  # other tests share it
    assert 0 < on['loss_cls'] < off['loss_cls']
