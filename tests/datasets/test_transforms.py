"""Resizing, cropping and padding against the official rules."""
import copy
import random

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmdet.registry import MODELS, TRANSFORMS
from mmdet.structures.bbox import HorizontalBoxes
from oracles import official_numpy as official

from mmdet_efficientdet.datasets.transforms import (UINT8, ResizeCrop,
                                                    misreading,
                                                    resize_from_corner,
                                                    resize_part, scaled_size)

FIT = (1.0, 1.0)
# An image and what TensorFlow 2.15 makes of it, half-pixel and legacy:
# tf.image.resize and tf.compat.v1.image.resize_images.
GRAY = [[0, 10, 40, 90], [100, 0, 50, 20], [7, 8, 9, 250]]
RESIZED = {
    (5, True): [[0.0, 5.0, 15.0, 35.0, 65.0, 90.0],
                [40.0, 23.0, 12.333, 37.667, 53.0, 62.0],
                [100.0, 50.0, 8.333, 41.667, 35.0, 20.0],
                [44.2, 24.5, 8.233, 21.967, 91.7, 158.0],
                [7.0, 7.5, 8.167, 8.833, 129.5, 250.0]],
    (5, False): [[0.0, 6.667, 20.0, 40.0, 73.333, 90.0],
                 [60.0, 22.667, 18.0, 46.0, 47.333, 48.0],
                 [81.4, 28.2, 15.0, 41.8, 57.933, 66.0],
                 [25.6, 12.8, 10.0, 17.2, 141.733, 204.0],
                 [7.0, 7.667, 8.333, 9.0, 169.667, 250.0]],
    (2, True): [[16.25, 57.5], [18.125, 105.875]],
    (2, False): [[0.0, 40.0], [53.5, 29.5]],
}


def sample(height, width, boxes=(), labels=None, flags=None, **extra):
    """What the pipeline has loaded for an image."""
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    num = len(boxes)
    image = np.random.randint(0, 256, (height, width, 3), dtype=np.uint8)
    return dict(
        img=image,
        gt_bboxes=HorizontalBoxes(boxes),
        gt_bboxes_labels=np.array(range(num) if labels is None else labels),
        gt_ignore_flags=np.array([False] * num if flags is None else flags),
        **extra)


def positions(side):
    """An image whose pixels tell their row and column."""
    y, x = np.mgrid[:side, :side]
    return np.stack([y, x, 0 * x], -1).astype(np.float32)


@pytest.mark.parametrize('shape, side, expected', [
    ((427, 640), 512, (341, 512)),
    ((427, 640), 896, (597, 896)),
    ((427, 640), 1536, (1024, 1536)),
    ((640, 427), 512, (512, 341)),
    ((333, 500), 512, (340, 512)),
    ((612, 612), 896, (896, 896)),
    ((480, 640), 512, (384, 512)),
    ((512, 512), 512, (512, 512)),
    ((1, 5000), 512, (1, 512)),
])
def test_scaled_size_literals(shape, side, expected):
    """Sizes are cut off, not rounded, and computed in float32."""
    scale, size = scaled_size(shape, (side, side))
    assert size == expected
    assert float(scale) == pytest.approx(side / max(shape))


@pytest.mark.parametrize('side, sides', [
    (512, (425, 427, 428, 460)),
    (640, (532, 561, 583, 598, 602, 610, 627, 634)),
    (768, (592, 596, 631, 632, 638)),
    (1536, (592, 596, 631, 632, 638)),
])
def test_scaled_size_is_one_short(side, sides):
    """For these long sides, float32 itself gives one pixel less."""
    for n in sides:
        assert scaled_size((n, n), (side, side))[1] == (side - 1, side - 1)
        assert scaled_size((n, 10), (side, side))[1][0] == side - 1


def test_scaled_size_rule():
    """Of random sizes, float64 would cut off some differently."""
    rng = np.random.default_rng(0)
    differ = 0
    for height, width, top, left in rng.integers(20, 1500, (2000, 4)):
        ratio = rng.uniform(0.1, 2.0)
        target = [int(np.float32(ratio) * np.float32(n)) for n in (top, left)]
        scale, expected = official.scaled_size((height, width), target)
        expected = tuple(max(1, n) for n in expected)
        got = scaled_size((height, width), (top, left), ratio)
        assert got == (scale, expected)
        exact = min(target[0] / height, target[1] / width)
        differ += expected != (int(height * exact), int(width * exact))
    assert differ > 20


@pytest.mark.parametrize('ratio, expected', [
    (0.1, (51, 51)),
    (0.5, (256, 256)),
    (1.0, (512, 512)),
    (1.999, (1023, 1023)),
    (2.0, (1024, 1024)),
])
def test_ratio_multiplies_the_target(ratio, expected):
    """The ratio is relative to the output, and the target is cut off."""
    assert scaled_size((256, 256), (512, 512), ratio)[1] == expected


@pytest.mark.parametrize('side, half_pixel_centers', RESIZED)
def test_pixels_of_tensorflow(side, half_pixel_centers):
    """Both conventions, enlarging and reducing, to TensorFlow's values."""
    image = np.uint8(GRAY)[..., None].repeat(3, -1)
    transform = ResizeCrop((side, 10), FIT, half_pixel_centers)
    assert f'half_pixel_centers={half_pixel_centers}' in repr(transform)
    expected = np.array(RESIZED[side, half_pixel_centers])[..., None]
    out = transform(dict(img=image))['img']
    assert out.dtype == np.float32 and out.flags['C_CONTIGUOUS']
    np.testing.assert_allclose(out, expected.repeat(3, -1), atol=1e-3)
    # The literals bear out the transcription of the other tests, too.
    again = official.resize(image, expected.shape[:2], half_pixel_centers)
    np.testing.assert_allclose(again, expected.repeat(3, -1), atol=1e-3)


@pytest.mark.parametrize('half_pixel_centers', [True, False])
@pytest.mark.parametrize('shape, side', [
    ((40, 60), 97),
    ((120, 90), 64),
    ((300, 301), 64),
    ((50, 50), 50),
    ((33, 7), 128),
])
def test_pixels(shape, side, half_pixel_centers):
    """Bilinear, in float32, without antialiasing."""
    results = sample(*shape)
    size = official.scaled_size(shape, (side, side))[1]
    expected = official.resize(results['img'], size, half_pixel_centers)
    out = ResizeCrop(side, FIT, half_pixel_centers)(results)['img']
    assert out.shape == (*size, 3) == (*results['img_shape'], 3)
    np.testing.assert_allclose(out, expected, atol=0.01)
    assert side == 50 or (out % 1 > 0.01).any()


def test_half_pixel_centers_by_default():
    """As in the host, and in the official code of today."""
    image = sample(40, 60)['img']
    default, written, legacy = (
        ResizeCrop(97, FIT, **kwargs)(dict(img=image))['img']
        for kwargs in ({}, dict(half_pixel_centers=True),
                       dict(half_pixel_centers=False)))
    np.testing.assert_array_equal(default, written)
    assert np.abs(default - legacy).max() > 10


@pytest.fixture
def ipp(request):
    """Whether OpenCV uses Intel's IPP, where it can."""
    used = cv2.ipp.useIPP()
    cv2.ipp.setUseIPP(request.param)
    yield request.param
    cv2.ipp.setUseIPP(used)


@pytest.mark.parametrize(
    'half_pixel_centers, ipp', [(True, True), (True, False), (False, True)],
    indirect=['ipp'])
def test_only_the_crop_is_resized(half_pixel_centers, ipp):
    """It has the pixels of the whole resized image.

    They are equal to the last bit, but with IPP.
    """
    rng = np.random.default_rng(0)
    for case in range(100):
        image = rng.random((*rng.integers(2, 300, 2), 3), np.float32) * 255
        sides = rng.integers(1, 200, 2).tolist()
        np.random.seed(case)
        ratio = np.random.uniform(0.1, 2)
        size = scaled_size(image.shape[:2], sides, ratio)[1]
        if half_pixel_centers:
            whole = cv2.resize(image, size[::-1])
        else:
            whole = resize_from_corner(image, size, (slice(None), ) * 2)
        top, left = (int(max(0, n - side) * np.random.uniform())
                     for n, side in zip(size, sides))
        expected = whole[top:top + sides[0], left:left + sides[1]]
        np.random.seed(case)
        crop = ResizeCrop(sides, (0.1, 2), half_pixel_centers)
        out = crop(dict(img=image))['img']
        assert out.shape == expected.shape and out.dtype == np.float32
        np.testing.assert_allclose(out, expected, 0,
                                   1e-4 * (half_pixel_centers and ipp))


def test_crop_at_a_ratio_near_one():
    """OpenCV copies what keeps its size, although the whole image does not."""
    image = np.random.default_rng(0).random((1000, 1000, 3), np.float32)
    part = (slice(0, 400), ) * 2
    expected = cv2.resize(image, (1001, 1001))[part]
    found = resize_part(image, (1001, 1001), part)
    np.testing.assert_allclose(found, expected, 0, 1e-6)


def test_crop_is_a_part_of_the_resized_image():
    """The crop is what interpolating and cutting gives, at some offset."""
    results = sample(30, 45)
    image = torch.from_numpy(results['img']).permute(2, 0, 1)[None].float()
    whole = F.interpolate(image, (85, 128), mode='bilinear')[0].numpy()
    out = ResizeCrop(64, (2.0, 2.0))(results)['img'].transpose(2, 0, 1)
    assert out.shape == (3, 64, 64)
    found = [(y, x) for y in range(22) for x in range(65)
             if np.abs(whole[:, y:y + 64, x:x + 64] - out).max() < 2e-3]
    assert len(found) == 1


def test_boxes_follow_the_cut_off_size():
    """Each axis has its own factor: that of the sizes in whole pixels."""
    results = ResizeCrop(512, FIT)(
        sample(427, 640, [(0, 0, 640, 427), (10, 20, 300, 400)]))
    factor = 341 / 427
    assert results['gt_bboxes'].tensor[0].tolist() == pytest.approx(
        [0, 0, 511, 341])
    assert results['gt_bboxes'].tensor[1].tolist() == pytest.approx(
        [10 * 0.8, 20 * factor, 300 * 0.8, 400 * factor])
    assert results['scale_factor'] == (0.8, factor)
    assert results['img_shape'] == (341, 512)
    assert results['keep_ratio'] is True


@pytest.mark.parametrize('shape', [(100, 4000), (4000, 100), (3, 5000),
                                   (427, 640)])
def test_the_way_back(shape):
    """A box divided by the factors is the box that it was.

    One scale for both axes would leave an IoU of 0.78 at 4000x100.
    """
    height, width = shape
    box = [0.2 * width, 0.1 * height, 0.7 * width, 0.9 * height]
    results = ResizeCrop(512)(sample(height, width, [box]))
    back = results['gt_bboxes'].tensor / torch.tensor(
        results['scale_factor']).repeat(2)
    torch.testing.assert_close(back, torch.tensor([box]))


def test_boxes_follow_the_pixels():
    """A bright rectangle stays in its box, wherever the crop is."""
    for _ in range(30):
        results = sample(64, 64, [(20, 24, 40, 36)])
        results['img'][:] = 0
        results['img'][24:36, 20:40] = 255
        ResizeCrop(64, (0.5, 2.0))(results)
        rows, cols = (results['img'][..., 0] > 127).nonzero()
        boxes = results['gt_bboxes'].tensor
        assert len(boxes) == (len(rows) > 0)
        if len(boxes):
            seen = [cols.min(), rows.min(), cols.max() + 1, rows.max() + 1]
            assert boxes[0].tolist() == pytest.approx(seen, abs=1.01)


def test_boxes_are_clipped():
    """To [0, side - 1], which is 511 for 512; slivers stay."""
    kept = [(400, 300, 512, 512), (510.99, 0, 512, 512), (-9, -9, 0.01, 1),
            (3, 4, 3.001, 9)]
    gone = [(511, 0, 512, 512), (511.5, 5, 511.9, 9), (3, 4, 3, 9)]
    expected = [(400, 300, 511, 511), (510.99, 0, 511, 511), (0, 0, 0.01, 1),
                (3, 4, 3.001, 9)]
    results = ResizeCrop(512, FIT)(
        sample(
            512,
            512, [kept[0], gone[0], *kept[1:3], *gone[1:], kept[3]],
            labels=[5, 0, 6, 7, 0, 0, 8],
            flags=[True, False, False, True, False, False, False]))
    np.testing.assert_allclose(
        results['gt_bboxes'].tensor, expected, rtol=1e-6)
    assert results['gt_bboxes_labels'].tolist() == [5, 6, 7, 8]
    assert results['gt_ignore_flags'].tolist() == [True, False, True, False]


def test_boxes_of_a_rectangle_are_clipped():
    """Width and height have limits of their own."""
    results = ResizeCrop((64, 96), FIT)(sample(64, 96, [(0, 0, 96, 64)]))
    assert results['gt_bboxes'].tensor.tolist() == [[0, 0, 95, 63]]


def test_crop_may_leave_no_boxes():
    """Images whose boxes are cut away stay in the training."""
    left = 0
    for _ in range(40):
        results = ResizeCrop(32, (2.0, 2.0))(
            sample(64, 64, [(1, 1, 9, 9)], [3]))
        num = len(results['gt_bboxes'])
        assert len(results['gt_bboxes_labels']) == num
        assert len(results['gt_ignore_flags']) == num
        left += num
    assert 0 < left < 40


def test_images_without_boxes():
    """Empty or no annotations are fine."""
    results = ResizeCrop(32, FIT)(sample(64, 64))
    assert results['gt_bboxes'].tensor.shape == (0, 4)
    results = ResizeCrop(32)(dict(img=np.zeros((8, 8, 3), np.uint8)))
    assert set(results) == {'img', 'img_shape', 'scale_factor', 'keep_ratio'}


def test_offsets():
    """Offsets are uniform in [0, scaled - side) and independent."""
    image = positions(128)
    offsets = []
    for _ in range(2000):
        results = ResizeCrop(64, (2.0, 2.0))(dict(img=image))
        out = results['img']
        np.testing.assert_array_equal(out[..., :2] - out[0, 0, :2],
                                      image[:64, :64, :2])
        offsets.append(out[0, 0, :2])
    offsets = np.array(offsets)
    assert offsets.min() == 0 and offsets.max() == 63
    np.testing.assert_allclose(offsets.mean(0), 31.5, atol=1.5)
    for axis in offsets.T:
        assert np.histogram(axis, 8, (0, 64))[0].min() > 190
    assert abs(np.corrcoef(offsets.T)[0, 1]) < 0.08


def test_offset_only_where_the_image_is_larger():
    """A short axis starts at its first pixel."""
    image = positions(128)[:32]
    lefts = set()
    for _ in range(40):
        results = ResizeCrop(64, (2.0, 2.0))(dict(img=image))
        assert results['img'].shape == (32, 64, 3)
        assert (results['img'][:, :, 0] == image[:, :64, 0]).all()
        lefts.add(results['img'][0, 0, 1])
    assert len(lefts) > 10


def test_ratio_range():
    """The factor is uniform between both ends."""
    ratios = []
    for _ in range(2000):
        results = dict(img=np.zeros((50, 100, 3), np.uint8))
        ratios.append(ResizeCrop(100, (0.1, 2.0))(results)['scale_factor'][0])
    ratios = np.array(ratios)
    # The target is cut off to whole pixels.
    assert 0.09 <= ratios.min() < 0.12 and 1.97 < ratios.max() <= 2.0
    assert ratios.mean() == pytest.approx(1.05, abs=0.05)
    assert np.histogram(ratios, 10, (0.1, 2.0))[0].min() > 150
    half = [
        ResizeCrop(100, (0.5, 0.6))(
            dict(img=np.zeros((10, 9, 3), np.uint8)))['scale_factor'][0]
        for _ in range(200)
    ]
    assert 5.0 <= min(half) and max(half) <= 6.0


def test_fits_by_default():
    """A pipeline that asks for no jitter, such as of a test, gets none."""
    for _ in range(5):
        results = ResizeCrop(64)(sample(96, 48, [(0, 0, 48, 96)]))
        assert results['img'].shape == (64, 32, 3)


def test_numpy_decides():
    """Equal states of numpy.random give equal crops, different ones not."""

    def run(state):
        np.random.seed(state)
        return [
            ResizeCrop(64,
                       (0.1, 2.0))(dict(img=positions(128)))['scale_factor']
            for _ in range(2)
        ]

    assert run(1) == run(1) != run(2)
    assert run(1)[0] != run(1)[1]


def test_image_size_pair():
    """A pair is (height, width)."""
    results = ResizeCrop((64, 128), FIT)(sample(50, 50))
    assert results['img'].shape == (64, 64, 3)
    results = ResizeCrop([64, 128], FIT)(sample(50, 200))
    assert results['img'].shape == (32, 128, 3)
    results = ResizeCrop((32, 16), (4.0, 4.0))(sample(64, 64))
    assert results['img'].shape == (32, 16, 3)


@pytest.mark.parametrize('key', ['gt_masks', 'gt_seg_map'])
@pytest.mark.parametrize('value', [[], [object()]])
def test_masks_raise(key, value):
    """Masks would not be transformed, so they are refused."""
    with pytest.raises(ValueError, match='with_mask=False'):
        ResizeCrop(32)(sample(64, 64, [(1, 1, 9, 9)], **{key: value}))


@pytest.mark.parametrize('kwargs, words', [
    (dict(image_size=0), 'image_size'),
    (dict(image_size=(64, -1)), 'image_size'),
    (dict(image_size=(64, 64, 64)), 'image_size'),
    (dict(image_size=64.0), 'image_size=64.0'),
    (dict(image_size='64'), "image_size='64'"),
    (dict(ratio_range=(0, 1)), r'ratio_range=\(0, 1\)'),
    (dict(ratio_range=(2.0, 1.0)), 'ratio_range'),
    (dict(ratio_range=(-1.0, 1.0)), 'ratio_range'),
    (dict(ratio_range=(1.0, )), 'ratio_range'),
])
def test_bad_arguments_raise(kwargs, words):
    """The argument and its value are named."""
    with pytest.raises(ValueError, match=words):
        ResizeCrop(**{**dict(image_size=64), **kwargs})


def preprocess(cfg, image, half_pixel_centers=True, **changes):
    """Runs an image through pipeline and preprocessor of 64x64 pixels."""
    results = dict(img=image, img_id=0, img_path='', ori_shape=image.shape[:2])
    for transform in (dict(
            type='mmdet_efficientdet.ResizeCrop',
            image_size=64,
            ratio_range=FIT,
            half_pixel_centers=half_pixel_centers),
                      dict(type='PackDetInputs')):
        results = TRANSFORMS.build(transform)(results)
    cfg = {**cfg, 'pad_size_divisor': 64, **changes}
    data = MODELS.build(cfg)(
        dict(
            inputs=[results['inputs']],
            data_samples=[results['data_samples']]),
        training=True)
    meta = data['data_samples'][0].metainfo
    assert meta['batch_input_shape'] == (64, 64)
    return data['inputs'][0], meta


@pytest.mark.parametrize('shape', [(40, 60), (171, 256), (150, 75)])
@pytest.mark.parametrize('half_pixel_centers', [True, False])
@pytest.mark.parametrize('name, mean, std', [
    ('d0', (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    ('lite0', (127, 127, 127), (128, 128, 128)),
])
def test_inputs_equal_the_official_ones(model_cfg, shape, half_pixel_centers,
                                        name, mean, std):
    """From a loaded image to the padded input of the network.

    The official code normalises first, then resizes, then pads.
    """
    image = np.random.randint(0, 256, (*shape, 3), dtype=np.uint8)
    inputs, _ = preprocess(
        model_cfg(name).data_preprocessor, image, half_pixel_centers)
    expected = official.preprocess(image[..., ::-1], 64, mean, std,
                                   half_pixel_centers)
    assert (expected == 0).all(-1).any()
    np.testing.assert_allclose(
        inputs.permute(1, 2, 0), expected, rtol=0, atol=2e-4)


def test_padding_is_zero(model_cfg):
    """What is beyond the image is the mean colour, after normalisation."""
    image = np.random.randint(0, 256, (40, 64, 3), dtype=np.uint8)
    inputs, meta = preprocess(model_cfg('d0').data_preprocessor, image)
    assert inputs.shape == (3, 64, 64)
    assert meta['img_shape'] == (40, 64)
    assert (inputs[:, 40:] == 0).all()
    expected = (image[..., ::-1] - np.array(
        [123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    np.testing.assert_allclose(
        inputs[:, :40].permute(1, 2, 0), expected, rtol=1e-5, atol=1e-5)


def test_padding_of_advprop(model_cfg):
    """With inputs of -1 to 1 and pad_value=-1, the padding is black."""
    image = np.random.randint(0, 256, (64, 24, 3), dtype=np.uint8)
    inputs, _ = preprocess(
        model_cfg('d0').data_preprocessor,
        image,
        mean=[127.5] * 3,
        std=[127.5] * 3,
        pad_value=-1)
    assert (inputs[:, :, 24:] == -1).all()
    np.testing.assert_allclose(
        inputs[:, :, :24].permute(1, 2, 0),
        image[..., ::-1] / 127.5 - 1,
        atol=1e-6)


@pytest.mark.parametrize('name, expected', [
    ('d0', [(255 - 123.675) / 58.395, -116.28 / 57.12, -103.53 / 57.375]),
    ('d7x', [(255 - 123.675) / 58.395, -116.28 / 57.12, -103.53 / 57.375]),
    ('lite0', [1.0, -127 / 128, -127 / 128]),
])
def test_colours(model_cfg, name, expected):
    """A red image, loaded as BGR, is red in the network's first channel."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[..., 2] = 255
    inputs, _ = preprocess(model_cfg(name).data_preprocessor, image)
    assert inputs.amin((1, 2)).tolist() == pytest.approx(expected)
    assert inputs.amax((1, 2)).tolist() == pytest.approx(expected)


@pytest.mark.parametrize('half_pixel_centers', [True, False])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.float32])
def test_pictures_keep_their_type(dtype, half_pixel_centers):
    """With to_float32=False, rounded; the default is float32."""
    image = sample(60, 80)['img'].astype(dtype)
    kept, default = (
        ResizeCrop(47, FIT, half_pixel_centers, **kwargs)(dict(img=image))
        for kwargs in (dict(to_float32=False), {}))
    assert kept['img'].dtype == dtype and default['img'].dtype == np.float32
    np.testing.assert_allclose(
        kept['img'], default['img'], atol=0.5 * (dtype != np.float32))
    assert (default['img'] % 1).any()


# What a transform of the host needs to be built.
ARGS = dict(
    CutOut=dict(n_holes=3, cutout_shape=(8, 8)),
    FixScaleResize=dict(scale=(32, 48)),
    FixShapeResize=dict(width=32, height=48),
    MixUp=dict(img_scale=(64, 64)),
    Mosaic=dict(img_scale=(64, 64)),
    Normalize=dict(mean=[1, 2, 3], std=[4, 5, 6]),
    Pad=dict(size=(80, 80)),
    RandomChoiceResize=dict(scales=[(32, 48)]),
    RandomCrop=dict(crop_size=(32, 32)),
    RandomErasing=dict(n_patches=2, ratio=.3),
    RandomFlip=dict(prob=.5),
    RandomGrayscale=dict(prob=.5),
    RandomResize=dict(scale=(32, 48), ratio_range=(.5, 2.)),
    Resize=dict(scale=(32, 48)),
    ResizeShortestEdge=dict(scale=32))
# Need a package that is not installed, or more than one picture; of these,
# Albu and Corrupt are for uint8.
UNTESTED = ('Albu', 'CopyPaste', 'Corrupt', 'InstaBoost', 'MixUp')


def outcome(transform, dtype, seed):
    """A picture after a transform; an exception, if there is none."""
    random.seed(seed)
    np.random.seed(seed)

    def loaded():
        image = np.random.default_rng(0).integers(60, 200, (64, 64, 3))
        image[10:40, 20:50] //= 2
        return {
            **sample(64, 64, [(4, 5, 40, 50), (20, 20, 60, 62)]), 'img':
            image.astype(dtype),
            'img_shape': (64, 64),
            'scale_factor': (1.0, 1.0)
        }

    try:
        results = copy.deepcopy(transform)(
            dict(loaded(), mix_results=[loaded() for _ in range(3)]))
        return np.asarray(results['img'], float)
    except Exception as error:
        return error


@pytest.mark.slow
def test_all_transforms_of_the_host():
    """Those that do otherwise with float32 than with uint8 are known."""
    kinds = {**TRANSFORMS.parent.module_dict, **TRANSFORMS.module_dict}
    misread, tested = set(), set()
    for name, kind in kinds.items():
        if not kind.__module__.startswith(('mmdet.', 'mmcv.')):
            continue
        try:
            transform = kind(**ARGS.get(name, {}))
        except Exception:  # wrappers, and what needs other packages
            continue
        for seed in range(8):
            integers, floats = (
                outcome(transform, dtype, seed)
                for dtype in (np.uint8, np.float32))
            if isinstance(integers, Exception):  # not for a loaded picture
                break
            tested.add(name)
            if isinstance(floats,
                          Exception) or abs(integers - floats).mean() > 1:
                misread.add(name)
    assert len(tested) > 40 and not tested & set(UNTESTED)
    assert misread == set(UINT8) - set(UNTESTED)


HSV = dict(type='YOLOXHSVRandomAug')
CROP = dict(type='mmdet_efficientdet.ResizeCrop', image_size=64)


@pytest.mark.parametrize('pipeline, names', [
    ([CROP, HSV], ['YOLOXHSVRandomAug']),
    ([HSV, CROP], []),
    ([dict(CROP, to_float32=False), HSV], []),
    ([CROP, dict(type='PhotoMetricDistortion'), dict(type='RandomFlip')], []),
    ([CROP, dict(type='RandomApply', transforms=[HSV]),
      dict(type='mmdet.Albu', transforms=[dict(type='Blur')])],
     ['YOLOXHSVRandomAug', 'Albu']),
    ([dict(CROP, type=ResizeCrop),
      dict(type=TRANSFORMS.get('Posterize'))], ['Posterize']),
    ([HSV, dict(type='Resize', scale=(64, 64))], []),
])  # yapf: disable
@pytest.mark.parametrize('wrapped', [False, True])
def test_misreading_transforms(pipeline, names, wrapped):
    """Behind ResizeCrop, inside other transforms and other datasets."""
    dataset = dict(type='CocoDataset', pipeline=pipeline)
    if wrapped:
        dataset = dict(type='RepeatDataset', times=2, dataset=dataset)
    assert misreading(dataset) == names


def test_in_the_place_of_the_hosts_resize():
    """As in RTMDet's recipe: colours come out as from its own Resize."""
    image = np.full((96, 96, 3), (180, 60, 30), np.uint8)
    means = []
    for resize in (dict(type='Resize', scale=(64, 64)),
                   dict(CROP, ratio_range=FIT, to_float32=False), CROP):
        np.random.seed(0)
        results = TRANSFORMS.build(resize)(dict(img=image))
        np.random.seed(0)
        means.append(TRANSFORMS.build(HSV)(results)['img'].mean((0, 1)))
    np.testing.assert_allclose(means[1], means[0], atol=1)
    assert abs(means[2] - means[0]).max() > 20
