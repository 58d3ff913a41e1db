"""How users and MMDetection's wrappers call a detector."""
import copy

import pytest
import torch
from helpers.models import batch, new_model
from helpers.tiny_data import LITE0
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose


@pytest.fixture(scope='module')
def model():
    return new_model(Config.fromfile(LITE0))


def boxes_of(results):
    return [result.pred_instances.bboxes for result in results]


@pytest.mark.parametrize('rescale', [True, False])
def test_without_the_preprocessor(model, rescale):
    """The input's size is that of the tensor, and the scale is 1."""
    model.eval()
    data = model.data_preprocessor(batch((128, 128), (64, 128)))
    plain = [DetDataSample(metainfo=dict(img_shape=s.img_shape,
                                         ori_shape=s.img_shape))
             for s in data['data_samples']]  # yapf: disable
    for sample in data['data_samples']:
        sample.set_metainfo(
            dict(scale_factor=(1., 1.), ori_shape=sample.img_shape))
    inputs = data['inputs']
    with torch.no_grad():
        expected = boxes_of(
            model.predict(inputs, data['data_samples'], rescale=rescale))
        found = boxes_of(model.predict(inputs, plain, rescale))
        by_mode = boxes_of(model(inputs, plain, mode='predict'))
        bare = boxes_of(model.predict(inputs, [DetDataSample()] * 2))
    for boxes in zip(expected, found, by_mode):
        assert len(boxes[0]) and torch.equal(boxes[0], boxes[1])
        assert torch.equal(boxes[0], boxes[2])
    assert len(bare[0]) == 100  # of unknown images; nothing is clipped


def test_loss_without_the_preprocessor(model):
    """As with it: the same losses of the same tensor."""
    model.train()
    data = model.data_preprocessor(
        batch((128, 128), (128, 128), num_classes=2), True)
    plain = [DetDataSample(gt_instances=sample.gt_instances)
             for sample in data['data_samples']]  # yapf: disable
    inputs = data['inputs']
    torch.manual_seed(0)
    expected = model.loss(inputs, data['data_samples'])
    torch.manual_seed(0)
    assert model(inputs, plain, mode='loss') == expected


def test_pipeline_without_resizing(model):
    """Images may keep their size; nothing is divided by a scale."""
    model.eval()
    pipeline = Compose([dict(type='PackDetInputs')])
    image = torch.randint(0, 256, (100, 120, 3), dtype=torch.uint8).numpy()
    item = pipeline(
        dict(
            img=image,
            img_id=0,
            img_path='',
            ori_shape=(100, 120),
            img_shape=(100, 120)))
    assert 'scale_factor' not in item['data_samples']
    data = {key: [value] for key, value in item.items()}
    with torch.no_grad():
        boxes, = boxes_of(model.test_step(copy.deepcopy(data)))
        for sample in data['data_samples']:
            sample.set_metainfo(dict(scale_factor=(1.0, 1.0)))
        expected, = boxes_of(model.test_step(data))
    assert len(boxes) and torch.equal(boxes, expected)
    assert boxes[:, 2].max() <= 120 and boxes[:, 3].max() <= 100


def test_semi_supervised(model):
    """Teacher and student of SemiBaseDetector, from one checkpoint."""
    config = Config.fromfile(LITE0).model
    config.data_preprocessor.pad_size_divisor = 128
    config.bbox_head.num_classes = 2
    config.backbone.init_cfg = None
    semi = MODELS.build(
        ConfigDict(
            type='SemiBaseDetector',
            detector=config,
            data_preprocessor=dict(
                type='MultiBranchDataPreprocessor',
                data_preprocessor=config.data_preprocessor),
            semi_train_cfg=dict(freeze_teacher=True, cls_pseudo_thr=0.0),
            semi_test_cfg=dict(predict_on='teacher')))
    semi.load_state_dict(model.state_dict())
    semi.train()
    inputs, samples = {}, {}
    for branch in ('sup', 'unsup_teacher', 'unsup_student'):
        data = batch((128, 128), (128, 96), num_classes=2)
        inputs[branch] = data['inputs']
        samples[branch] = data['data_samples']
        for sample in samples[branch]:
            sample.set_metainfo(
                dict(
                    homography_matrix=torch.diag(
                        torch.tensor([0.5, 0.5, 1.0])).numpy()))
    data = semi.data_preprocessor(
        dict(inputs=inputs, data_samples=samples), training=True)
    losses = semi(**data, mode='loss')
    assert set(losses) == {
        f'{kind}_loss_{part}'
        for kind in ('sup', 'unsup')
        for part in ('cls', 'bbox')
    }
    total = sum(losses.values())
    total.backward()
    assert total.isfinite() and losses['unsup_loss_bbox'] > 0
    assert all(p.grad is None for p in semi.teacher.parameters())
    assert semi.student.bbox_head.conv_cls.pointwise.weight.grad.any()
    semi.eval()
    data = semi.data_preprocessor(batch((128, 128)))
    with torch.no_grad():
        boxes, = boxes_of(semi(**data, mode='predict'))
        expected, = boxes_of(model.eval()(**data, mode='predict'))
    assert len(boxes) and torch.equal(boxes, expected)
