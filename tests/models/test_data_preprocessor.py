"""Rectangular inputs are padded to the whole, whatever the pictures."""
import copy

import pytest
import torch
from helpers.models import SIZES, batch
from helpers.tiny_data import LITE0
from mmdet.registry import MODELS, TRANSFORMS
from mmengine.config import Config

from mmdet_efficientdet.scaling import scale_config

SHAPES = ((96, 160), (30, 160), (96, 41), (64, 64), (1, 7), (95, 129))


def detector(image_size):
    """A Lite0 for a rectangle whose norms fit its features."""
    config = Config.fromfile(LITE0)
    scale_config(config, 'lite0', image_size=image_size)
    config.model.backbone.init_cfg = None
    model = MODELS.build(config.model).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(2, 3, 128, 128))
    return model.eval()


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('shapes', [SHAPES, SHAPES[1:2], SHAPES[3:]])
def test_padded_to_the_whole(shapes, training):
    """In training and testing, alone and in a batch; the rest is 0."""
    settings = dict(
        mean=[127.] * 3, std=[128.] * 3, pad_size_divisor=(96, 160))
    preprocess = MODELS.build(
        dict(type='mmdet_efficientdet.RectDataPreprocessor', **settings))
    data = batch(*shapes)
    found = preprocess(copy.deepcopy(data), training)
    assert found['inputs'].shape == (len(shapes), 3, 96, 160)
    for x, image, sample in zip(found['inputs'], data['inputs'],
                                found['data_samples']):
        height, width = image.shape[1:]
        assert torch.equal(x[:, :height, :width], (image.float() - 127) / 128)
        assert not x[:, height:].any() and not x[:, :, width:].any()
        assert sample.batch_input_shape == sample.pad_shape == (96, 160)
        assert sample.img_shape == (height, width)


@pytest.mark.parametrize('divisor', [1, 32, 128])
@pytest.mark.parametrize('stacked', [False, True])
def test_one_divisor_is_that_of_the_host(divisor, stacked):
    """Same inputs and metadata, from a list and from one tensor."""
    data = batch(*SHAPES[:1] * 2 if stacked else SHAPES)
    if stacked:
        data['inputs'] = torch.stack(data['inputs'])
    ours, theirs = (
        MODELS.build(
            dict(
                type=name,
                mean=[127.] * 3,
                std=[128.] * 3,
                pad_size_divisor=divisor))(copy.deepcopy(data))
        for name in ('mmdet_efficientdet.RectDataPreprocessor',
                     'mmdet.DetDataPreprocessor'))
    assert torch.equal(ours['inputs'], theirs['inputs'])
    for a, b in zip(ours['data_samples'], theirs['data_samples']):
        assert a.metainfo == b.metainfo


def test_larger_images_are_padded_to_multiples():
    """As with one divisor, nothing is cut off."""
    preprocess = MODELS.build(
        dict(
            type='mmdet_efficientdet.RectDataPreprocessor',
            pad_size_divisor=[96, 160]))
    assert preprocess(batch((97, 100),
                            (20, 161)))['inputs'].shape[2:] == (192, 320)


def test_batch_augments_get_the_whole():
    """What the host does to a batch, it does to the padded one."""
    preprocess = MODELS.build(
        dict(
            type='mmdet_efficientdet.RectDataPreprocessor',
            pad_size_divisor=(96, 160),
            batch_augments=[
                dict(type='mmdet.BatchFixedSizePad', size=(128, 160))
            ]))
    found = preprocess(batch((30, 41)), training=True)
    assert found['inputs'].shape[2:] == (128, 160)


def test_batch_does_not_matter():
    """The same input to the last bit, alone and with five others."""
    model, data = detector((96, 160)), batch(*SHAPES)

    def run(chosen):
        part = {key: [copy.deepcopy(data[key][i]) for i in chosen]
                for key in data}  # yapf: disable
        part = model.data_preprocessor(part)
        with torch.no_grad():
            results = model(**part, mode='predict')
        return part['inputs'], [x.pred_instances for x in results]

    inputs, together = run(range(len(SHAPES)))
    for i, expected in enumerate(together):
        alone, (found, ) = run([i])
        assert torch.equal(alone[0], inputs[i])
        assert len(found) == len(expected) > 0
        assert torch.equal(found.labels, expected.labels)
        # A vector unit rounds the ends of a tensor differently.
        torch.testing.assert_close(found.bboxes, expected.bboxes)
        torch.testing.assert_close(found.scores, expected.scores)


def test_one_small_picture_trains():
    """Its own size would leave one pixel to the batch norms of P7."""
    model = detector((96, 160)).train()
    data = model.data_preprocessor(batch((30, 41)), training=True)
    assert all(loss.isfinite() for loss in model.loss(
        **{
            'batch_inputs': data['inputs'],
            'batch_data_samples': data['data_samples']
        }).values())


@pytest.mark.parametrize('image_size, levels', [
    ((540, 960), [(68, 120), (34, 60), (17, 30), (9, 15), (5, 8)]),
    ((416, 736), [(52, 92), (26, 46), (13, 23), (7, 12), (4, 6)]),
])
@pytest.mark.parametrize('shape', [(1080, 1920), (375, 500), (900, 61)])
def test_common_sizes(image_size, levels, shape):
    """From a picture to the levels: half of the one below, rounded up."""
    config = Config.fromfile(SIZES['lite0'])
    scale_config(config, 'lite0', image_size=image_size)
    config.model.backbone.init_cfg = None
    results = dict(img=torch.zeros(*shape, 3, dtype=torch.uint8).numpy())
    for transform in config.test_pipeline:
        if 'Load' not in transform.type:
            results = TRANSFORMS.build(transform)(results)
    with torch.device('meta'):
        model = MODELS.build(config.model).eval()
    preprocess = MODELS.build(config.model.data_preprocessor)
    data = preprocess({
        'inputs': [results['inputs']],
        'data_samples': [results['data_samples']]
    })
    assert data['inputs'].shape[2:] == image_size
    with torch.no_grad():
        maps, _ = model(data['inputs'].to('meta'))
    assert [x.shape[2:] for x in maps] == levels
    anchors = model.bbox_head.prior_generator.grid_priors(levels, image_size)
    for boxes, (rows, columns) in zip(anchors, levels):
        centers = boxes[::9, :2] / 2 + boxes[::9, 2:] / 2
        steps = torch.tensor([image_size[1] / columns, image_size[0] / rows])
        torch.testing.assert_close(centers[0], steps / 2)
        torch.testing.assert_close(centers[-1] + steps / 2,
                                   torch.tensor(image_size[::-1]).float())
