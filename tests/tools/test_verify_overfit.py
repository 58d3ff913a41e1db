"""tools/proof/verify_overfit.py: trains and tests the same, and says no."""
import numpy as np
import prepare_trees
import pytest
import verify_overfit
from mmdet.registry import DATASETS

BOXES = [(20, 20, 60, 50), (90, 70, 50, 60)]  # xywh in pixels


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A training set of four windows with two trees each."""
    monkeypatch.setattr(prepare_trees, 'SETS',
                        dict(train=(True, (('a', 0, 0, 320, 320), ))))
    pixels = np.random.default_rng(0).integers(90, 160, (320, 320, 3),
                                               np.uint8)
    boxes = [(x + left, y + top, x + left + w, y + top + h) for top in (0, 160)
             for left in (0, 160) for x, y, w, h in BOXES]
    for x0, y0, x1, y1 in boxes:
        pixels[y0:y1, x0:x1] = 20, 120, 20
    (tmp_path / 'images').mkdir()
    prepare_trees.write_set(tmp_path, 'train',
                            dict(a=(pixels, np.array(boxes, float))), 160, 160)
    return tmp_path


def test_trains_whole_windows_as_they_are_tested(data):
    cfg = verify_overfit.make_config(data, 2, 4, 1, 0.95)
    train, val = (
        DATASETS.build(loader.dataset)
        for loader in (cfg.train_dataloader, cfg.val_dataloader))
    assert len(train) == len(val) == 2
    for i, name in enumerate(
        ('a_x0_y0_160x160.png',
         'a_x0_y160_160x160.png')):  # spread over the file
        first, again, tested = train[i], train[i], val[i]
        assert first['data_samples'].img_path.endswith(name)
        assert tested['data_samples'].img_path.endswith(name)
        assert (first['inputs'] == again['inputs']).all()
        assert (first['inputs'] == tested['inputs']).all()
        boxes = first['data_samples'].gt_instances.bboxes.tensor.numpy()
        scale = verify_overfit.IMAGE_SIZE / 160
        expected = [(x, y, x + w, y + h) for x, y, w, h in BOXES]
        np.testing.assert_allclose(boxes, scale * np.array(expected))


@pytest.mark.slow
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
