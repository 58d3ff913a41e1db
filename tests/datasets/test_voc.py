"""Data of VOC: checked as COCO's, and trained on in three lines."""
import re

import check_dataset
import pytest
from helpers.broken_data import find_faults, names_of
from helpers.tiny_data import (CLASSES, LITE0, make_dataset, run_tool,
                               write_config)
from mmengine.config import Config

from mmdet_efficientdet.engine.preflight import input_boxes, read_all

SMALL = {
    'train_dataloader.batch_size': 2,
    'train_dataloader.num_workers': 0,
    'val_dataloader.num_workers': 0,
    'val_dataloader.persistent_workers': False,
    'test_dataloader.num_workers': 0,
    'test_dataloader.persistent_workers': False
}


def write_voc(folder):
    """What a user writes; the data set has the tiny images in both parts."""
    root = make_dataset(folder / 'data')
    (root / 'ImageSets' / 'Main').mkdir(parents=True)
    for split in ('train', 'val'):
        (root / 'ImageSets' / 'Main' / f'{split}.txt').write_bytes(
            (root / 'ids.txt').read_bytes())
    path = folder / 'voc.py'
    path.write_text(f"""_base_ = {str(LITE0)!r}
from mmdet_efficientdet.scaling import scale_config
scale_config(_base_, 'lite0', 64, {CLASSES}, voc={str(root)!r})
""")
    return path


@pytest.fixture
def voc(tmp_path):
    return write_voc(tmp_path)


def test_boxes_are_those_of_coco(voc, tmp_path):
    """The same objects as in the file of COCO, but for its crowd."""
    coco = write_config(tmp_path / 'coco.py', tmp_path / 'data')
    first, second = (
        read_all(Config.fromfile(path).train_dataloader.dataset)[0]
        for path in (voc, coco))
    assert first.usable.sum() == second.usable.sum() + 1
    keep = ~second.crowd
    # VOC counts from 1, and its last pixel is inside the box.
    moved = second.boxes - [0, 0, 1, 1]
    for one, other in ((first.boxes, moved), (first.labels, second.labels),
                       (first.sizes, second.sizes)):
        other = other if one is first.sizes else other[keep]
        one = one if one is first.sizes else one[keep]
        assert one.tolist() == other.tolist()
    assert [path.split('/')[-1] for path in first.paths
            ] == [path.split('/')[-1] for path in second.paths]


@pytest.mark.slow
def test_findings_are_those_of_coco(voc, tmp_path):
    """Classes with few boxes, all of the validation trained on."""
    coco = write_config(tmp_path / 'coco.py', tmp_path / 'data')
    options = SMALL | {'auto_scale_lr': None, 'train_cfg.max_epochs': 300}
    found = [
        {f.name: f.count for f in find_faults(path, options=options)
         if f.name != 'ignored'} for path in (voc, coco)
    ]  # yapf: disable
    assert found[0] == found[1] and found[0]['few_boxes'] == 3
    assert found[0]['overlap'] == 6


@pytest.mark.slow
def test_anchors_are_those_of_coco(voc, tmp_path, capsys):
    """Boxes of the same size at the input, but for one pixel."""
    coco = write_config(tmp_path / 'coco.py', tmp_path / 'data')
    tables = []
    for path in (voc, coco):
        config = Config.fromfile(path)
        parts = read_all(config.train_dataloader.dataset)
        boxes = input_boxes(config, parts)
        assert set(boxes.inputs.flatten()) == {64}
        status = check_dataset.main([str(path), '--no-images'])
        table = capsys.readouterr().out.partition('Anchors')[2]
        tables.append(re.findall(r'^all +(\d+) +([\d.]+)', table, re.M))
        assert status == 0
    (of_voc, recall), = tables[0]
    (of_coco, other), = tables[1]
    assert (int(of_voc), recall) == (int(of_coco) + 1, other)


@pytest.mark.slow
def test_metric_that_inherits_a_file(voc):
    """Every evaluator and data set is built as by the runner."""
    found = find_faults(
        voc,
        images=False,
        options=SMALL | {'val_evaluator.ann_file': 'val.json'})
    errors = [f for f in found if f.error]
    assert names_of(errors) == [('ERROR', 'not_built')]
    for value in ('val_evaluator', 'ann_file', '_delete_=True'):
        assert value in str(errors[0])


@pytest.mark.slow
def test_data_of_the_test(voc):
    """It is built, too, which the training does not do."""
    option = {'test_dataloader.dataset.ann_file': 'nowhere.txt'}
    found = find_faults(voc, images=False, options=SMALL | option)
    error, = (finding for finding in found if finding.error)
    assert names_of([error]) == [('ERROR', 'not_built')]
    assert 'test_dataloader' in error.text and 'nowhere.txt' in error.text


@pytest.mark.slow
def test_training_and_test(voc, tmp_path):
    """By the host's scripts, from three lines."""
    options = [f'{key}={value}' for key, value in SMALL.items()]
    train = run_tool(
        'train.py',
        voc,
        '--work-dir',
        tmp_path / 'run',
        '--cfg-options',
        *options,
        'train_cfg.max_epochs=1',
        'train_cfg.val_interval=1',
        cwd=tmp_path)
    assert train.code == 0, train.output
    assert re.search(r'pascal_voc/mAP: \d', train.output)
    best, = (tmp_path / 'run').glob('best_pascal_voc_mAP_epoch_1.pth')
    done = run_tool(
        'test.py', voc, best, '--cfg-options', *options, cwd=tmp_path)
    assert done.code == 0, done.output
    assert re.search(r'pascal_voc/mAP: \d', done.output)
