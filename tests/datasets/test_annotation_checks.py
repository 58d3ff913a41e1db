"""Every fault of annotation files and images is found, alone."""
import json

import numpy as np
import pytest
from helpers.broken_data import (COPIES, ON_TRAIN, bbox, entry, find_faults,
                                 lines, names_of, null, text_of, voc_config,
                                 write_broken)
from helpers.tiny_data import IMAGES, make_dataset
from mmengine.config import Config

from mmdet_efficientdet.datasets.findings import TABLE
from mmdet_efficientdet.engine.preflight import read_all


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


def supercategory(train, val, root):
    """What Roboflow exports: the name again, with an id that no box has."""
    train['categories'].insert(0, dict(id=0, name='red'))


def one_id(train, val, root):
    train['categories'][1]['id'] = 5  # that of red
    for item in train['annotations']:
        item['category_id'] = min(item['category_id'], 5)


def nothing_listed(train, val, root):
    train.update(images=[], annotations=[])


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


PARITY = '''
model['data_preprocessor'] = dict(pad_size_divisor=8)
test_dataloader = dict(dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(104, 104), keep_ratio=True),
    dict(type='PackDetInputs')], **val_dataloader['dataset']))
'''

# Fault, and the level of what is found of it, with the values that it shows
FAULTS = dict(
    class_names=(lines("train_dataloader['dataset']['metainfo'] = dict("
                       "classes=('Red', 'green', 'blue'))"),
                 'ERROR', "'Red'"),
    not_built=(lines("test_evaluator = dict(type='VOCMetric')"), 'ERROR',
               "test_evaluator cannot be built: TypeError: "),
    no_steps=(lines('train_dataloader.update(batch_size=40, drop_last=True)\n'
                    'auto_scale_lr = dict(base_batch_size=40)'), 'ERROR',
              '36 images do not fill a batch of 40'),
    few_images=(lines("dataset['indices'] = 29"), 'WARNING', '29 training'),
    steps=(lines("model['neck'] = model['bbox_head'] = dict(norm_cfg=dict("
                 'momentum=0.1))\ntrain_cfg = dict(max_epochs=59)'),
           'WARNING', 'max_epochs=60'),
    cold_norms=(lines('train_cfg = dict(max_epochs=199)'), 'WARNING',
                'of neck, bbox_head'),
    warmup=(lines("param_scheduler = [dict(type='mmdet_efficientdet."
                  "WarmupCosineLR', warmup=31, convert_to_iter_based=True)]"),
            'WARNING', "WarmupCosineLR', warmup=75, by_epoch=False)]"),
    ema=(lines("default_hooks['ema'] = dict(_delete_=True, type='EMAHook')"),
         'WARNING', '86% of the averaged'),
    workers=(lines("train_dataloader['num_workers'] = 1000"), 'WARNING',
             '1000 workers'),
    parity=(lines(PARITY), 'WARNING', '128 x 128 pixels'),
    num_classes=(lines('model = dict(bbox_head=dict(num_classes=5))'), 'ERROR',
                 'num_classes=5'),
    misread=(lines("train_dataloader['dataset']['pipeline'] = ["
                   '*_base_.train_pipeline[:-1], dict(type="YOLOXHSVRandomAug"'
                   '), _base_.train_pipeline[-1]]'), 'ERROR',
             'YOLOXHSVRandomAug'),
    category_id=(entry('category_id', 0, 5), 'WARNING', '5 boxes'),
    class_order=(other_order, 'ERROR', "('blue', 'green', 'red')"),
    evaluator=(evaluated_on(lambda images: renamed(images, '9_')), 'ERROR',
               '6 of 6 images'),
    same_image=(listed_again, 'WARNING', '0_000001.jpg'),
    image_id=(same_image_id, 'ERROR', 'id 1\n'),
    annotation_id=(entry('id', 2), 'ERROR', '    id 2\n'),
    zero_id=(entry('id', 0, split=1), 'WARNING', 'id 0'),
    fields=(entry('area', None), 'ERROR', 'annotation 1: '),
    iscrowd=(entry('iscrowd', None, split=1), 'ERROR', 'val.json: 1 '),
    no_images=(nothing_listed, 'ERROR', 'train.json'),
    category_names=(supercategory, 'ERROR', "'red': ids [0, 5]"),
    category_ids=(one_id, 'ERROR', 'id 5\n'),
    text_id=(entry('id', 'a1', split=1), 'ERROR', "id 'a1'"),
    ignored=(entry('iscrowd', 1, 3), 'WARNING', '3 of 48 boxes'),
    no_image=(entry('image_id', 777), 'WARNING', '1 boxes'),
    area=(entry('area', 0), 'WARNING', '1 of 48 boxes'),
    empty=(bbox(10, 10, 50, 0), 'WARNING', '(10, 10, 60, 10)'),
    inverted=(bbox(60, 50, -50, -40), 'WARNING', '(60, 50, 10, 10)'),
    outside=(bbox(90, 10, 50, 40), 'WARNING', '(90, 10, 140, 50)'),
    huge=(cover_image, 'WARNING', '2 of 48 boxes'),
    no_validation_boxes=(no_validation, 'WARNING', 'val.json'),
    duplicate=(twice, 'WARNING', 'annotation 9999'),
    box_format=(corners, 'ERROR', '(x1, y1, width, height)'),
    max_per_img=(crowded, 'WARNING', '0_000001.jpg: 102 boxes'),
    anchors=(small, 'WARNING', '48 of 48 boxes, of 3 classes'),
    few_boxes=(no_blue, 'WARNING', "'blue': 0 boxes"),
    no_boxes=(no_annotations, 'ERROR', 'train.json'),
    filtered=(lines("dataset['filter_cfg'] = dict(filter_empty_gt=True)"),
              'WARNING', '6 of 36 images'),
    missing=(lambda train, val, root:
             (root / 'train' / '2_000002.jpg').unlink(), 'ERROR',
             '2_000002.jpg'),
    unreadable=(no_picture, 'ERROR', '000003.jpg'),
    image_size=(entry('width', 640, kind='images'), 'WARNING',
                '128x128, the file says 640x128'),
    overlap=(lines(ON_TRAIN.format('')), 'WARNING',
             '36 of 36'),
    learning_rate=(lines('auto_scale_lr = dict(base_batch_size=128)'),
                   'WARNING', 'lr=0.000625'),
    batch_norm=(lines("train_dataloader.update(batch_size=7, drop_last=True)\n"
                      'auto_scale_lr = dict(base_batch_size=7)'), 'WARNING',
                '7 images'))  # yapf: disable


def test_every_finding_is_tested():
    """Those that need no data with a fault are tested with their checks."""
    others = ['annotation_file', 'last_batch', 'threads']
    assert set(TABLE) == {*FAULTS, *others}


@pytest.mark.parametrize('name', FAULTS)
def test_fault_is_found_alone(name, tmp_path):
    """One fault gives one finding, of one level, with a fix."""
    fault, level, value = FAULTS[name]
    finding, = find_faults(write_broken(tmp_path, fault))
    assert names_of([finding]) == [(level, name)], str(finding)
    assert value in str(finding)
    assert finding.fix and f'fix: {finding.fix}' in str(finding)


def no_object(kind):
    return lambda train, *_: train[kind].append('text')


@pytest.mark.parametrize('fault, name, values', [
    (entry('width', None, kind='images'), 'fields', ['image 1', 'width']),
    (entry('area', 'large'), 'fields', ['annotation 1', 'area']),
    (entry('bbox', [1, 2, '3', 4]), 'fields', ['annotation 1', 'bbox']),
    (entry('bbox', [1, 2, 3]), 'fields', ['annotation 1', 'bbox']),
    (null('bbox'), 'fields', ['annotation 1', 'bbox']),
    (entry('bbox', [1, 2, float('nan'), 4]), 'fields',
     ['annotation 1', 'bbox', 'nan']),
    (null('iscrowd', split=1), 'iscrowd', ['val.json', '1 annotations']),
    (null('width', kind='images'), 'fields', ['image 1', 'width']),
    (entry('width', '128', kind='images'), 'fields', ['image 1', 'width']),
    (entry('height', float('nan'),
           kind='images'), 'fields', ['image 1', 'height=nan']),
    (entry('id', None), 'fields', ['annotation number 1', '`id`']),
    (null('id'), 'fields', ['annotation number 1', '$.id']),
    (entry('id', [1]), 'fields', ['annotation [1]', '$.id']),
    (entry('image_id', {}), 'fields', ['annotation 1', '$.image_id']),
    (null('image_id'), 'no_image', ['1 boxes', 'annotation 1']),
    (null('category_id'), 'category_id', ['1 boxes', 'annotation 1']),
    (no_object('images'), 'fields', ['image number 37', 'object']),
    (no_object('annotations'), 'fields', ['annotation number 49', 'object']),
])
def test_fields_that_are_no_numbers(fault, name, values, tmp_path):
    found = find_faults(write_broken(tmp_path, fault), images=False)
    finding, = (finding for finding in found if finding.name == name)
    assert finding.error == (name in ('fields', 'iscrowd'))
    for value in values:
        assert value in str(finding)


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
def test_file_of_the_evaluation(change, level, tmp_path):
    """It has to have the images of the validation; folders do not count."""
    found = find_faults(
        write_broken(tmp_path, evaluated_on(change)), images=False)
    assert names_of(found) == [(level, 'evaluator')] * bool(level)
    for finding in found:
        assert '1 of 6 images' in finding.text and 'val.json' in finding.fix


def test_no_file_for_the_evaluation(tmp_path):
    config = write_broken(tmp_path,
                          lines("val_evaluator = dict(ann_file='no.json')"))
    finding, = find_faults(config, images=False)
    assert names_of([finding]) == [('ERROR', 'not_built')]
    for value in ('val_evaluator', 'no.json', 'FileNotFoundError'):
        assert value in finding.text


def test_one_image_does_not_stop_a_training(tmp_path):
    """What would spoil all of a data set spoils no more than its part."""
    found = find_faults(write_broken(tmp_path, one_of_many))
    assert set(names_of(found)) == {('WARNING', 'outside'),
                                    ('WARNING', 'image_size')}


def test_crowd_flags_of_classes_that_are_left_out(tmp_path):
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

    assert not find_faults(write_broken(tmp_path, fault), images=False)


@pytest.mark.parametrize('text, number, level', [
    ('', 6, 'ERROR'),
    ("dataset['indices'] = 3", 6, 'WARNING'),
    (ON_TRAIN.format(', indices=3'), 6, 'ERROR'),
    ("dataset['filter_cfg'] = dict(filter_empty_gt=True)", 6, 'ERROR'),
    ("dataset['filter_cfg'] = dict(filter_empty_gt=True)", 3, None),
])
def test_missing_images_that_are_not_read(text, number, level, tmp_path):
    """The third image has no boxes; of the sixth it depends on indices."""

    def fault(train, val, root):
        (root / 'train' / f'0_{number:06}.jpg').unlink()
        return text

    found = names_of(find_faults(write_broken(tmp_path, fault)))
    levels = [level for level, name in found if name == 'missing']
    assert levels[:1] == [level] * bool(level)
    assert (level == 'ERROR') == ('ERROR' in dict(found))


def test_image_that_is_listed_twice(tmp_path):
    """The host reads it once, so that nothing is mixed up."""
    config = write_broken(
        tmp_path,
        lambda train, *_: train['images'].append(dict(train['images'][0])))
    assert not find_faults(config, images=False)


def test_area_that_is_no_number(tmp_path):
    """The host drops boxes of area 0, and keeps these."""
    config = write_broken(tmp_path, entry('area', float('nan'), 54))
    assert not find_faults(config, images=False)


@pytest.mark.parametrize('whole', ['train', 'val'])
def test_part_of_what_is_trained_on(whole, tmp_path):
    """All images of one file, and some of it: these stand in both."""
    part = dict(train='val', val='train')[whole]
    config = write_broken(
        tmp_path,
        lines(
            ON_TRAIN.format('') + f"{part}_dataloader['dataset'] = dict("
            f"{part}_dataloader['dataset'], indices=30)"))
    found = names_of(find_faults(config, images=False))
    assert ('WARNING', 'overlap') in found


@pytest.mark.slow
def test_parts_of_one_file(tmp_path):
    """Images that indices choose for two data sets are not the same ones."""
    config = write_broken(
        tmp_path,
        lines(
            ON_TRAIN.format(', indices=[0]') +
            "train_dataloader['dataset'] = dict("
            'dataset, indices=list(range(1, 36)))'))
    assert not find_faults(config, images=False)


@pytest.mark.slow
def test_close_ups_can_be_trained(tmp_path):
    """Boxes that all cover their images are a warning, also many of them."""
    found = find_faults(write_broken(tmp_path, close_ups), images=False)
    assert ('WARNING', 'huge') in names_of(found)
    assert not any(finding.error for finding in found), text_of(found)


def test_datasets_with_readers_of_their_own(tmp_path):
    """Objects365 sorts classes: what the host has read of it is checked."""
    config = Config.fromfile(write_broken(tmp_path, class_order))
    dataset = config.train_dataloader.dataset
    first, = read_all(dataset)
    dataset.type = 'Objects365V2Dataset'
    dataset.metainfo.classes = ('blue', 'green', 'red')
    second, = read_all(dataset)
    assert first.categories and second.categories is None
    for field in ('boxes', 'image', 'sizes', 'usable', 'paths'):
        np.testing.assert_array_equal(
            getattr(first, field), getattr(second, field))


def class_order(train, val, root):
    train['categories'].reverse()


@pytest.mark.slow
@pytest.mark.parametrize('key, value', [('iscrowd', None), ('id', 0)])
def test_truth_from_the_data_needs_no_crowd_flag(key, value, tmp_path):
    """A metric that does not read the file makes flags and ids itself."""
    config = write_broken(tmp_path, entry(key, value, split=1))
    assert not find_faults(
        config, images=False, options={'val_evaluator.ann_file': None})


@pytest.mark.slow
def test_voc(tmp_path):
    """Files of VOC are read too; the format has no (x, y, width, height)."""
    root = make_dataset(tmp_path / 'data')
    names = [f'{i + 1:06}' for i in range(len(IMAGES))] * COPIES
    (root / 'ids.txt').write_text('\n'.join(names))
    config = voc_config(root, tmp_path)
    assert not find_faults(config)
    file = root / 'Annotations' / '000002.xml'
    file.write_text(file.read_text().replace('<xmax>80', '<xmax>20'))
    finding, = find_faults(config, images=False)
    assert names_of([finding]) == [('WARNING', 'inverted')]
    assert f'{COPIES} of 54 boxes' in finding.text
    assert '000002.jpg' in finding.examples[0]
    assert '(20, 20, 19, 79)' in finding.examples[0]


@pytest.mark.slow
def test_voc_boxes_that_are_ignored(tmp_path):
    """Both kinds are counted; in testing they are no fault."""
    root = make_dataset(tmp_path / 'data')
    names = [f'{i + 1:06}' for i in range(len(IMAGES))] * COPIES
    (root / 'ids.txt').write_text('\n'.join(names))
    file = root / 'Annotations' / '000001.xml'
    file.write_text(file.read_text().replace('<difficult>0', '<difficult>1'))
    config = Config.fromfile(voc_config(root, tmp_path))
    dataset = config.train_dataloader.dataset
    dataset.filter_cfg.bbox_min_size = 42  # of one box in each other image
    config.dump(tmp_path / 'min.py')
    ignored, = (
        finding for finding in find_faults(tmp_path / 'min.py', images=False)
        if finding.name == 'ignored')
    small = sum(
        min(box[3:]) - 1 < 42 for _, boxes in IMAGES[1:] for box in boxes)
    assert f'{COPIES * (2 + small)} of 54 boxes' in ignored.text
    assert 'background' in ignored.text and not ignored.error


def test_ignored_boxes_that_cost_nothing(tmp_path):
    config = write_broken(tmp_path, entry('iscrowd', 1, 3))
    assert not find_faults(
        config, images=False, options={'model.bbox_head.ignore_iof_thr': 0.5})


def test_crowds_of_a_test_are_no_fault(tmp_path):
    config = write_broken(tmp_path, entry('iscrowd', 1, 3, split=1))
    assert not find_faults(config, images=False)


@pytest.mark.slow
def test_wrapped_datasets(tmp_path):
    """Wrappers are looked into; one part may lack what another has."""
    config = write_broken(
        tmp_path,
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
    assert not find_faults(config, images=False)
    train['annotations'][0]['bbox'][2] = 0
    (root / 'empty.json').write_text(
        json.dumps(dict(train, annotations=train['annotations'][:1])))
    found = find_faults(config, images=False)
    assert names_of(found) == [('WARNING', 'empty')]  # all boxes of that file


def test_control_characters_are_not_printed(tmp_path):
    """Names and ids of a file may hold commands for the terminal."""

    def fault(train, val, root):
        train['images'][0]['file_name'] = '\x1b[31m.jpg'
        train['annotations'][0].update(id='\x1b]0;', bbox=[60, 50, -50, -40])
        train['annotations'][1]['id'] = '\x1b]0;'

    found = find_faults(write_broken(tmp_path, fault), images=False)
    text = text_of(found)
    assert 'inverted' in text and 'annotation_id' in text
    assert '\\x1b[31m.jpg' in text and '\x1b' not in text


def test_long_class_lists_are_shortened(tmp_path):
    """The message of 80 wrong names stays readable."""
    names = [f'kind{i}' for i in range(80)]
    config = write_broken(
        tmp_path,
        lines(f"train_dataloader['dataset']['metainfo'] = dict(classes={names}"
              ')\nmodel = dict(bbox_head=dict(num_classes=80))'))
    text = text_of(find_faults(config, images=False))
    assert "'kind9', ...)" in text and 'kind10' not in text
