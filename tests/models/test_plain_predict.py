"""Prediction by the plain network, and what makes it anew or turns it off."""
import copy

import numpy as np
import pytest
import torch
from effdet_bridge import our_network, random_weights
from helpers.models import batch

SIDE = 128


def two_images():
    torch.manual_seed(0)
    return batch((SIDE, SIDE), (SIDE, 100))


@pytest.fixture(scope='module')
def trained():
    """A detector whose every tensor shows in its boxes."""
    model = our_network(random_weights('d0'), 'd0', side=SIDE)
    head = model.bbox_head
    images = model.data_preprocessor(two_images())['inputs']
    with torch.no_grad():  # scores that differ, boxes near their anchors
        for predictor, maps, limit in zip((head.conv_cls, head.conv_reg),
                                          model(images, mode='tensor'),
                                          (8, 1)):
            largest = max(x.abs().max() for x in maps)
            for parameter in predictor.pointwise.parameters():
                parameter.mul_(limit / largest)
    return model


@pytest.fixture
def detector(trained):
    return copy.deepcopy(trained).eval()


@pytest.fixture(scope='module')
def data(trained):
    return trained.data_preprocessor(two_images())


@torch.no_grad()
def predict(detector, data, fast=True):
    """Boxes, scores and labels of all images."""
    detector.fast_predict = fast
    results = detector(**copy.deepcopy(data), mode='predict')
    return [{
        key: result.pred_instances[key].clone()
        for key in ('bboxes', 'scores', 'labels')
    } for result in results]


def rows(boxes):
    """Sorted by label and place: almost equal scores may change their order.
    """
    order = np.lexsort([*boxes['bboxes'].T, boxes['labels']])
    return {key: value[order] for key, value in boxes.items()}


def assert_near(found, expected):
    """The same labels, and boxes within what random weights make of rounding.
    """
    for a, b in zip(found, expected, strict=True):
        assert len(a['scores']) > 10
        torch.testing.assert_close(rows(a), rows(b), atol=1e-2, rtol=1e-3)


def test_same_boxes(detector, data):
    """The plain network runs, and finds what the detector finds."""
    expected = predict(detector, data, fast=False)
    calls = []
    detector.bbox_head.forward = lambda *args: calls.append(args)
    assert_near(predict(detector, data), expected)
    assert not calls


def in_place(detector):
    with torch.no_grad():
        detector.neck.layers[0].nodes[0].norm.weight.mul_(1.05)


def loaded(detector):
    weights = {k: v * 1.01 for k, v in detector.backbone.state_dict().items()}
    detector.backbone.load_state_dict(weights)


def assigned(detector):
    conv = detector.bbox_head.conv_cls.pointwise
    conv.bias = torch.nn.Parameter(conv.bias.detach() + 0.5)


def averaged(detector):
    """As mmengine's EMAHook, which swaps data before ``eval()``."""
    for parameter in detector.bbox_head.conv_reg.parameters():
        parameter.data.mul_(1.05)
    detector.eval()


def data_alone(detector):
    """Versions of tensors do not count this."""
    detector.bbox_head.conv_reg.pointwise.weight.data.mul_(1.05)


def one_row(detector):
    """The norm of the tensor, which is a large one, stays."""
    weight = detector.backbone.blocks[10].linear_conv.conv.weight
    assert weight.numel() > 2**15
    weight.data[5].neg_()


def short_rows(detector):
    """A depthwise kernel and a squeeze, whose rows are below the step."""
    for module in detector.backbone.modules():
        weight = getattr(module, 'weight', None)
        if weight is not None and weight.numel() > 2**12 and (
                weight[0].numel() < 61):
            weight.data[1] *= 100


def eps(detector):
    for module in detector.neck.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1.0


@pytest.mark.parametrize('change', [
    in_place, loaded, assigned, averaged, data_alone, one_row, short_rows, eps
])
def test_new_weights(change, detector, data):
    """No old weights are used after any change."""
    old = predict(detector, data)
    change(detector)
    found = predict(detector, data)
    with pytest.raises(AssertionError):
        assert_near(found, old)
    assert_near(found, predict(detector, data, fast=False))


def test_made_once(detector, data):
    """Two pictures with the same weights share one plain network."""
    predict(detector, data)
    with torch.no_grad():
        first = detector.current_plain_network()
        predict(detector, data)
        assert first is detector.current_plain_network() is not None
        assert first is detector.eval().current_plain_network()
        detector.train().eval()
        assert first is not detector.current_plain_network() is not None


def hooked(detector):
    detector.backbone.blocks[3].register_forward_hook(lambda *args: None)


def no_plain_form(detector):
    detector.neck.add_extra_convs = 'on_input'
    detector.train().eval()


def other_part(detector):
    detector.bbox_head.__class__ = type('MyHead', (type(detector.bbox_head), ),
                                        {})


@pytest.mark.parametrize('change', [
    hooked, no_plain_form, other_part,
    torch.nn.Module.train, torch.nn.Module.double
])  # yapf: disable
def test_the_detector_itself(change, detector):
    """It runs where its modules are watched or do something else."""
    with torch.no_grad():
        assert detector.current_plain_network() is not None
        change(detector)
        assert detector.current_plain_network() is None


def test_gradients(detector):
    """The plain network has none, so it is not used where they are on."""
    with torch.enable_grad():
        assert detector.current_plain_network() is None


def test_too_small(detector, data):
    """The message about too small inputs is the same."""
    small = dict(data, inputs=data['inputs'][..., :32])
    with torch.no_grad(), pytest.raises(ValueError, match='128x32'):
        detector(**small, mode='predict')


class Conv2d(torch.nn.Conv2d):
    """Has the name of PyTorch's, and computes something else."""

    def forward(self, x):
        return super().forward(x).round()


def other_convolution(detector):
    detector.neck.layers[0].nodes[0].conv.pointwise.__class__ = Conv2d


def other_norm(detector):
    norm = torch.nn.InstanceNorm2d(16)
    detector.backbone.blocks[0].linear_conv.norm_name = 'other'
    detector.backbone.blocks[0].linear_conv.add_module('other', norm.eval())


def no_statistics(detector):
    for module in detector.neck.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var = module.running_mean = None


def more_levels(detector):
    detector.bbox_head.num_levels = 6


def one_norm_trains(detector):
    detector.neck.layers[0].nodes[0].norm.train()


@pytest.mark.parametrize('change', [
    other_convolution, other_norm, no_statistics, more_levels, one_norm_trains
])
def test_no_plain_form(change, detector):
    """The detector itself computes what the plain network would not."""
    change(detector)
    with torch.no_grad():
        assert detector.current_plain_network() is None


def test_built_in_inference_mode(trained, data):
    """Such tensors have no versions."""
    with torch.inference_mode():
        model = copy.deepcopy(trained).eval()
        assert len(predict(model, data)[0]['scores']) > 10


def test_copies_are_light(detector, data):
    """A copy, or a file, has no second set of weights."""
    predict(detector, data)
    assert detector._plain[1] is not None
    assert copy.deepcopy(detector)._plain[1] is None
