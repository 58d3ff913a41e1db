"""with_cp=True saves memory and changes nothing else."""
import copy

import pytest
import torch
from helpers.models import batch
from helpers.tiny_data import D0
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmdet_efficientdet.models.bifpn import BiFPN
from mmdet_efficientdet.models.efficientdet_head import EfficientDetHead
from mmdet_efficientdet.utils import config_file

PARTS = ('backbone', 'neck', 'bbox_head')
SIDE = 64


def small_config(size):
    """D0 with drop-connect, or D7x's graph (sum, six levels) made small."""
    config = Config.fromfile(config_file(size))
    init_default_scope('mmdet')
    model = config.model
    model.data_preprocessor.pad_size_divisor = SIDE
    model.backbone.update(init_cfg=None, drop_path_rate=0.5)
    model.bbox_head.num_classes = 2
    if size == 'd7x':
        model.backbone.arch = 'b0'
        model.neck.update(
            in_channels=[40, 112, 320], out_channels=24, stack_times=2)
        model.bbox_head.update(in_channels=24, stacked_convs=2)
        assert model.neck.fusion == 'sum' and model.neck.num_outs == 6
    return model


def step(model, data):
    """One forward and backward pass.

    Returns:
        tuple: Losses, gradients and buffers, each a dict; the bytes that the
        forward pass kept; and how many convolutions ran in all.
    """
    kept, calls = [], []
    data = model.data_preprocessor(copy.deepcopy(data), training=True)
    hooks = [
        module.register_forward_pre_hook(lambda *_: calls.append(1))
        for module in model.modules() if isinstance(module, torch.nn.Conv2d)
    ]
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.append(x.nbytes * (not x.is_leaf)) or x,
            lambda x: x):
        losses = model(**data, mode='loss')
    sum(losses.values()).backward()
    for hook in hooks:
        hook.remove()
    gradients = {key: p.grad for key, p in model.named_parameters()}
    return (losses, gradients, dict(model.named_buffers())), sum(kept), calls


@pytest.fixture(scope='module', params=['d0', 'd7x'])
def steps(request):
    """The same step without checkpointing, with it, and in each part alone."""
    torch.manual_seed(0)
    config = small_config(request.param)
    plain = MODELS.build(copy.deepcopy(config))
    plain.init_weights()
    data = batch((SIDE, SIDE), (48, SIDE), num_classes=2)
    results = dict(plain=step(copy.deepcopy(plain).train(), data))
    for name in ('all', *PARTS):
        changed = copy.deepcopy(config)
        if name == 'all':
            changed.with_cp = True
        else:
            changed[name].with_cp = True
        model = MODELS.build(changed)
        model.load_state_dict(plain.state_dict())
        results[name] = step(model.train(), data)
    return results


@pytest.mark.parametrize('name', ['all', *PARTS])
def test_equal_to_the_last_bit(steps, name):
    """Losses, gradients, statistics and their counts are those without."""
    for expected, given in zip(steps['plain'][0], steps[name][0]):
        assert list(expected) == list(given)
        for key, value in expected.items():
            assert torch.equal(value, given[key]), key
    buffers = steps[name][0][2]
    counts = [v for k, v in buffers.items() if 'num_batches_tracked' in k]
    assert len(counts) > 50 and set(map(int, counts)) == {1}


def test_every_part_keeps_less(steps):
    """Each part saves memory by itself; the switch does what they all do."""
    kept = {name: result[1] for name, result in steps.items()}
    saved = {name: 1 - kept[name] / kept['plain'] for name in kept}
    assert saved['backbone'] > 0.7
    assert saved['neck'] > 0.01
    assert saved['bbox_head'] > 0.01
    assert saved['all'] == pytest.approx(sum(saved[part] for part in PARTS))
    assert saved['all'] > 0.9


def test_everything_but_the_stem_runs_twice(steps):
    """And the projections of the neck's extra levels."""
    calls = {name: len(result[2]) for name, result in steps.items()}
    assert calls['all'] == 2 * calls['plain'] - 2


def test_parts_alone():
    """Neck and head recompute when they train, and not otherwise."""
    neck = BiFPN([4, 8], 8, 3, with_cp=True)
    head = EfficientDetHead(2, 8, num_levels=3, with_cp=True)
    for training in (True, False):
        calls = []
        hooks = [
            module.register_forward_pre_hook(
                lambda *_, calls=calls: calls.append(1))
            for module in (neck.layers[0].nodes[0], head.conv_reg)
        ]
        neck.train(training)
        head.train(training)
        feats = neck([torch.randn(2, 4, 8, 8), torch.randn(2, 8, 4, 4)])
        outs = head(feats)
        first = len(calls)
        sum(x.sum() for maps in outs for x in maps).backward()
        assert first == 1 + 3
        assert len(calls) == first * (1 + training)
        for hook in hooks:
            hook.remove()


@pytest.mark.slow
def test_compiled():
    """A compiled model checkpoints, too, with the same loss."""
    config = small_config('d0')
    config.update(with_cp=True)
    config.backbone.drop_path_rate = 0
    torch.manual_seed(0)
    model = MODELS.build(config)
    model.init_weights()
    model.train()
    inputs = model.data_preprocessor(
        batch((SIDE, SIDE), (48, SIDE), num_classes=2),
        training=True)['inputs']

    def total(extract):
        model.zero_grad()
        outs = model.bbox_head(extract(inputs))
        loss = sum(x.square().mean() for maps in outs for x in maps)
        loss.backward()
        return loss.item(), model.backbone.stem.conv.weight.grad.norm().item()

    compiled = torch.compile(model.extract_feat, backend='eager')
    assert total(compiled) == pytest.approx(total(model.extract_feat))


def test_off_by_default():
    """No shipped config pays time for memory that was not asked for."""
    model = MODELS.build(small_config('d0'))
    assert not any(getattr(model, part).with_cp for part in PARTS)
    assert 'with_cp' not in D0.read_text()
