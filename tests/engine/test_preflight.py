"""Every fault is found, alone, before the first step."""
import json
import re
import shutil
from contextlib import nullcontext
from copy import deepcopy
from types import SimpleNamespace

import check_dataset
import cv2
import numpy as np
import pytest
import torch
from helpers.tiny_data import (CONFIGS, IMAGES, make_dataset, run_tool,
                               trained_run, write_config)
from helpers.two_ranks import errors_of_ranks
from mmdet.registry import MODELS, TRANSFORMS
from mmengine.config import Config
from mmengine.registry import HOOKS

from mmdet_efficientdet import AnchorGenerator
from mmdet_efficientdet.datasets.anchor_fit import (InputBoxes, Recall, advise,
                                                    best_iou, recall_table,
                                                    snippet, to_input)
from mmdet_efficientdet.engine.preflight import (PreflightHook, check_anchors,
                                                 check_last_batch,
                                                 check_recipe, read_all)
from mmdet_efficientdet.utils import register_all_modules

COPIES = 6  # of the tiny images, for ten boxes of each class
EXTRA = '''
dataset = dict(
    data_root={root!r},
    ann_file='train.json',
    data_prefix=dict(img='train/'))
train_dataloader = dict(
    batch_size=8, num_workers=0, persistent_workers=False, dataset=dataset)
val_dataloader = dict(dataset=dict(
    data_root={root!r}, ann_file='val.json', data_prefix=dict(img='val/')))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file={root!r} + 'val.json')
test_evaluator = val_evaluator
optim_wrapper = dict(optimizer=dict(lr=0.01))
auto_scale_lr = dict(base_batch_size=8)
'''


@pytest.fixture(scope='module')
def sound(tmp_path_factory):
    """Data and config without a fault."""
    root = make_dataset(tmp_path_factory.mktemp('sound') / 'data')
    (root / 'JPEGImages').rename(root / 'val')
    val = json.loads((root / 'coco.json').read_text())
    (root / 'val.json').write_text(json.dumps(val))
    train = dict(val, images=[], annotations=[])
    (root / 'train').mkdir()
    for copy in range(COPIES):
        for image in val['images']:
            name = f'{copy}_{image["file_name"]}'
            shutil.copy(root / 'val' / image['file_name'],
                        root / 'train' / name)
            train['images'].append(
                dict(image, id=image['id'] + 10 * copy, file_name=name))
        for box in val['annotations']:
            train['annotations'].append(
                dict(
                    box,
                    id=box['id'] + 100 * copy,
                    image_id=box['image_id'] + 10 * copy))
    (root / 'train.json').write_text(json.dumps(train))
    return root


def write_broken(sound, folder, fault):
    """A copy of the data and its config with one fault; returns the config.

    ``fault(train, val, root)`` changes the contents of both files and
    returns lines for the config, or None.
    """
    root = folder / 'data'
    shutil.copytree(sound, root)
    train, val = (
        json.loads((root / f'{name}.json').read_text())
        for name in ('train', 'val'))
    extra = fault(train, val, root) or ''
    (root / 'train.json').write_text(json.dumps(train))
    (root / 'val.json').write_text(json.dumps(val))
    return write_config(
        folder / 'mine.py',
        root,
        image_size=128,
        extra=EXTRA.format(root=f'{root}/') + extra)


# The images of the training, or those of indices, are validated on.
ON_TRAIN = '''
val_dataloader['dataset'].update(dataset{})
val_evaluator = dict(ann_file=dataset['data_root'] + 'train.json')
'''


def bbox(*numbers, box=0):
    """A fault of one box of the training data."""

    def fault(train, val, root):
        train['annotations'][box]['bbox'] = list(numbers)

    return fault


def entry(key, value, number=1, kind='annotations', split=0):
    """A fault of one field of the first entries; None removes it."""

    def fault(*files):
        for item in files[split][kind][:number]:
            if value is None:
                del item[key]
            else:
                item[key] = value

    return fault


def null(key, kind='annotations', split=0):
    """A fault of one field of the first entry, which is there but empty."""

    def fault(*files):
        files[split][kind][0][key] = None

    return fault


def lines(text):
    """A fault of the config."""
    return lambda train, val, root: text


def cover_image(train, val, root):
    train['annotations'][0]['bbox'] = [0, 0, 128, 128]
    train['annotations'][1]['bbox'] = [-10, -10, 150, 150]


def twice(train, val, root):
    train['annotations'].append(dict(train['annotations'][0], id=9999))


def crowded(train, val, root):
    train['annotations'] += [
        dict(
            train['annotations'][0],
            id=5000 + i,
            bbox=[i % 50, 20 + i // 50, 50, 40]) for i in range(100)
    ]


def small(train, val, root):
    for i, item in enumerate(train['annotations']):
        item['bbox'][2:] = [8 + i % 4, 8]


def corners(train, val, root):
    for item in train['annotations']:
        x, y, w, h = item['bbox']
        item['bbox'] = [x, y, x + w, y + h]


def same_image_id(train, val, root):
    train['images'][4]['id'] = 1
    for item in train['annotations']:
        if item['image_id'] == 5:
            item['image_id'] = 1


def no_blue(train, val, root):
    train['annotations'] = [
        item for item in train['annotations'] if item['category_id'] != 25
    ]


def no_annotations(train, val, root):
    train['annotations'] = []


def no_validation(train, val, root):
    val['annotations'] = []


def close_ups(train, val, root):
    for item in train['annotations']:
        item['bbox'] = [0, 0, 128, 128]
    train['images'] = [dict(i, width=128, height=128) for i in train['images']]


def no_picture(train, val, root):
    (root / 'val' / '000003.jpg').write_text('no picture')


def listed_again(train, val, root):
    train['images'].append(dict(train['images'][0], id=9999))


def other_order(train, val, root):
    val['categories'].reverse()
    return """
val_dataloader['dataset']['metainfo'] = dict(classes=('blue', 'green', 'red'))
"""


def evaluated_on(change):
    """A fault: the evaluation has a file with ``change(images)``."""

    def fault(train, val, root):
        content = dict(val, images=change(val['images']))
        (root / 'other.json').write_text(json.dumps(content))
        return f'val_evaluator = dict(ann_file={str(root / "other.json")!r})'

    return fault


def renamed(images, prefix):
    """Images of the same ids with other file names."""
    return [
        dict(image, file_name=prefix + image['file_name']) for image in images
    ]


# Fault, and the level and the name of what is found of it, with words of it.
FAULTS = dict(
    class_names=(lines("train_dataloader['dataset']['metainfo'] = dict("
                       "classes=('Red', 'green', 'blue'))"),
                 'ERROR', "'Red'"),
    num_classes=(lines('model = dict(bbox_head=dict(num_classes=5))'), 'ERROR',
                 'num_classes=5'),
    category_id=(entry('category_id', 0, 5), 'WARNING', '5 boxes'),
    class_order=(other_order, 'ERROR', "('blue', 'green', 'red') in val"),
    evaluator=(evaluated_on(lambda images: renamed(images, '9_')), 'ERROR',
               '6 of 6 images'),
    same_image=(listed_again, 'WARNING', '0_000001.jpg'),
    image_id=(same_image_id, 'ERROR', 'id 1\n'),
    annotation_id=(entry('id', 2), 'ERROR', '    id 2\n'),
    zero_id=(entry('id', 0, split=1), 'WARNING', 'not found'),
    fields=(entry('area', None), 'ERROR', 'annotation 1: area'),
    iscrowd=(entry('iscrowd', None, split=1), 'ERROR', 'val.json: 1 '),
    no_image=(entry('image_id', 777), 'WARNING', '1 boxes'),
    area=(entry('area', 0), 'WARNING', '1 of 54 boxes'),
    empty=(bbox(10, 10, 50, 0), 'WARNING', '(10, 10, 60, 10)'),
    inverted=(bbox(60, 50, -50, -40), 'WARNING', '(60, 50, 10, 10)'),
    outside=(bbox(90, 10, 50, 40), 'WARNING', '(90, 10, 140, 50)'),
    huge=(cover_image, 'WARNING', '2 of 54 boxes'),
    no_validation_boxes=(no_validation, 'WARNING', 'val.json: no box'),
    duplicate=(twice, 'WARNING', 'annotation 9999'),
    box_format=(corners, 'ERROR', 'x1, y1, width, height'),
    max_per_img=(crowded, 'WARNING', '0_000001.jpg: 102 boxes'),
    anchors=(small, 'WARNING', '48 of 48 boxes'),
    few_boxes=(no_blue, 'WARNING', "'blue': 0 boxes"),
    no_boxes=(no_annotations, 'ERROR', 'no box is left'),
    filtered=(lines("dataset['filter_cfg'] = dict(filter_empty_gt=True)"),
              'WARNING', '6 of 36 images'),
    missing=(lambda train, val, root:
             (root / 'train' / '2_000002.jpg').unlink(), 'ERROR',
             '2_000002.jpg'),
    unreadable=(no_picture, 'ERROR', '000003.jpg'),
    image_size=(entry('width', 640, kind='images'), 'WARNING',
                '128x128, the file says 640x128'),
    overlap=(lines(ON_TRAIN.format('')), 'WARNING',
             '36 of 36 images'),
    learning_rate=(lines('auto_scale_lr = dict(base_batch_size=128)'),
                   'WARNING', 'lr=0.000625'),
    batch_norm=(lines("train_dataloader.update(batch_size=7, drop_last=True)\n"
                      'auto_scale_lr = dict(base_batch_size=7)'), 'WARNING',
                'from 7 images'))  # yapf: disable


def report(capsys, *arguments):
    """Exit status, [(level, name)] and text of the tool."""
    status = check_dataset.main([str(argument) for argument in arguments])
    text = capsys.readouterr().out
    return status, re.findall(r'^(ERROR|WARNING) (\w+): ', text, re.M), text


@pytest.mark.parametrize('name', FAULTS)
def test_fault_is_found_alone(name, sound, tmp_path, capsys):
    """One fault gives one finding, and errors a status that is not 0."""
    fault, level, words = FAULTS[name]
    config = write_broken(sound, tmp_path, fault)
    status, found, text = report(capsys, config)
    assert found == [(level, name)], text
    assert words in text
    assert '  fix: ' in text
    assert status == (level == 'ERROR')
    last = text.splitlines()[-1]
    assert last.startswith('VERDICT: this training will fail' if status else
                           'VERDICT: it can train (warnings: 1)')


@pytest.mark.parametrize('fault, name, words', [
    (entry('width', None, kind='images'), 'fields', 'image 1: width'),
    (entry('area', 'large'), 'fields', 'annotation 1: area'),
    (entry('bbox', [1, 2, '3', 4]), 'fields', 'annotation 1: bbox'),
    (entry('bbox', [1, 2, 3]), 'fields', 'annotation 1: bbox'),
    (null('bbox'), 'fields', 'annotation 1: bbox'),
    (entry('bbox', [1, 2, float('nan'), 4]), 'fields', 'annotation 1: bbox'),
    (null('iscrowd', split=1), 'iscrowd', 'val.json: 1 annotations'),
    (null('width', kind='images'), 'fields', 'image 1: width'),
])
def test_fields_that_are_no_numbers(fault, name, words, sound, tmp_path,
                                    capsys):
    config = write_broken(sound, tmp_path, fault)
    status, found, text = report(capsys, config, '--no-images')
    assert (status, ('ERROR', name) in found) == (1, True), text
    assert words in text


def one_of_many(train, val, root):
    """One image, whose box stands in another format and whose size is wrong.

    It is part of a training set of many sound ones.
    """
    part = dict(
        train,
        images=[dict(train['images'][0], width=150)],
        annotations=[
            dict(train['annotations'][0], image_id=1, bbox=[60, 50, 100, 90])
        ])
    (root / 'part.json').write_text(json.dumps(part))
    return """
sound = dict(
    type='CocoDataset', metainfo=dict(classes=('red', 'green', 'blue')),
    pipeline=_base_.train_pipeline, **dataset)
train_dataloader['dataset'] = dict(
    _delete_=True, type='ConcatDataset',
    datasets=[sound, dict(sound, ann_file='part.json')])
"""


@pytest.mark.parametrize('change, level', [
    (lambda images: images[:-1], 'ERROR'),
    (lambda images: [dict(images[0], file_name='a.jpg'), *images[1:]],
     'WARNING'),
    (lambda images: [*renamed(images, 'other/'),
                     dict(images[0], id=99)], None),
])
def test_file_of_the_evaluation(change, level, sound, tmp_path, capsys):
    """It has to have the images of the validation; folders do not count."""

    config = write_broken(sound, tmp_path, evaluated_on(change))
    _, found, text = report(capsys, config, '--no-images')
    assert found == ([(level, 'evaluator')] if level else []), text
    if level:
        assert '1 of 6 images' in text and 'val.json' in text


def test_no_file_for_the_evaluation(sound, tmp_path, capsys):
    config = write_broken(sound, tmp_path,
                          lines("val_evaluator = dict(ann_file='no.json')"))
    status, found, text = report(capsys, config, '--no-images')
    assert (status, found) == (1, [('ERROR', 'evaluator')]), text
    assert 'no.json' in text and 'FileNotFoundError' in text


def test_one_image_does_not_stop_a_training(sound, tmp_path, capsys):
    """What would spoil all of a data set spoils no more than its part."""
    config = write_broken(sound, tmp_path, one_of_many)
    status, found, text = report(capsys, config)
    assert status == 0 and set(found) == {('WARNING', 'outside'),
                                          ('WARNING', 'image_size')}, text


def test_crowd_flags_of_classes_that_are_left_out(sound, tmp_path, capsys):
    """Evaluation reads the annotations of the config's classes only."""

    def fault(train, val, root):
        for item in val['annotations']:
            if item['category_id'] == 25:
                del item['iscrowd']
        return '''
for part in (train_dataloader, val_dataloader):
    part['dataset']['metainfo'] = dict(classes=('red', 'green'))
model = dict(bbox_head=dict(num_classes=2))
'''

    config = write_broken(sound, tmp_path, fault)
    assert report(capsys, config, '--no-images')[:2] == (0, [])


@pytest.mark.parametrize('text, number, level', [
    ('', 6, 'ERROR'),
    ("dataset['indices'] = 3", 6, 'WARNING'),
    (ON_TRAIN.format(', indices=3'), 6, 'ERROR'),
    ("dataset['filter_cfg'] = dict(filter_empty_gt=True)", 6, 'ERROR'),
    ("dataset['filter_cfg'] = dict(filter_empty_gt=True)", 3, None),
])
def test_missing_images_that_are_not_read(text, number, level, sound, tmp_path,
                                          capsys):
    """The third image has no boxes; of the sixth it depends on indices."""

    def fault(train, val, root):
        (root / 'train' / f'0_{number:06}.jpg').unlink()
        return text

    config = write_broken(sound, tmp_path, fault)
    status, found, _ = report(capsys, config)
    assert status == (level == 'ERROR')
    assert ('missing' in [name for _, name in found]) == bool(level)


def test_image_that_is_listed_twice(sound, tmp_path, capsys):
    """The host reads it once, so that nothing is mixed up."""
    config = write_broken(
        sound, tmp_path,
        lambda train, *_: train['images'].append(dict(train['images'][0])))
    assert report(capsys, config, '--no-images')[:2] == (0, [])


def test_area_that_is_no_number(sound, tmp_path, capsys):
    """The host drops boxes of area 0, and keeps these."""
    config = write_broken(sound, tmp_path, entry('area', float('nan'), 54))
    assert report(capsys, config, '--no-images')[:2] == (0, [])


@pytest.mark.parametrize('whole', ['train', 'val'])
def test_part_of_what_is_trained_on(whole, sound, tmp_path, capsys):
    """All images of one file, and some of it: these stand in both."""
    part = dict(train='val', val='train')[whole]
    config = write_broken(
        sound, tmp_path,
        lines(
            ON_TRAIN.format('') + f"{part}_dataloader['dataset'] = dict("
            f"{part}_dataloader['dataset'], indices=30)"))
    found = report(capsys, config, '--no-images')[1]
    assert ('WARNING', 'overlap') in found


def test_parts_of_one_file(sound, tmp_path, capsys):
    """Images that indices choose for two data sets are not the same ones."""
    config = write_broken(
        sound, tmp_path,
        lines(
            ON_TRAIN.format(', indices=[0]') +
            "train_dataloader['dataset'] = dict("
            'dataset, indices=list(range(1, 36)))'))
    assert report(capsys, config, '--no-images')[:2] == (0, [])


@pytest.mark.parametrize('options, gpus, alone', [
    ({}, 1, True),
    ({'train_dataloader.drop_last': True}, 1, False),
    ({'train_dataloader.batch_size': 6}, 1, False),
    ({'train_dataloader.batch_size': 1}, 1, True),
    ({'train_dataloader.sampler.infinite': True}, 1, False),
    ({'train_dataloader.dataset.indices': 8}, 1, False),
    ({'train_dataloader.batch_size': 4}, 4, True),
    ({'train_dataloader.batch_size': 4,
      'train_dataloader.dataset.indices': 36}, 4, True),
    ({'model.neck.norm_cfg': None, 'model.bbox_head.norm_cfg': None}, 1,
     False),
    ({'train_dataloader.batch_size': 4, 'sync_bn': 'torch'}, 4, False),
    ({'sync_bn': 'torch'}, 1, True),
    ({'model.norm_eval': True}, 1, False),
    ({'model.backbone.norm_eval': True}, 1, True),
    ({'train_dataloader.sampler': None}, 1, True),
    ({'train_dataloader.num_batch_per_epoch': 2}, 1, False),
    ({'train_dataloader.batch_sampler': dict(drop_last=True)}, 1, False),
    ({'train_dataloader.batch_sampler': dict(batch_size=5)}, 1, False),
    ({'train_dataloader.batch_size': 5,
      'train_dataloader.batch_sampler': dict(batch_size=4)}, 1, True),
    ({'model.data_preprocessor.pad_size_divisor': 256}, 1, False),
    ({'train_cfg': dict(max_iters=3)}, 1, False),
    ({'train_cfg': dict(max_iters=5)}, 1, True),
    ({'train_dataloader.dataset.pipeline': [
        dict(type='Resize', scale=(100, 128), keep_ratio=False)]}, 1, True),
    ({'train_dataloader.dataset.pipeline': [
        dict(type='Resize', scale=(100, 129), keep_ratio=False)]}, 1, False),
    ({'train_dataloader.dataset.pipeline': [
        dict(type='Resize', scale=(64, 64), keep_ratio=True)]}, 1, False),
])  # yapf: disable
def test_last_batch_of_one_image(options, gpus, alone, sound, tmp_path):
    """33 images, 8 at a time, or 9 on each of 4 GPUs, 4 at a time."""
    fault = lines("train_dataloader['dataset'].update(indices=33)\n"
                  'sync_bn = None')
    config = Config.fromfile(write_broken(sound, tmp_path, fault))
    config.merge_from_dict(options)
    register_all_modules()
    found = check_last_batch(config, MODELS.build(config.model), gpus,
                             config.train_dataloader.dataset)
    assert [(finding.error, finding.name)
            for finding in found] == [(True, 'last_batch')] * alone


@pytest.mark.parametrize('sides, alone',
                         [((64, 128), True), ((64, 256), False),
                          ((256, 64), False)])
def test_last_batch_of_several_files(sides, alone, sound, tmp_path):
    """The image that is alone may be a large one."""
    config = Config.fromfile(write_broken(sound, tmp_path, lines('')))
    config.sync_bn = None
    parts = []
    for side in sides:
        part = deepcopy(config.train_dataloader.dataset)
        part.pipeline[-2].image_size = side
        parts.append(dict(part, indices=4))
    config.train_dataloader.batch_size = 7
    config.train_dataloader.dataset = dict(
        type='ConcatDataset', datasets=parts)
    config.model.data_preprocessor.pad_size_divisor = 1
    register_all_modules()
    assert bool(
        check_last_batch(config, MODELS.build(config.model), 1,
                         config.train_dataloader.dataset)) == alone


@pytest.mark.parametrize('side, fails', [(128, True), (192, False)])
def test_one_pixel_of_one_image(side, fails, sound, tmp_path):
    """The neck raises just where the pre-flight says so."""
    config = Config.fromfile(write_broken(sound, tmp_path, lines('')))
    config.train_dataloader.batch_size = 1
    config.train_dataloader.dataset.pipeline[-2].image_size = side
    config.model.data_preprocessor.pad_size_divisor = side
    register_all_modules()
    model = MODELS.build(config.model)
    assert bool(check_last_batch(config, model, 1, None)) == fails
    image = torch.zeros(1, 3, side, side)
    with pytest.raises(ValueError, match='1x1 pixels') if fails \
            else nullcontext():
        model.bbox_head(model.extract_feat(image))


def test_close_ups_can_be_trained(sound, tmp_path, capsys):
    """Boxes that all cover their images are a warning, also many of them."""
    config = write_broken(sound, tmp_path, close_ups)
    status, found, text = report(capsys, config, '--no-images')
    assert status == 0 and ('WARNING', 'huge') in found, text


def test_datasets_with_readers_of_their_own(sound, tmp_path, capsys):
    """LVIS and Objects365 are no faulty COCO: they are not read."""
    for kind in ('LVISV1Dataset', 'Objects365V2Dataset'):
        folder = tmp_path / kind
        folder.mkdir()
        config = Config.fromfile(write_broken(sound, folder, class_order))
        for loader in (config.train_dataloader, config.val_dataloader):
            loader.dataset.type = kind
        loader = config.train_dataloader
        assert read_all(loader.dataset) == []
        loader.dataset.type = 'CocoDataset'
        assert len(read_all(loader.dataset)) == 1
    config = write_broken(sound, tmp_path, lines(''))
    option = '{}_dataloader.dataset.type=LVISV1Dataset'
    text = report(capsys, config, '--cfg-options',
                  *map(option.format, ('train', 'val')))[2]
    for key in ('train', 'val'):
        assert f'{key}_dataloader is of a format that is not known' in text


def class_order(train, val, root):
    train['categories'].reverse()


@pytest.mark.parametrize('norm, gpus, warns', [('BN', 8, True),
                                               ('SyncBN', 8, False),
                                               ('SyncBN', 1, True)])
def test_norms_over_all_gpus(norm, gpus, warns, sound, tmp_path):
    config = Config.fromfile(write_broken(sound, tmp_path, lines('')))
    config.sync_bn, config.auto_scale_lr = None, None
    config.train_dataloader.batch_size = 2
    model = torch.nn.Sequential(
        dict(BN=torch.nn.BatchNorm2d, SyncBN=torch.nn.SyncBatchNorm)[norm](4))
    assert bool(check_recipe(config, model, gpus)) == warns


@pytest.mark.parametrize('key, value', [('iscrowd', None), ('id', 0)])
def test_truth_from_the_data_needs_no_crowd_flag(key, value, sound, tmp_path,
                                                 capsys):
    """A metric that does not read the file makes flags and ids itself."""
    config = write_broken(sound, tmp_path, entry(key, value, split=1))
    assert report(capsys, config, '--no-images', '--cfg-options',
                  'val_evaluator.ann_file=')[:2] == (0, [])


def test_files_of_another_kind(sound, tmp_path, capsys):
    config = write_broken(sound, tmp_path, lines(''))
    (tmp_path / 'data' / 'train.json').write_text('[1, 2]')
    assert report(capsys, config)[:2] == (1, [('ERROR', 'annotation_file')])
    with pytest.raises(SystemExit):
        report(capsys, config, '--auto-scale-lr', '--cfg-options',
               'auto_scale_lr=None')
    assert 'base_batch_size' in capsys.readouterr().err


def test_no_false_alarm_and_the_picture(sound, tmp_path, capsys):
    """Sound data gives no finding, and its samples are drawn."""
    config = write_broken(sound, tmp_path, lines(''))
    sheet = tmp_path / 'sheet.png'
    status, found, text = report(capsys, config, '--samples', sheet)
    assert (status, found) == (0, []), text
    assert text.splitlines()[-1] == 'VERDICT: nothing was found'
    assert 'reading the images' in text
    assert '48       1.000' in text  # all, of the recall
    image = cv2.imread(str(sheet))
    assert image.shape == (4 * 320, 4 * 320, 3)  # 16 samples
    assert [path.name for path in tmp_path.glob('sheet*')] == ['sheet.png']


def voc_config(root, folder, batch_size=8):
    """The tiny data as VOC, trained on without validation."""
    return write_config(
        folder / 'voc.py',
        root,
        image_size=128,
        extra=f"""
train_dataloader = dict(
    batch_size={batch_size}, num_workers=0, persistent_workers=False,
    dataset=dict(
        type='VOCDataset', data_root={str(root)!r}, ann_file='ids.txt',
        data_prefix=dict(_delete_=True, sub_data_root='')))
val_dataloader = val_cfg = val_evaluator = None
auto_scale_lr = dict(base_batch_size=8)
""")


def test_voc(tmp_path, capsys):
    """Files of VOC are read, too; the format has no (x, y, width, height)."""
    root = make_dataset(tmp_path / 'data')
    names = [f'{i + 1:06}' for i in range(len(IMAGES))] * COPIES
    (root / 'ids.txt').write_text('\n'.join(names))
    config = voc_config(root, tmp_path)
    status, found, text = report(capsys, config)
    assert (status, found) == (0, []), text
    file = root / 'Annotations' / '000002.xml'
    file.write_text(file.read_text().replace('<xmax>80', '<xmax>20'))
    status, found, text = report(capsys, config, '--no-images')
    assert (status, found) == (0, [('WARNING', 'inverted')]), text
    assert f'{COPIES} of 54 boxes' in text
    assert '000002.jpg' in text and '(20, 20, 19, 79)' in text
    assert 'reading the images' not in text


def test_options(sound, tmp_path, capsys):
    """The number of GPUs and --auto-scale-lr change what is right."""
    config = write_broken(sound, tmp_path, lines("sync_bn = 'torch'"))
    options = ['--no-images', '--cfg-options', 'train_dataloader.batch_size=1']
    rate, *norms = [('WARNING', 'learning_rate'), ('WARNING', 'batch_norm'),
                    ('ERROR', 'last_batch')]
    assert report(capsys, config, *options)[1] == [rate, *norms]
    assert report(capsys, config, '--gpus', 8, *options)[1] == []
    assert report(capsys, config, '--auto-scale-lr', *options)[1] == norms
    accumulated = [*options, 'optim_wrapper.accumulative_counts=8']
    assert report(capsys, config, *accumulated)[1] == norms
    assert report(capsys, config, '--gpus', 8, *options,
                  'sync_bn=None')[1] == norms
    # Without batch norms in training there is no group.
    frozen = [f'model.{part}.norm_cfg=None' for part in ('neck', 'bbox_head')]
    assert report(capsys, config, '--auto-scale-lr', *options, *frozen,
                  'model.backbone.norm_eval=True')[1] == []


@pytest.mark.parametrize('batch, warns', [(4, True), (5, False), (15, False),
                                          (16, True)])
def test_rate_of_another_batch(batch, warns, sound, tmp_path, capsys):
    """The recipes for 8 images are also for 4 and 16, with another rate."""
    config = write_broken(sound, tmp_path, lines(''))
    found = report(capsys, config, '--no-images', '--cfg-options',
                   f'train_dataloader.batch_size={batch}')[1]
    assert (('WARNING', 'learning_rate') in found) == warns


def test_no_annotation_file(sound, tmp_path, capsys):
    """A path that leads nowhere is one finding, too."""
    config = write_broken(sound, tmp_path, lines(''))
    option = 'train_dataloader.dataset.ann_file=nowhere.json'
    status, found, text = report(capsys, config, '--cfg-options', option)
    assert (status, found) == (1, [('ERROR', 'annotation_file')])
    assert 'nowhere.json' in text


def test_wrapped_datasets(sound, tmp_path, capsys):
    """Wrappers are looked into; one part may lack what another has."""
    config = write_broken(
        sound, tmp_path,
        lines("""
part = dict(type='CocoDataset', metainfo=dict(classes=('red', 'green', 'blue'))
            , pipeline=_base_.train_pipeline, **dataset)
empty = dict(part, ann_file='empty.json')
train_dataloader['dataset'] = dict(
    _delete_=True, type='RepeatDataset', times=2,
    dataset=dict(type='ConcatDataset', datasets=[part, empty]))
"""))
    root = tmp_path / 'data'
    train = json.loads((root / 'train.json').read_text())
    (root / 'empty.json').write_text(
        json.dumps(dict(train, annotations=[], images=train['images'][:1])))
    assert report(capsys, config, '--no-images')[:2] == (0, [])
    train['annotations'][0]['bbox'][2] = 0
    (root / 'empty.json').write_text(
        json.dumps(dict(train, annotations=train['annotations'][:1])))
    found = report(capsys, config, '--no-images')[1]
    assert found == [('WARNING', 'empty')]  # all boxes of that file


def test_tool_as_a_process(sound, tmp_path):
    """The exit status reaches the shell."""
    source = (CONFIGS.parents[1] / 'tools' / 'check_dataset.py').read_text()
    for name, code in (('sound', 0), ('missing', 1)):
        folder = tmp_path / name
        folder.mkdir()
        fault = FAULTS[name][0] if code else lines('')
        config = write_broken(sound, folder, fault)
        done = run_tool('check_dataset.py', config, cwd=folder, source=source)
        assert done.code == code, done.output
        assert 'VERDICT' in done.output


def test_hook_stops_training(sound, tmp_path):
    """An error stops train.py before the first step; off, it trains."""
    config = write_broken(sound, tmp_path, entry('category_id', 0, 40))
    done = run_tool('train.py', config, cwd=tmp_path)
    assert done.code == 1, done.output
    message = done.output[done.output.index('ValueError: '):]
    assert 'ERROR category_id: ' in message
    assert 'have a category_id that the file does not list' in message
    assert 'Epoch(train)' not in done.output
    options = [
        'default_hooks.preflight.enabled=False', 'train_cfg.max_epochs=1'
    ]
    done = run_tool(
        'train.py', config, '--cfg-options', *options, cwd=tmp_path)
    assert done.code == 0, done.output
    assert 'Epoch(train)' in done.output
    assert 'pre-flight' not in done.output


def test_warnings_do_not_stop(tmp_path_factory):
    """The log has them, and the training goes on to the end."""
    run = trained_run(tmp_path_factory.getbasetemp())
    for name in ('learning_rate', 'batch_norm', 'few_boxes', 'overlap'):
        assert run.output.count(f'pre-flight, {name}: ') == 1
    assert 'could not check' not in run.output
    assert (run.work_dir / 'epoch_2.pth').is_file()


class FirstOnly(PreflightHook):
    """Finds a fault, and must not be asked by another process."""

    def _errors(self, runner):
        assert torch.distributed.get_rank() == 0
        return 'one fault'


def test_all_ranks_stop(tmp_path):
    """The verdict of the first process is that of all."""
    assert errors_of_ranks(FirstOnly().before_train, tmp_path,
                           None) == ['one fault'] * 2


def brute_force(generator, boxes, size, levels=5):
    """The best IoU of each box, by a loop over all anchors."""
    cells = [[-(-n // 2**(3 + i)) for n in size] for i in range(levels)]
    anchors = torch.cat(generator.grid_priors(cells, size)).double().numpy()
    best = []
    for x1, y1, x2, y2 in boxes:
        top = 0.0
        for a1, b1, a2, b2 in anchors:
            inter = max(0,
                        min(x2, a2) - max(x1, a1)) * max(
                            0,
                            min(y2, b2) - max(y1, b1))
            union = (x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - inter
            top = max(top, inter / union)
        best.append(top)
    return best


def random_boxes(low, high, size=512, number=300):
    generator = np.random.default_rng(0)
    sides = np.exp(generator.uniform(np.log(low), np.log(high), (number, 2)))
    corner = generator.uniform(0, 1, (number, 2)) * (size - sides)
    inputs = np.full((number, 2), size)
    return InputBoxes(np.concatenate([corner, corner + sides], 1), inputs)


@pytest.mark.parametrize('size', [[128, 128], [70, 150]])
def test_best_iou_is_exact(size):
    """Looking at one cell of each level loses nothing, at borders neither."""
    generator = AnchorGenerator(3.0)
    boxes = random_boxes(4, 60, 64, 12).boxes
    boxes = np.concatenate([boxes, [[0, 0, 5, 5], [-9, 60, 40, 70]]])
    data = InputBoxes(boxes, np.tile(size, (len(boxes), 1)))
    np.testing.assert_allclose(
        best_iou(generator, data, 5),
        brute_force(generator, boxes, size),
        atol=1e-6)


def test_small_boxes_get_smaller_anchors():
    """Sides of 8 to 12 pixels: anchors of 32 miss them, the proposal not."""
    data, now = random_boxes(8, 12), AnchorGenerator()
    assert Recall.of(best_iou(now, data, 5)).recall == 0
    proposal = advise(now, data, 5)
    after = Recall.of(best_iou(proposal, data, 5))
    # Cells of 8 pixels are too wide apart for more.
    assert after.recall > 0.5
    assert proposal.octave_base_scale < 2
    assert proposal.num_base_priors == now.num_base_priors
    lines = recall_table(data, best_iou(now, data, 5),
                         best_iou(proposal, data, 5))
    assert [line.split()[-4::2]
            for line in lines[1:]] == [['0.000', f'{after.recall:.3f}']] * 2
    cfg = Config.fromstring(snippet(proposal), '.py')
    anchors = cfg.model.bbox_head.anchor_generator
    again = AnchorGenerator(**anchors)
    assert best_iou(again, data, 5).tolist() == best_iou(proposal, data,
                                                         5).tolist()


def test_long_boxes_get_other_aspects():
    """Boxes of 1 to 6 need another shape, not another scale alone."""
    data, now = random_boxes(40, 200), AnchorGenerator()
    corner = data.boxes[:, :2] * 0.5
    long = np.concatenate([corner, corner + [30, 180]], 1)
    data = data._replace(boxes=long)
    proposal = advise(now, data, 5)
    assert Recall.of(best_iou(now, data, 5)).recall < 0.1
    assert Recall.of(best_iou(proposal, data, 5)).recall > 0.9
    assert any(h > 3 * w for w, h in proposal.aspect_pairs)
    assert proposal.num_base_priors == now.num_base_priors


@pytest.mark.parametrize('fitting, missed', [(4, None), (2, 8)])
def test_recall_that_is_too_low(fitting, missed):
    """Below 0.3 the anchors are named; real data has less than 1, too."""
    data, now = random_boxes(8, 12, number=10), AnchorGenerator()
    corner = np.full((fitting, 2), 256 - 16)
    data.boxes[:fitting] = np.concatenate([corner, corner + 32], 1)
    head = SimpleNamespace(prior_generator=now, num_levels=5)
    assert [finding.count for finding in check_anchors(head, data)
            ] == [missed] * bool(missed)


def test_long_class_lists_are_shortened(sound, tmp_path, capsys):
    """The message of 80 wrong names stays readable."""
    names = [f'kind{i}' for i in range(80)]
    config = write_broken(
        sound, tmp_path,
        lines(f"train_dataloader['dataset']['metainfo'] = dict(classes={names}"
              ')\nmodel = dict(bbox_head=dict(num_classes=80))'))
    text = report(capsys, config, '--no-images')[2]
    assert "'kind9', ...)" in text and 'kind10' not in text


def test_fitting_anchors_are_kept():
    """Shapes of the default anchors need no other."""
    now = AnchorGenerator()
    cells = [[512 // 2**(3 + i)] * 2 for i in range(5)]
    anchors = torch.cat(now.grid_priors(cells, [512, 512])).double().numpy()
    boxes = anchors[np.random.default_rng(0).choice(len(anchors), 300)]
    data = InputBoxes(boxes, np.full((300, 2), 512))
    assert advise(now, data, 5) is None


def test_boxes_are_scaled_as_in_testing():
    """ResizeCrop fits, Resize multiplies; inputs are padded."""
    boxes = np.array([[10., 20., 30., 40.]])
    size = np.array([[96., 128.]])  # height, width

    def scale(divisor, **transform):
        return to_input(boxes, size, [TRANSFORMS.build(transform)], divisor)

    fit = scale(64, type='mmdet_efficientdet.ResizeCrop', image_size=64,
                ratio_range=(1., 1.))  # yapf: disable
    assert fit.boxes.tolist() == [[5, 10, 15, 20]]
    assert fit.inputs.tolist() == [[64, 64]]
    more = scale(128, type='Resize', scale_factor=1.5, keep_ratio=True)
    assert more.boxes.tolist() == [[15, 30, 45, 60]]
    assert more.inputs.tolist() == [[256, 256]]
    wide = scale(1, type='Resize', scale=(256, 96), keep_ratio=False)
    assert wide.boxes.tolist() == [[20, 20, 60, 40]]
    assert wide.inputs.tolist() == [[96, 256]]


def test_hook_is_on_by_default():
    """All configs have it; it is built by its prefix."""
    cfg = Config.fromfile(next(CONFIGS.glob('*lite0_8xb16*')))
    hook = HOOKS.build(cfg.default_hooks.preflight)
    assert type(hook) is PreflightHook and hook.enabled
