"""Half precision where it is fast, single precision where it is needed."""
import copy
from contextlib import nullcontext

import pytest
import torch
from helpers.models import batch
from helpers.tiny_data import D0
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmdet_efficientdet.models.bifpn import FusionNode

SIDE = 64
HALVES = [torch.bfloat16, torch.float16]
DATA = batch((SIDE, SIDE), (48, SIDE), num_classes=2)


def autocast(dtype):
    """The host's context of half precision; none for None."""
    return torch.autocast(
        'cpu', dtype or torch.bfloat16, enabled=dtype is not None)


def fusion_sums(model):
    """A list that fills with what the fusion nodes hand to activations."""
    sums = []
    for module in model.modules():
        if isinstance(module, FusionNode):
            module.act.register_forward_pre_hook(
                lambda _, args: sums.append(args[0].detach().clone()))
    return sums


@pytest.mark.parametrize('dtype', HALVES)
@pytest.mark.parametrize('act', ['SiLU', 'ReLU6'])
@pytest.mark.parametrize('sign', [1, -1])
def test_fusion_beyond_half_precision(act, sign, dtype):
    """Three maps of 40,000 are above the 65,504 that float16 ends with.

    An infinite sum would become NaN in a SiLU of -inf, and behind a norm.
    What a SiLU lets pass does not fit float16 either, as the docs say.
    """
    node = FusionNode([2] * 3, 2, 'sum', dict(type='BN'), dict(type=act))
    nn.init.constant_(node.conv.depthwise.weight, 1e-3)
    sums = fusion_sums(node.eval())
    maps = [torch.full((1, 2, 4, 4), sign * 4e4).to(dtype)] * 3
    with autocast(dtype):
        out = node(maps, (4, 4))
    assert (sums[0] == 3 * maps[0].float()).all()
    assert out.dtype == dtype
    too_large = dtype == torch.float16 and act == 'SiLU' and sign > 0
    assert out.isfinite().all() == (not too_large)


@pytest.mark.parametrize('dtype', HALVES)
def test_fusion_weights_keep_their_digits(dtype):
    """A third is 0.334 in bfloat16; fused maps of 1 must stay 1 - 1e-4 / 3."""
    node = FusionNode([2] * 3, 2, 'fast_normalized', None, dict(type='SiLU'))
    sums = fusion_sums(node)
    with autocast(dtype):
        out = node([torch.ones(1, 2, 4, 4, dtype=dtype)] * 3, (4, 4))
    assert out.dtype == dtype
    assert sums[0].mean().item() == pytest.approx(1 - 1e-4 / 3, abs=1e-6)
    # Without autocast, in a model of half precision, types match likewise.
    assert node.to(dtype)([torch.ones(1, 2, 4, 4, dtype=dtype)] * 3,
                          (4, 4)).dtype == dtype


@pytest.fixture(scope='module')
def detector():
    """D0 of two classes whose norms do not train, so that steps compare."""
    register_all_modules()
    config = Config.fromfile(D0)
    config.model.data_preprocessor.pad_size_divisor = SIDE
    config.model.backbone.init_cfg = None
    config.model.bbox_head.num_classes = 2
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    return model.eval()


def step(model, dtype):
    """Losses and gradients of one step."""
    data = model.data_preprocessor(copy.deepcopy(DATA), training=True)
    model.zero_grad()
    with autocast(dtype):
        losses = model(**data, mode='loss')
    sum(losses.values()).backward()
    return losses, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize('dtype', HALVES)
def test_training(detector, dtype):
    """Losses are single precision and close, gradients finite and close."""
    expected, gradients = step(detector, None)
    losses, others = step(detector, dtype)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected[name].item(), rel=2e-3)
    assert all(grad.isfinite().all() for grad in others)
    a, b = (
        torch.cat([grad.flatten() for grad in grads])
        for grads in (gradients, others))
    assert torch.cosine_similarity(a, b, 0) > 0.999
    # It is no comparison of float32 with itself.
    assert not torch.equal(a, b)


def test_checkpointing_recomputes_in_half_precision(detector):
    """The second forward pass has the precision of the first.

    Gradients of the kernels that levels share are added up in float32 then,
    and otherwise in half precision, so that they differ by a rounding.
    """
    expected, gradients = step(detector, torch.float16)
    saving = copy.deepcopy(detector)
    for part in (saving.backbone, saving.neck, saving.bbox_head):
        part.with_cp = part.training = True  # but not their norms
    losses, others = step(saving, torch.float16)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=1e-4)
    a, b = (
        torch.cat([grad.flatten() for grad in grads])
        for grads in (gradients, others))
    assert (a - b).norm() < 2e-3 * a.norm()


@pytest.mark.parametrize('dtype', HALVES)
def test_predictions(detector, dtype):
    """Boxes and scores are finite, in single precision, and of the image."""
    data = detector.data_preprocessor(copy.deepcopy(DATA), training=False)
    with torch.no_grad(), autocast(dtype):
        results = detector(**data, mode='predict')
    for result in results:
        found = result.pred_instances
        assert found.bboxes.dtype == found.scores.dtype == torch.float32
        assert len(found) and found.bboxes.isfinite().all()
        assert found.scores.tolist() == sorted(found.scores.tolist())[::-1]


@pytest.mark.slow
def test_d6_with_tenfold_inputs(build_detector):
    """Nothing overflows in D6, whose 64 fusions of a layer have no weights."""
    model = build_detector('d6', num_classes=1)
    model.init_weights()
    sums = fusion_sums(model)
    inputs = 10 * torch.randn(2, 3, 64, 128)
    for training in (False, True):
        sums.clear()
        with torch.no_grad(), autocast(torch.float16):
            outs = model.train(training)(inputs)
        assert len(sums) == 8 * 8
        assert {x.dtype for x in sums} == {torch.float32}
        for x in (*sums, *outs[0], *outs[1]):
            assert x.isfinite().all()


def test_amp_option(detector):
    """What train.py --amp makes of our config trains.

    mmengine's wrapper needs a GPU. Without one, its context is put around the
    step of the usual wrapper.
    """
    wrapper = Config.fromfile(D0).optim_wrapper
    model = copy.deepcopy(detector).train()
    half, context = torch.bfloat16, autocast(torch.bfloat16)
    if torch.cuda.is_available():
        wrapper.update(type='AmpOptimWrapper', loss_scale='dynamic')
        model.cuda()
        half, context = torch.float16, nullcontext()
    optim = build_optim_wrapper(model, wrapper)
    sums = fusion_sums(model)
    dtypes = []
    model.bbox_head.conv_cls.register_forward_hook(
        lambda module, args, out: dtypes.append(out.dtype))
    before = copy.deepcopy(model.state_dict())
    with context:
        losses = model.train_step(copy.deepcopy(DATA), optim)
    assert set(dtypes) == {half}
    assert {x.dtype for x in sums} == {torch.float32}
    assert all(loss.isfinite() for loss in losses.values())
    for key, parameter in model.named_parameters():
        if parameter.ndim == 4:
            assert not torch.equal(before[key], parameter), key
