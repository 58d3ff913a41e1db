"""The focal loss against MMDetection's."""
import mmdet.models.losses
import pytest
import torch

from mmdet_efficientdet.models import FocalLoss

KWARGS = dict(use_sigmoid=True, gamma=1.5, alpha=0.25, loss_weight=3.0)


@pytest.mark.parametrize('gamma', [1.5, 2.0])
@pytest.mark.parametrize('weighted', [False, True])
def test_equal_to_the_host(weighted, gamma):
    """Loss and gradient, with large logits, background and weights."""
    logits = torch.randn(200, 7, dtype=torch.double) * 20
    target = torch.randint(8, (200, ))  # 7 is the background
    weight = torch.rand(200, dtype=torch.double) if weighted else None
    found = []
    for kind in (FocalLoss, mmdet.models.losses.FocalLoss):
        x = logits.clone().requires_grad_()
        loss = kind(**dict(KWARGS, gamma=gamma))(
            x, target, weight, avg_factor=torch.tensor(6.0))
        (2 * loss).backward()
        found.append((loss, x.grad))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize('kwargs', [
    dict(),
    dict(reduction_override='none'),
    dict(avg_factor=4.0, target=torch.eye(3)),
    dict(avg_factor=4.0, weight=torch.rand(3, 3)),
], ids=str)  # yapf: disable
def test_other_calls(kwargs):
    """What the class does not compute itself is MMDetection's, too."""
    kwargs = {'target': torch.tensor([0, 2, 3]), **kwargs}
    logits = torch.randn(3, 3)
    found, expected = (
        kind(**KWARGS)(logits, **kwargs)
        for kind in (FocalLoss, mmdet.models.losses.FocalLoss))
    torch.testing.assert_close(found, expected)


def test_memory():
    """Of tensors as large as the logits, only the gradient is kept."""
    logits = torch.randn(500, 80, requires_grad=True)
    kept = []

    def pack(x):
        kept.append(x.numel() * (x.numel() >= logits.numel()))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        FocalLoss(**KWARGS)(
            logits, torch.randint(81, (500, )), avg_factor=torch.tensor(3.0))
    assert sum(kept) == logits.numel()
