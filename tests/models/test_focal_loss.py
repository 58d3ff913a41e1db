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
], ids=['mean', 'none', 'one_hot', 'elements'])  # yapf: disable
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


def test_learned_weights():
    """They get MMDetection's gradient."""
    grads = []
    logits, target = torch.randn(5, 7), torch.tensor([0, 1, 7, 2, 6])
    for kind in (FocalLoss, mmdet.models.losses.FocalLoss):
        weight = torch.ones(5, requires_grad=True)
        kind(**KWARGS)(logits, target, weight, avg_factor=4.0).backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize('target', [-1, 9])
def test_targets_of_no_class(target):
    """The message has the target and the range."""
    with pytest.raises(ValueError, match=rf'{target} .* 0 to 7'):
        FocalLoss(**KWARGS)(
            torch.randn(1, 7), torch.tensor([target]), avg_factor=1.0)


@pytest.mark.parametrize(
    'weight', [None, torch.rand(0)], ids=['none', 'weights'])
def test_no_anchors(weight):
    """The loss is zero and has a gradient."""
    logits = torch.randn(0, 7, requires_grad=True)
    loss = FocalLoss(**KWARGS)(
        logits, torch.zeros(0, dtype=torch.long), weight, avg_factor=1.0)
    loss.backward()
    assert loss == 0 and logits.grad.shape == logits.shape
