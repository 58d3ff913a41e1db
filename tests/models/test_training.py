"""Training learns: on one fixed batch the loss falls."""
import numpy as np
import pytest
import torch
from helpers.models import batch, new_model
from helpers.tiny_data import D0, LITE0
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

DATA = batch((64, 64), (48, 64), num_classes=2)


def losses_of_training(config_file, lr, steps=24):
    """(loss_cls, loss_bbox) of each step of an overfit to two images."""
    torch.manual_seed(0)
    config = Config.fromfile(config_file)
    config.optim_wrapper.optimizer.lr = lr
    model = new_model(config)
    optim = build_optim_wrapper(model, config.optim_wrapper)
    losses = []
    for _ in range(steps):
        log = model.train_step(DATA, optim)
        assert set(log) == {'loss', 'loss_cls', 'loss_bbox'}
        losses.append([log['loss_cls'].item(), log['loss_bbox'].item()])
    assert np.isfinite(losses).all()
    return np.array(losses)


def fall(losses):
    """Mean of the last five losses over the mean of the first five."""
    return losses[-5:].mean() / losses[:5].mean()


@pytest.mark.parametrize('config_file', [
    pytest.param(D0, id='d0', marks=pytest.mark.slow),
    pytest.param(LITE0, id='lite0'),
])
def test_loss_falls(config_file):
    """Without pretrained weights, 24 steps take off a fifth of the loss.

    Boxes are learned first, classes by little.
    """
    losses = losses_of_training(config_file, lr=0.05)
    assert fall(losses) < 0.8
    assert fall(losses[:, 0]) < 0.97
    assert fall(losses[:, 1]) < 0.5


def test_loss_stays_without_learning():
    """The fall above is learning, and no drift of norms or random numbers."""
    assert 0.95 < fall(losses_of_training(LITE0, 0.0, 10)) < 1.05


def test_first_step():
    """At the start every class has 1 %, and every parameter learns."""
    model = new_model(Config.fromfile(LITE0))
    data = model.data_preprocessor(DATA, training=True)
    with torch.no_grad():
        cls_scores, _ = model(data['inputs'], mode='tensor')
    for scores in cls_scores:
        assert abs(scores.sigmoid().mean() - 0.01) < 0.002
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
