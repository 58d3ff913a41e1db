"""tools/verify_overfit.py: trains and tests the same, and says no."""
import json

import cv2
import numpy as np
import pytest
import verify_overfit
from mmdet.registry import DATASETS

BOXES = [(20, 20, 60, 50), (90, 70, 50, 60)]  # xywh in pixels


@pytest.fixture
def data(tmp_path):
    """A training set of four windows with two trees each."""
    (tmp_path / 'images').mkdir()
    generator = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(4):
        pixels = generator.integers(90, 160, (160, 160, 3), np.uint8)
        for x, y, w, h in BOXES:
            pixels[y:y + h, x:x + w] = 20, 120, 20
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=i + 1,
                    category_id=1,
                    bbox=[x, y, w, h],
                    area=w * h,
                    iscrowd=0))
        cv2.imwrite(str(tmp_path / 'images' / f'{i}.png'), pixels)
        images.append(
            dict(id=i + 1, file_name=f'{i}.png', height=160, width=160))
    (tmp_path / 'train.json').write_text(
        json.dumps(
            dict(
                images=images,
                annotations=annotations,
                categories=[dict(id=1, name='Tree')])))
    return tmp_path


def test_trains_whole_windows_as_they_are_tested(data):
    cfg = verify_overfit.make_config(data, 2, 4, 1, 0.95)
    train, val = (
        DATASETS.build(loader.dataset)
        for loader in (cfg.train_dataloader, cfg.val_dataloader))
    assert len(train) == len(val) == 2
    for i, name in enumerate(('0.png', '2.png')):  # spread over the file
        first, again, tested = train[i], train[i], val[i]
        assert first['data_samples'].img_path.endswith(name)
        assert tested['data_samples'].img_path.endswith(name)
        assert (first['inputs'] == again['inputs']).all()
        assert (first['inputs'] == tested['inputs']).all()
        boxes = first['data_samples'].gt_instances.bboxes.tensor.numpy()
        scale = verify_overfit.IMAGE_SIZE / 160
        expected = [(x, y, x + w, y + h) for x, y, w, h in BOXES]
        np.testing.assert_allclose(boxes, scale * np.array(expected))


def test_says_what_was_reached_and_fails_below_the_goal(
        data, monkeypatch, capsys):
    monkeypatch.setattr(verify_overfit, 'IMAGE_SIZE', 128)
    with pytest.raises(SystemExit, match='below the goal of 0.95'):
        verify_overfit.main([
            '--data',
            str(data), '--windows', '2', '--steps', '2', '--interval', '1'
        ])
    output = capsys.readouterr().out
    assert '2 windows, 4 trees: AP50 0.0' in output
    assert 'after 2 steps' in output
