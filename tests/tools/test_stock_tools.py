"""The host's own scripts and inferencer on own data, with no code of ours."""
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import cv2
import mmengine
import numpy as np
import pytest
import torch
from helpers.tiny_data import (CLASSES, COLOURS, CONFIGS, IMAGES, TOOLS,
                               make_dataset, run_tool, trained_run,
                               write_config)
from mmdet.apis import DetInferencer
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.dataset import ConcatDataset
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from mmdet_efficientdet import PreflightHook


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A short training by train.py, shared with other files."""
    return trained_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope='module')
def weights(run):
    return run.work_dir / 'epoch_2.pth'


def losses_in(output):
    """(loss, loss_cls, loss_bbox) of every line of a training log."""
    return [
        tuple(float(n) for n in numbers) for numbers in re.findall(
            r'loss: (\S+)  loss_cls: (\S+)  loss_bbox: (\S+)', output)
    ]


def check_losses(output, steps):
    losses = losses_in(output)
    assert len(losses) == steps
    for total, cls, bbox in losses:
        assert np.isfinite(total) and 0 < cls and 0 <= bbox
        assert total == pytest.approx(cls + bbox, abs=2e-4)


def check_results(path, num_classes=3):
    """The dump of test.py has sound boxes for every image."""
    results = mmengine.load(path)
    assert len(results) == len(IMAGES)
    for result, ((height, width), _) in zip(results, IMAGES):
        found = result['pred_instances']
        assert result['ori_shape'] == (height, width)
        assert 0 < len(found['bboxes']) == len(found['scores']) <= 100
        assert found['bboxes'].isfinite().all()
        assert found['scores'].isfinite().all()
        assert set(found['labels'].tolist()) <= set(range(num_classes))
    return results


@pytest.mark.slow
def test_train_script_as_a_user_calls_it(tmp_path):
    """By name, and resumed by path, an own process trains.

    0.64 for 128 images is 0.01 for the 2 of this batch.
    """
    root = make_dataset(tmp_path / 'data')
    config = write_config(tmp_path / 'mine.py', root)
    options = [
        str(config), '--auto-scale-lr', '--cfg-options',
        'optim_wrapper.optimizer.lr=0.64', 'train_cfg.val_interval=9'
    ]
    starts = [(['-m', 'mmdet_efficientdet', 'train'], []),
              ([str(TOOLS / 'train.py')], ['--resume'])]
    for epochs, (script, resume) in enumerate(starts, 1):
        command = [
            sys.executable, *script, *options,
            f'train_cfg.max_epochs={epochs}', *resume
        ]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=dict(os.environ, PYTHONPATH=str(CONFIGS.parents[1])),
            capture_output=True,
            text=True)
        output = done.stdout + done.stderr
        assert done.returncode == 0, output
        assert 'Scaling the original LR by 0.015625' in output
        check_losses(output, steps=3)
        # Two thirds of the warm-up; the last of 2 epochs, half of it warm-up
        rates = re.findall(r'base_lr: (\S+) lr: (\S+) ', output)
        assert (rates[0], rates[-1]) == [
            (('5.0000e-04', ) * 2, ('6.8333e-03', ) * 2),
            (('0.0000e+00', ) * 2, ('7.5000e-03', ) * 2)
        ][epochs - 1]
        assert 'param_scheduler = [dict(' in output
        saved = tmp_path / 'work_dirs' / 'mine' / f'epoch_{epochs}.pth'
        assert saved.is_file()
    assert 'resumed epoch: 1, iter: 3' in output


def test_training_reports(run):
    """Losses and averages of precision appear in the log as for any model."""
    check_losses(run.output, steps=6)
    assert 'coco/bbox_mAP: ' in run.output
    assert 'do not match' not in run.output
    # mmengine's own words for a parameter without a gradient, and for a NaN
    assert 'find_unused_parameters' not in run.output
    assert 'nan' not in run.output.lower().replace('nanoseconds', '')


@pytest.mark.slow
def test_test_script(run, weights, tmp_path):
    """test.py evaluates, dumps and draws."""
    done = run_tool(
        'test.py',
        run.config,
        weights,
        '--out',
        'dump.pkl',
        '--show-dir',
        'drawn',
        cwd=tmp_path)
    assert done.code == 0, done.output
    assert 'coco/bbox_mAP_50: ' in done.output
    check_results(tmp_path / 'dump.pkl')
    drawn = list(tmp_path.rglob('drawn/*.jpg'))
    assert len(drawn) == len(IMAGES)


@pytest.mark.slow
def test_test_time_augmentation(run, weights, tmp_path):
    """test.py --tta works with no entry for it in the config."""
    done = run_tool(
        'test.py',
        run.config,
        weights,
        '--tta',
        '--out',
        'dump.pkl',
        cwd=tmp_path)
    assert done.code == 0, done.output
    assert 'coco/bbox_mAP: ' in done.output
    check_results(tmp_path / 'dump.pkl')


@pytest.mark.slow
def test_flops_script(tmp_path):
    """get_flops.py gives the official cost of D0, 2,550,618,821.

    It counts two operations for every output of a norm, which the official
    counter does not know, and none for a swish: 1.3 % more. All sizes are
    counted in test_scaling.
    """
    root = make_dataset(tmp_path / 'data')
    config = write_config(tmp_path / 'd0.py', root, 'd0', image_size=512)
    done = run_tool(
        'analysis_tools/get_flops.py',
        config,
        '--num-images',
        1,
        '--cfg-options',
        'model.bbox_head.num_classes=90',
        cwd=tmp_path)
    assert done.code == 0, done.output
    assert 'Input shape: (512, 512)' in done.output
    assert 'Params: 3.88M' in done.output
    flops = float(re.search(r'Flops: ([0-9.]+)G', done.output).group(1))
    assert flops / 2.550618821 == pytest.approx(1.013, abs=0.002)


@pytest.mark.slow
def test_browse_script(run, tmp_path):
    """browse_dataset.py draws what the training pipeline makes."""
    done = run_tool(
        'analysis_tools/browse_dataset.py',
        run.config,
        '--output-dir',
        'drawn',
        '--not-show',
        cwd=tmp_path)
    assert done.code == 0, done.output
    drawn = sorted((tmp_path / 'drawn').iterdir())
    assert [path.name for path in drawn
            ] == [f'{i:06}.jpg' for i in range(1,
                                               len(IMAGES) + 1)]
    for path in drawn:
        image = cv2.imread(str(path))
        assert max(image.shape[:2]) <= 64  # cropped to image_size
        assert image.std() > 5


def test_inferencer_draws(run, weights, tmp_path):
    """DetInferencer returns boxes of the file's size, and a picture."""
    inferencer = DetInferencer(str(run.config), str(weights), device='cpu')
    files = [run.root / 'JPEGImages' / f'{i:06}.jpg' for i in (2, 6)]
    out = inferencer([str(file) for file in files],
                     out_dir=str(tmp_path),
                     pred_score_thr=0.0,
                     no_save_pred=False)
    assert len(out['predictions']) == 2
    for file, result in zip(files, out['predictions']):
        assert len(result['bboxes']) == len(result['labels']) > 0
        assert (tmp_path / 'preds' / f'{file.stem}.json').is_file()
        before = cv2.imread(str(file))
        drawn = cv2.imread(str(tmp_path / 'vis' / file.name))
        assert drawn.shape == before.shape
        assert (cv2.absdiff(drawn, before) > 50).any()
    # An array is as good as a file.
    result, = inferencer(cv2.imread(str(files[0])))['predictions']
    np.testing.assert_allclose(result['scores'],
                               out['predictions'][0]['scores'])


def voc_lines(dataset, folder):
    """What a user adds for annotations as of VOC, in folder/VOC2007."""
    return f'''
dataset = dict(
    type={dataset!r},
    data_root={str(folder) + '/'!r},
    ann_file='VOC2007/ids.txt',
    data_prefix=dict(_delete_=True, sub_data_root='VOC2007/'))
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False, dataset=dataset)
val_dataloader = dict(
    num_workers=0, persistent_workers=False, dataset=dataset)
test_dataloader = val_dataloader
val_evaluator = dict(_delete_=True, type='VOCMetric', eval_mode='area')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1, val_interval=1)
default_hooks = dict(
    logger=dict(interval=1), checkpoint=dict(interval=1, save_best='auto'))
'''


@pytest.mark.slow
@pytest.mark.parametrize('dataset', ['XMLDataset', 'VOCDataset'])
def test_voc_data(dataset, tmp_path):
    """Annotations as of VOC train, and the best checkpoint is data only."""
    root = make_dataset(tmp_path / 'VOC2007')
    config = write_config(
        tmp_path / 'voc.py', root, extra=voc_lines(dataset, tmp_path))
    done = run_tool('train.py', config, cwd=tmp_path)
    assert done.code == 0, done.output
    check_losses(done.output, steps=3)
    assert 'pascal_voc/mAP: ' in done.output
    best, = tmp_path.rglob('best_pascal_voc_mAP_epoch_1.pth')
    saved = torch.load(best, weights_only=True)
    assert saved['meta']['dataset_meta']['classes'] == CLASSES
    assert saved['message_hub']['runtime_info']['best_score'] >= 0


# What is wrong: (arguments of write_config, options, words of the message).
WRONG = dict(
    num_classes=(dict(), ['model.bbox_head.num_classes=5'], [
        'num_classes=5', "3 classes ('red', 'green', 'blue')",
        'scale_config(_base_, ', 'classes=['
    ]),
    name=(dict(classes=('Red', 'green', 'violet')), [],
          ['coco.json', "'Red', 'green', 'violet'", "'red', 'green', 'blue'"]),
    order=(dict(classes=('blue', 'green', 'red')), [], [
        'coco.json', "'blue', 'green', 'red'", "'red', 'green', 'blue'",
        'in the same order'
    ]),
    validation=(dict(), ['val_dataloader.dataset.metainfo.classes=[red,blue]'],
                ['num_classes=3', "2 classes ('red', 'blue')"]),
    string=(dict(classes=('red', )),
            ['train_dataloader.dataset.metainfo.classes=red'
             ], ["classes='red' is a string", "['red']"]),
    voc=(dict(classes=('cat', 'dog', 'cow')), [],
         ['ids.txt', "('cat', 'dog', 'cow')"]))


@pytest.fixture(scope='module')
def wrong_trainings(errors_of_scripts, tmp_path_factory):
    """Their folder, errors by name, and output."""
    folder, calls = tmp_path_factory.mktemp('wrong'), {}
    for name, (kwargs, options, _) in WRONG.items():
        root = make_dataset(folder / name / 'VOC2007')
        if name == 'voc':
            kwargs = dict(extra=voc_lines('XMLDataset', root.parent), **kwargs)
        config = write_config(folder / f'{name}.py', root, **kwargs)
        options = ['--cfg-options', *options] if options else []
        calls[name] = ('train.py', config, *options)
    return folder, *errors_of_scripts(calls, folder)


@pytest.mark.slow
@pytest.mark.parametrize('name', WRONG)
def test_wrong_classes_stop_training(name, wrong_trainings):
    """train.py stops before the first step and says what to write."""
    folder, errors, output = wrong_trainings
    assert errors[name].startswith('ValueError: ')
    for part in WRONG[name][2]:
        assert part in errors[name]
    assert 'Epoch(train)' not in output
    assert not list(folder.rglob('*.pth'))


def test_part_without_objects(tmp_path):
    """Negatives alone tell no classes, but other parts of the data may."""
    init_default_scope('mmdet')
    root = make_dataset(tmp_path / 'VOC2007')
    (root / 'negatives.txt').write_text('000003')
    parts = [
        DATASETS.build(
            dict(
                type='XMLDataset',
                metainfo=dict(classes=CLASSES),
                data_root=str(tmp_path),
                ann_file=f'VOC2007/{name}.txt',
                data_prefix=dict(sub_data_root='VOC2007/')))
        for name in ('negatives', 'ids')
    ]
    loader = SimpleNamespace(dataset=ConcatDataset(parts))
    head = SimpleNamespace(num_classes=3)
    hook = PreflightHook(enabled=False)
    runner = SimpleNamespace(
        cfg={},
        hooks=[hook],
        logger=SimpleNamespace(warning=print),
        train_dataloader=loader,
        val_loop=None,
        model=SimpleNamespace(bbox_head=head))
    hook.before_train(runner)
    loader.dataset = parts[0]
    with pytest.raises(ValueError, match='negatives.txt: no box'):
        hook.before_train(runner)


@pytest.mark.parametrize('kind, stops', [('CocoDataset', True),
                                         ('Objects365V1Dataset', False)])
def test_order_in_the_file(kind, stops, tmp_path):
    """Objects365 sorts the categories by their ids; COCO does not."""
    init_default_scope('mmdet')
    root = make_dataset(tmp_path)
    content = mmengine.load(root / 'coco.json')
    content['categories'].sort(key=lambda c: -c['id'])
    mmengine.dump(content, root / 'coco.json')
    dataset = DATASETS.build(
        dict(
            type=kind,
            metainfo=dict(classes=CLASSES),
            data_root=str(root),
            ann_file='coco.json',
            data_prefix=dict(img='JPEGImages/')))
    hook = PreflightHook(enabled=False)
    runner = SimpleNamespace(
        cfg={},
        hooks=[hook],
        logger=SimpleNamespace(warning=print),
        train_dataloader=SimpleNamespace(dataset=dataset),
        val_loop=None,
        model=SimpleNamespace(bbox_head=SimpleNamespace(num_classes=3)))
    with pytest.raises(ValueError, match='in the same order') if stops \
            else nullcontext():
        hook.before_train(runner)


@pytest.mark.slow
def test_wrong_class_count_stops_testing(run, weights, tmp_path):
    """test.py names both counts when the config has other classes."""
    done = run_tool(
        'test.py',
        run.config,
        weights,
        '--cfg-options',
        'model.bbox_head.num_classes=5',
        cwd=tmp_path)
    assert done.code == 1
    assert 'predicts 3 classes, this model 5.' in done.output
    assert 'Epoch(test)' not in done.output


@pytest.mark.slow
def test_one_class(tmp_path):
    """A single class trains and is evaluated, as the other boxes vanish."""
    root = make_dataset(tmp_path / 'data')
    config = write_config(
        tmp_path / 'one.py',
        root,
        classes=('green', ),
        extra='train_cfg = dict(max_epochs=1, '
        'val_interval=1)')
    done = run_tool('train.py', config, cwd=tmp_path)
    assert done.code == 0, done.output
    check_losses(done.output, steps=3)
    assert 'coco/bbox_mAP: ' in done.output
    saved, = tmp_path.rglob('epoch_1.pth')
    state_dict = torch.load(saved, weights_only=True)['state_dict']
    assert state_dict['bbox_head.conv_cls.pointwise.bias'].shape == (9, )


def test_what_the_network_sees(run):
    """Every image is kept, with its boxes in place and its crowd marked.

    The fourth image is 128 x 96 and is reduced by half to 64 x 48. The colour
    in the middle of a box is that of its class.
    """
    init_default_scope('mmdet')
    config = Config.fromfile(run.config)
    loader = Runner.build_dataloader(config.train_dataloader)
    assert len(loader.dataset) == len(IMAGES)
    # Of an image without boxes nothing is left, however it is cropped.
    assert not len(loader.dataset[2]['data_samples'].gt_instances)
    assert any(
        len(loader.dataset[i]['data_samples'].gt_instances)
        for i in (0, 1, 3, 4, 5))

    dataset = Runner.build_dataloader(config.val_dataloader).dataset
    crowd = dataset[4]['data_samples']
    assert len(crowd.gt_instances) == len(crowd.ignored_instances) == 1
    item = dataset[3]
    sample = item['data_samples']
    assert item['inputs'].shape == (3, 64, 48)
    assert sample.scale_factor == (0.5, 0.5)
    # As annotated, (5, 60, 50, 50) and (50, 5, 40, 40): for evaluation, boxes
    # stay those of the original image.
    boxes = sample.gt_instances.bboxes.tensor.tolist()
    assert boxes == [[5, 60, 55, 110], [50, 5, 90, 45]]
    assert sample.gt_instances.labels.tolist() == [0, 2]
    for (x1, y1, x2, y2), label in zip(boxes, (0, 2)):
        bgr = item['inputs'][:, int(y1 + y2) // 4, int(x1 + x2) // 4]
        expected = torch.tensor(COLOURS[label][::-1])
        assert (bgr - expected).abs().max() < 25  # the images are JPEG
