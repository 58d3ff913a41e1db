"""Where effdet is not the official code, as docs/fidelity.md says."""
import effdet
import numpy as np
import pytest
import torch
from effdet.anchors import generate_detections
from effdet.data.transforms import ResizePad, resolve_fill_color
from effdet.soft_nms import batched_soft_nms
from effdet_bridge import effdet_network, our_network, random_weights
from PIL import Image
from verify_parity import compare

from mmdet_efficientdet.datasets.transforms import scaled_size
from mmdet_efficientdet.scaling import SCALING

CONFIGS = {
    size: effdet.get_efficientdet_config(f'tf_efficientdet_{size}')
    for size in SCALING
}


def network_with(weights, name, sides, **settings):
    """effdet's network of any name with given weights."""
    config = effdet.get_efficientdet_config(name)
    config.update(dict(image_size=sides, **settings))
    network = effdet.EfficientDet(config, pretrained_backbone=False).eval()
    network.load_state_dict(weights)
    return network


def test_hard_suppression_is_the_default():
    """The paper's evaluation has soft suppression."""
    network = effdet_network('d0', (64, 64))
    assert effdet.DetBenchPredict(network).soft_nms is False


def test_level_of_one_pixel():
    """A level with an axis of one pixel keeps the other axis."""
    network = effdet_network('d0', (64, 256))
    with torch.no_grad(), torch.device('meta'):
        cls, _ = network(torch.zeros(1, 3, 64, 256))
    assert [tuple(x.shape[-2:]) for x in cls[-2:]] == [(1, 4), (1, 4)]
    # One anchor of four is there for each output of that level.
    assert len(effdet.anchors.Anchors.from_config(network.config).boxes) == \
        9 * (8 * 32 + 4 * 16 + 2 * 8 + 1 * 4 + 1 * 2)


def test_own_models_pad_symmetrically():
    """efficientdet_d0 with the weights of tf_efficientdet_d0."""
    weights = random_weights('d0')
    ours = our_network(weights, 'd0')
    image = torch.randn(1, 3, 128, 192)
    theirs = network_with(
        weights, 'efficientdet_d0', (128, 192), redundant_bias=True)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1e-3  # its backbone has another, too
    assert compare(theirs, ours, image)['backbone'] > 0.1


def test_norms():
    """Own models have eps 1e-5 in the backbone; momentum is timm's."""
    own = effdet.EfficientDet(
        effdet.get_efficientdet_config('efficientdet_d0'),
        pretrained_backbone=False)
    assert own.backbone.bn1.eps == 1e-5
    theirs = effdet_network('d0', (128, 128))
    assert (theirs.backbone.bn1.eps, theirs.backbone.bn1.momentum) == (1e-3,
                                                                       0.1)
    norm = theirs.fpn.resample['3'].conv.bn
    assert (norm.eps, norm.momentum) == (1e-3, 0.01)


def test_configs():
    """Aspect pairs, the input of Lite, and stochastic depth."""
    for config in CONFIGS.values():
        assert list(map(tuple,
                        config.aspect_ratios)) == [(1.0, 1.0), (1.4, 0.7),
                                                   (0.7, 1.4)]
    assert CONFIGS['lite0'].mean == CONFIGS['lite0'].std == (0.5, ) * 3
    assert CONFIGS['d0'].backbone_args.drop_path_rate == 0.2
    assert CONFIGS['lite0'].backbone_args.drop_path_rate == 0


def test_start():
    """Depthwise kernels start eight times as wide."""
    network = effdet.EfficientDet(CONFIGS['d0'], pretrained_backbone=False)
    kernel = network.class_net.conv_rep[0].conv_dw.weight
    assert kernel.std().item() == pytest.approx(1 / 3, rel=0.1)


def test_resizing():
    """Size in double precision, 8 bits, smoothed, padded by a rounded mean."""
    white = Image.new('RGB', (612, 612), 'white')
    picture, _ = ResizePad(896)(white, {})
    assert np.array(picture)[:, 0, 0].nonzero()[0].max() + 1 == 895
    assert scaled_size((612, 612), (896, 896))[1] == (896, 896)
    assert resolve_fill_color('mean') == (124, 116, 104)
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::4] = 255
    picture, _ = ResizePad(16)(Image.fromarray(stripes), {})
    assert (np.array(picture)[1:-1, 1:-1] > 0).all()


@pytest.mark.parametrize('clip', [False, True])
def test_bench_clips(clip):
    """With the size of the picture, boxes are clipped to it."""
    anchors = torch.tensor([[-30.0, -10, 50, 90]])
    found = generate_detections(
        torch.tensor([[2.0]]), torch.zeros(1, 4), anchors, torch.tensor([0]),
        torch.tensor([7]),
        torch.tensor(1.0) if clip else None,
        torch.tensor([60.0, 40.0]) if clip else None)
    box = [0, 0, 60, 40] if clip else [-10, -30, 90, 50]
    assert found.shape == (100, 6)  # filled up with zeros
    assert found[0, :4].tolist() == box
    assert found[0, 5] == 8 and not found[1:].any()


def test_soft_nms_mixes_classes():
    """Boxes at negative coordinates reach into the class before."""
    boxes = torch.tensor([[0.0, 0, 9, 9], [-10, -10, -1, -1]])
    scores = torch.tensor([0.9, 0.8])
    _, kept = batched_soft_nms(boxes, scores, torch.tensor([0, 1]))
    assert kept[1] == pytest.approx(0.8 * np.exp(-2), rel=1e-4)
    # IoU of boxes of one class is without the last pixel.
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]])
    _, kept = batched_soft_nms(boxes, scores, torch.tensor([0, 0]))
    assert kept[1] == pytest.approx(0.8 * np.exp(-0.5), rel=1e-4)
