"""The sample sheet of tools/check_dataset.py; its findings: test_preflight."""
import check_dataset
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

MEAN, STD = [120.0, 110.0, 100.0], [60.0, 50.0, 40.0]


@pytest.mark.parametrize('settings, padding', [
    (dict(mean=MEAN, std=STD, bgr_to_rgb=True), [120, 110, 100]),
    (dict(mean=MEAN, std=STD, bgr_to_rgb=False), [100, 110, 120]),
    (dict(), [0, 0, 0]),
])
def test_what_the_network_sees(settings, padding):
    """The image as RGB, and padding that is zero to the network."""
    settings = dict(
        type='DetDataPreprocessor', pad_size_divisor=64, **settings)
    bgr = torch.randint(0, 256, (3, 64, 40), dtype=torch.uint8)
    boxes = torch.tensor([[4.0, 5, 30, 60]])
    sample = DetDataSample(
        gt_instances=InstanceData(bboxes=boxes, labels=torch.tensor([1])),
        metainfo=dict(img_shape=(64, 40)))
    image, shown = check_dataset.network_input(
        MODELS.build(settings), settings,
        dict(inputs=bgr, data_samples=sample))
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    expected = bgr.permute(1, 2, 0).numpy()[..., ::-1]
    np.testing.assert_array_equal(image[:, :40], expected)
    assert (image[:, 40:] == padding).all()
    assert shown.gt_instances.bboxes.tolist() == boxes.tolist()
