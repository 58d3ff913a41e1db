"""Folding biases and batch norms of a trained network leaves its outputs."""
from copy import deepcopy

import pytest
import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

SIZE = (128, 192)


@pytest.fixture(params=['d0', 'lite0'])
def network(build_detector, request):
    """A detector in evaluation mode, with nothing trivial in it."""
    model = build_detector(request.param, 7).eval()
    for key, value in model.state_dict().items():
        if key.endswith('running_var'):
            value.uniform_(0.5, 1.5)
        elif key.endswith(('bias', 'running_mean')):
            value.normal_(0, 0.3)
        elif value.dim() == 1 and key.endswith('weight'):
            value.uniform_(0.5, 1.5)
    return model


@torch.no_grad()
def outputs(model):
    """All that the network returns for one fixed image."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 3, *SIZE, generator=generator)
    cls_scores, bbox_preds = model(image, mode='tensor')
    return [*cls_scores, *bbox_preds]


def assert_unchanged(model, expected):
    for a, b in zip(outputs(model), expected, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


def redundant_biases(model):
    """Each convolution whose bias stands before norms, and these norms."""
    for module in model.neck.modules():
        norm = getattr(module, 'norm', None)
        if isinstance(norm, _BatchNorm):
            conv = module.conv
            yield getattr(conv, 'pointwise', conv), [norm]
    head = model.bbox_head
    for convs, norms in ((head.cls_convs, head.cls_norms), (head.reg_convs,
                                                            head.reg_norms)):
        yield from ((conv.pointwise, level_norms)
                    for conv, level_norms in zip(convs, norms))


def test_folding_redundant_biases(network):
    """Each norm's mean takes the bias of the convolution before it."""
    expected = outputs(network)
    biases = 0
    for conv, norms in redundant_biases(network):
        for norm in norms:
            norm.running_mean -= conv.bias.detach()
        conv.bias = None
        biases += 1
    # Of neck and head, only the depthwise kernels had none, and only the two
    # predictors keep one. Three layers of eight nodes, five of which project
    # an input, a sixth level, and two nets of three.
    assert biases == 3 * 8 + 5 + 1 + 2 * 3
    left = [
        key for key, value in network.named_modules()
        if isinstance(value, nn.Conv2d) and value.bias is not None
    ]
    assert [key for key in left if not key.startswith('backbone')] == [
        'bbox_head.conv_cls.pointwise', 'bbox_head.conv_reg.pointwise'
    ]
    assert_unchanged(network, expected)


def test_stock_fusion_of_batch_norms(network):
    """mmcv's fuse_conv_bn takes all norms of backbone and projections.

    Those after shared convolutions it has to leave.
    """
    expected = outputs(network)
    fused = fuse_conv_bn(network)
    left = {
        key.split('.')[0]
        for key, module in fused.named_modules()
        if isinstance(module, _BatchNorm)
    }
    assert left == {'neck', 'bbox_head'}
    norms = [m for m in fused.neck.modules() if isinstance(m, _BatchNorm)]
    assert len(norms) == 3 * 8
    norms = [m for m in fused.bbox_head.modules() if isinstance(m, _BatchNorm)]
    assert len(norms) == 2 * 3 * 5
    assert_unchanged(fused, expected)


@torch.no_grad()
def test_folding_all_batch_norms(network):
    """Without any norm, which takes a copy of the head for each level."""
    image = torch.randn(1, 3, *SIZE)
    expected = network(image, mode='tensor')
    fused = fuse_conv_bn(deepcopy(network))
    for layer in fused.neck.layers:
        for node in layer.nodes:
            node.conv.pointwise = fuse_conv_bn_eval(node.conv.pointwise,
                                                    node.norm)
            node.norm = nn.Identity()
    for level, feat in enumerate(fused.extract_feat(image)):
        head = deepcopy(fused.bbox_head)
        head.num_levels = 1
        for convs, norms in ((head.cls_convs, head.cls_norms),
                             (head.reg_convs, head.reg_norms)):
            for conv, level_norms in zip(convs, norms):
                conv.pointwise = fuse_conv_bn_eval(conv.pointwise,
                                                   level_norms[level])
                level_norms[0] = nn.Identity()
        for got, maps in zip(head([feat]), expected):
            difference = (got[0] - maps[level]).abs().max()
            assert difference < 1e-5 * maps[level].abs().max()
