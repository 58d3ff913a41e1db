"""The tools that compare with effdet find us equal, and find what is not."""
import math
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import verify_detections
import verify_parity
from effdet_bridge import effdet_network, our_network, random_weights
from verify_parity import BOUND, PARTS, SIDES, compare, verify

from mmdet_efficientdet.models.bifpn import FusionNode
from mmdet_efficientdet.weights.layouts import LAYOUTS
from mmdet_efficientdet.weights.matching import match

BRIDGE = Path(verify_parity.__file__).with_name('effdet_bridge.py')


def build_both(size, sides, **settings):
    """effdet's network, and ours with its weights."""
    weights = random_weights(size, **settings)
    theirs = effdet_network(size, sides, **settings)
    theirs.load_state_dict(weights, assign=True)
    return theirs, our_network(weights, size, settings.get('num_classes', 90))


@pytest.mark.slow
@pytest.mark.parametrize('size', ['d0', 'd7x'])
def test_equal(size):
    """Every part at all sides, and the weights of every source.

    :func:`test_table` does the same with lite0.
    """
    outputs, sources = verify([size])
    assert [sides for _, sides, _ in outputs] == list(SIDES)
    for _, sides, parts in outputs:
        assert list(parts) == list(PARTS)
        assert max(parts.values()) < BOUND, sides
    assert [layout for _, layout, _ in sources] == list(LAYOUTS)
    assert not any(difference for _, _, difference in sources)


@pytest.mark.parametrize('settings', [
    pytest.param(dict(head_bn_level_first=True), marks=pytest.mark.slow),
    pytest.param(dict(redundant_bias=False), marks=pytest.mark.slow),
    dict(head_bn_level_first=True, redundant_bias=False, num_classes=3)
])
def test_variants_of_effdet(settings):
    """Both orders of the heads' norms, and no biases in front of norms."""
    sides = (192, 258)
    theirs, ours = build_both('d0', sides, **settings)
    parts = compare(theirs, ours, torch.randn(2, 3, *sides))
    assert max(parts.values()) < BOUND


@pytest.mark.slow
def test_softmax_fusion():
    """effdet's 'attn'; the sizes above have the other two fusions."""
    sides = (192, 258)
    theirs, ours = build_both('d0', sides, fpn_name='bifpn_attn')
    image = torch.randn(2, 3, *sides)
    assert compare(theirs, ours, image)['neck'] > BOUND
    for module in ours.modules():
        if isinstance(module, FusionNode):
            module.fusion = 'softmax'
    assert max(compare(theirs, ours, image).values()) < BOUND


@pytest.mark.parametrize('key, part', [
    ('backbone.stem.bn.running_mean', 'backbone'),
    ('backbone.blocks.0.depthwise_conv.bn.running_var', 'backbone'),
    ('backbone.blocks.5.se.conv1.conv.bias', 'backbone'),
    ('neck.extra_levels.0.conv.bias', 'neck'),
    ('neck.layers.0.nodes.4.resamples.0.norm.weight', 'neck'),
    ('neck.layers.1.nodes.5.fusion_weights', 'neck'),
    ('neck.layers.2.nodes.7.norm.bias', 'neck'),
    ('bbox_head.cls_convs.1.depthwise.weight', 'classes'),
    ('bbox_head.cls_norms.2.4.running_mean', 'classes'),
    ('bbox_head.conv_cls.pointwise.bias', 'classes'),
    ('bbox_head.reg_norms.0.3.weight', 'boxes'),
    ('bbox_head.conv_reg.depthwise.weight', 'boxes'),
])
def test_every_tensor_counts(both, key, part):
    """Up to 2 % off in one tensor are found, and in the right part."""
    theirs, ours, image = both
    tensor = ours.state_dict()[key]
    before = tensor.clone()
    tensor *= torch.linspace(1, 1.02, tensor.numel()).view_as(tensor)
    parts = compare(theirs, ours, image)
    tensor.copy_(before)
    at = PARTS.index(part)
    # The heads do not see each other.
    before = PARTS[:2] if at > 2 else PARTS[:at]
    assert parts[part] > 2 * BOUND
    assert all(parts[name] < BOUND for name in before)


@pytest.fixture(scope='module')
def both():
    """Both networks of D0, and an image."""
    verify_parity.register_all_modules()
    image = torch.randn(1, 3, 160, 192, generator=torch.manual_seed(0))
    return *build_both('d0', image.shape[-2:]), image


def run(monkeypatch, tool, *args):
    monkeypatch.setattr(sys, 'argv', [tool.__file__, *args])
    tool.main()


@pytest.mark.slow
def test_table(monkeypatch, capsys):
    """One row for each case, one for each source, and the exit status."""
    run(monkeypatch, verify_parity, '--size', 'lite0')
    rows = capsys.readouterr().out.splitlines()
    cases = [row for row in rows if row.startswith('| lite0 ')]
    assert [row.split(' | ')[1].strip() for row in cases
            ] == [f'{height}x{width}' for height, width in SIDES]
    assert sum('| equal ' in row for row in rows) == len(SIDES) + len(LAYOUTS)
    for layout in LAYOUTS:
        assert any(row.startswith(f'| {layout.title} ') for row in rows)


@pytest.mark.slow
def test_difference_fails(monkeypatch, capsys):
    """What is wrong in the neck is DIFFERENT there, and fails."""
    monkeypatch.setattr(FusionNode, 'eps', 0.0)
    monkeypatch.setattr(verify_parity, 'SIDES', SIDES[:1])
    with pytest.raises(SystemExit, match='not everything is equal'):
        run(monkeypatch, verify_parity, '--size', 'd0')
    output = capsys.readouterr().out
    assert output.count('DIFFERENT') == 1
    assert output.count('| equal ') == len(LAYOUTS)


def test_nan_is_different():
    """Also where it is not in the first level."""
    ones = torch.ones(2)
    assert verify_parity.difference([ones, ones * math.nan],
                                    [ones, ones]) == math.inf
    assert verify_parity.difference([ones, ones], [ones, ones]) == 0


def test_bad_use(monkeypatch, capsys):
    """An unknown size, no effdet, and a missing picture are said."""
    with pytest.raises(SystemExit):
        run(monkeypatch, verify_parity, '--size', 'd9')
    assert "'d9'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(monkeypatch, verify_detections, 'none.jpg')
    assert 'none.jpg does not exist' in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, 'effdet', None)
    with pytest.raises(SystemExit, match=r'pip install effdet==0\.4\.1'):
        runpy.run_path(str(BRIDGE))


@pytest.fixture
def picture(tmp_path):
    """Noise of several scales, larger than the input and oblong."""
    generator = np.random.default_rng(0)
    image = sum(
        cv2.resize(
            generator.uniform(0, 85, (n, n, 3)), (500, 420),
            interpolation=cv2.INTER_CUBIC) for n in (5, 20, 80))
    path = tmp_path / 'noise.png'
    cv2.imwrite(str(path), image.clip(0, 255).astype(np.uint8))
    return str(path)


@pytest.mark.slow
def test_detections(picture):
    """The same 100 detections from effdet's bench and from MMDetection."""
    steps = verify_detections.compare('lite0', picture)
    first, *others = steps.values()
    assert verify_detections.is_equal(first)
    # Each thing that effdet does in its own way shows.
    assert not any(map(verify_detections.is_equal, others))
    clipped, _, ours_soft, both_soft, _ = others
    assert min(clipped['found'], ours_soft['found']) > 50
    assert both_soft['found'] > 90


@pytest.mark.slow
def test_gradients():
    """Gradients of a training step, in float64, reach the same tensors."""
    theirs, ours = build_both('d0', (128, 256), num_classes=3)
    for block in ours.backbone.blocks:
        assert isinstance(block.drop_path, torch.nn.Identity)
    for module in theirs.backbone.modules():
        if hasattr(module, 'drop_path_rate'):
            module.drop_path_rate = 0.0
        if hasattr(module, 'drop_path'):
            module.drop_path = torch.nn.Identity()
    theirs.double().train()
    ours.double().train()
    image = torch.randn(2, 3, 128, 256, dtype=torch.double)
    sums = []
    for network in (theirs, lambda x: ours(x, mode='tensor')):
        torch.manual_seed(1)
        cls, box = network(image)
        if network is theirs:
            box = map(verify_parity.swap_xy, box)
        sums.append(
            sum((x *
                 torch.randn_like(x, memory_format=torch.contiguous_format)
                 ).sum() for x in [*cls, *box]))
    torch.testing.assert_close(*sums, rtol=1e-9, atol=0)
    for total in sums:
        total.backward()
    got = {key: value.grad for key, value in ours.named_parameters()}
    gradients = {k: p.grad for k, p in theirs.named_parameters()}
    shapes = {key: grad.shape for key, grad in got.items()}
    expected = match(gradients, shapes, 'b0', 5).state_dict()
    scale = max(grad.abs().max() for grad in expected.values())
    for key, value in got.items():
        assert (value - expected[key]).abs().max() < 1e-6 * scale, key
    # The norms have counted the batch alike, too.
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    state = match(theirs.state_dict(), shapes, 'b0', 5).state_dict()
    for key, buffer in ours.named_buffers():
        if key.endswith('running_mean') and not key.startswith('backbone'):
            torch.testing.assert_close(buffer.float(), state[key], msg=key)
