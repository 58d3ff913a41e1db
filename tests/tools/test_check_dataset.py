"""The report and the sample sheet of check_dataset.py."""
import re

import check_dataset
import cv2
import numpy as np
import pytest
import torch
from helpers.broken_data import lines, write_broken
from helpers.tiny_data import CONFIGS, run_tool
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


def report(capsys, *arguments):
    """Exit status, [(level, name)] and text of the tool."""
    status = check_dataset.main([str(argument) for argument in arguments])
    text = capsys.readouterr().out
    return status, re.findall(r'^(ERROR|WARNING) (\w+): ', text, re.M), text


def test_no_annotation_file(tmp_path, capsys):
    """A path that leads nowhere is one finding, too."""
    config = write_broken(tmp_path, lines(''))
    option = 'train_dataloader.dataset.ann_file=nowhere.json'
    status, found, text = report(capsys, config, '--cfg-options', option)
    assert (status, found) == (1, [('ERROR', 'annotation_file')])
    assert 'nowhere.json' in text


def test_files_of_another_kind(tmp_path, capsys):
    config = write_broken(tmp_path, lines(''))
    (tmp_path / 'data' / 'train.json').write_text('[1, 2]')
    assert report(capsys, config)[:2] == (1, [('ERROR', 'annotation_file')])
    with pytest.raises(SystemExit):
        report(capsys, config, '--auto-scale-lr', '--cfg-options',
               'auto_scale_lr=None')
    assert 'base_batch_size' in capsys.readouterr().err


@pytest.mark.slow
def test_no_false_alarm_and_the_picture(tmp_path, capsys):
    """Sound data gives no finding, and its samples are drawn."""
    config = write_broken(tmp_path, lines(''))
    sheet = tmp_path / 'sheet.png'
    status, found, text = report(capsys, config, '--samples', sheet)
    assert (status, found) == (0, []), text
    assert text.splitlines()[-1] == 'VERDICT: nothing was found'
    assert 'reading the images' in text
    assert 'Proposal' in text
    assert '48       1.000' in text  # all, of the recall
    image = cv2.imread(str(sheet))
    side = 4 * check_dataset.CELL  # of 16 samples
    assert image.shape == (side, side, 3)
    assert [path.name for path in tmp_path.glob('sheet*')] == ['sheet.png']


def test_no_anchors_for_wrong_classes(tmp_path, capsys):
    """Boxes are found by their names, which have to be right first."""
    option = "train_dataloader.dataset.metainfo.classes=['r','green','blue']"
    status, found, text = report(capsys, write_broken(tmp_path, lines('')),
                                 '--no-images', '--cfg-options', option)
    assert status == 1 and ('ERROR', 'class_names') in found
    assert 'Anchors' not in text and 'Proposal' not in text


def remove_image(train, val, root):
    (root / 'train' / '2_000002.jpg').unlink()


@pytest.mark.slow
def test_tool_as_a_process(tmp_path):
    """The exit status reaches the shell."""
    source = (CONFIGS.parents[1] / 'tools' / 'check_dataset.py').read_text()
    config = write_broken(tmp_path, remove_image)
    done = run_tool('check_dataset.py', config, cwd=tmp_path, source=source)
    assert done.code == 1, done.output
    assert 'ERROR missing: ' in done.output and '2_000002.jpg' in done.output
    assert '  fix: ' in done.output
    last = done.output.splitlines()[-1]
    assert last.startswith('VERDICT: this training will fail (errors: 1,')


@pytest.mark.slow
def test_formats_without_a_reader(tmp_path, capsys):
    """What MMDetection has read is checked as well."""
    config = write_broken(tmp_path, lines(''))
    option = '{}_dataloader.dataset.type=Objects365V1Dataset'
    text = report(capsys, config, '--no-images', '--cfg-options',
                  'train_dataloader.batch_size=2',
                  *map(option.format, ('train', 'val')))[2]
    assert 'WARNING learning_rate: ' in text
    assert '48       1.000' in text  # all, of the recall
    assert 'VERDICT: it can train (warnings: 2)' in text
