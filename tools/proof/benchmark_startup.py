"""Time from the start of a training to the end of its first step.

It runs the training of a config in a temporary folder, as MMDetection's
train.py does, and stops it. The first step includes that of the data workers.

Example:
    python tools/proof/benchmark_startup.py \\
        configs/efficientdet/efficientdet_lite0_1xb8_trees.py
    python tools/proof/benchmark_startup.py --images 118287 --boxes 7 \\
        configs/efficientdet/efficientdet_d0_8xb16-300e_coco.py
"""
import argparse
import sys
import time
from collections import Counter

STARTED = time.perf_counter()


def parse_args(argv=None):
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of a training')
    parser.add_argument(
        '--images',
        type=int,
        default=0,
        help='images of a made-up training set in COCO format, with the '
        'classes of the config; all are links to one picture (default: the '
        'data of the config)')
    parser.add_argument(
        '--boxes',
        type=int,
        default=7,
        help='boxes of each made-up image (default: %(default)s)')
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # answers --help before the libraries are imported

import json
import tempfile
from pathlib import Path

import cv2
import mmdet.utils
import numpy as np
from mmdet.datasets import BaseDetDataset
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import METRICS, RUNNERS
from mmengine.runner import Runner

IMPORTED = time.perf_counter()
import mmdet_efficientdet  # noqa: E402,F401

READY = time.perf_counter()


class FirstStep(Exception):
    """The first step has ended."""


class StopHook(Hook):
    """Ends the training after its first step."""

    priority = 'LOWEST'

    def __init__(self, times):
        self.times = times

    def before_train_epoch(self, runner):
        """Notes when the loop starts."""
        self.times['loop'] = time.perf_counter()

    def after_train_iter(self, *args, **kwargs):
        """Raises the exception that ends it."""
        raise FirstStep


def make_data(folder, classes, images, boxes):
    """Writes images of 480x640 pixels and annotation files.

    Args:
        folder (Path): Where to write ``images``, ``train.json`` and, with a
            24th of the images as in COCO, ``val.json``.
        classes (Sequence[str]): Names of the classes.
        images (int): Number of images to train with.
        boxes (int): Boxes of each.
    """
    (folder / 'images').mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (480, 640, 3), np.uint8)
    cv2.imwrite(str(folder / 'one.jpg'), pixels)
    categories = [dict(id=i, name=name) for i, name in enumerate(classes)]
    numbers = range(images), range(images, images + max(1, images // 24))
    for split, part in zip(('train', 'val'), numbers):
        rows, found = [], []
        for number in part:
            name = f'{number:012}.jpg'
            (folder / 'images' / name).symlink_to(folder / 'one.jpg')
            rows.append(dict(id=number, file_name=name, height=480, width=640))
            for x, y, w, h in rng.uniform((0, 0, 9, 9), (500, 350, 130, 130),
                                          (boxes, 4)).round(2).tolist():
                found.append(
                    dict(
                        id=len(found) + 1,
                        image_id=number,
                        category_id=len(found) % len(classes),
                        bbox=[x, y, w, h],
                        area=w * h,
                        iscrowd=0))
        data = dict(images=rows, annotations=found, categories=categories)
        (folder / f'{split}.json').write_text(json.dumps(data))


def use_data(cfg, folder):
    """Trains and validates on the files of :func:`make_data`.

    The backbone starts at random, since its weights may not be at hand.
    """
    cfg.model.backbone.init_cfg = None
    for name in ('train', 'val'):
        cfg[f'{name}_dataloader'].dataset.update(
            ann_file=str(folder / f'{name}.json'),
            data_root='',
            data_prefix=dict(img=str(folder / 'images')))
    cfg.val_evaluator.ann_file = str(folder / 'val.json')
    cfg.test_dataloader, cfg.test_evaluator = \
        cfg.val_dataloader, cfg.val_evaluator


def timed(times, name, owner, attribute):
    """Replaces a function by one that adds its time to ``times``.

    What runs inside another such function counts as that one's.
    """
    function = getattr(owner, attribute)

    def run(*args, **kwargs):
        start = time.perf_counter()
        times['depth'] += 1
        try:
            return function(*args, **kwargs)
        finally:
            times['depth'] -= 1
            if not times['depth']:
                times[name] += time.perf_counter() - start

    setattr(owner, attribute, run)


def start(cfg, folder):
    """Runs the first step.

    Args:
        cfg (Config): Of the training.
        folder (Path): Where to write.

    Returns:
        dict: Name of a part to its seconds, in the order of the table.
    """
    times = Counter()
    cfg.work_dir, cfg.launcher = str(folder / 'run'), 'none'
    begun = time.perf_counter()
    runner = RUNNERS.build(cfg)
    built = time.perf_counter()
    for hook in runner.hooks:
        if type(hook).__module__.startswith('mmdet_efficientdet'):
            for stage in ('before_run', 'before_train'):
                timed(times, 'our hooks', hook, stage)
    runner.register_hook(StopHook(times), priority='LOWEST')
    timed(times, 'data sets', BaseDetDataset, 'full_init')
    timed(times, 'evaluator', METRICS, 'build')
    timed(times, 'weights', Runner, '_init_model_weights')
    try:
        runner.train()
    except FirstStep:
        ended = time.perf_counter()
    loop = times.pop('loop')
    parts = {
        'runner and model': built - begun,
        **{
            key: times[key]
            for key in ('data sets', 'evaluator', 'weights')
        }, 'our hooks, of which most is the pre-flight': times['our hooks']
    }
    parts['the rest before the loop'] = loop - begun - sum(parts.values())
    parts['first step'] = ended - loop
    return parts


def main():
    """Measures and prints."""
    args = parse_args()
    mmdet.utils.register_all_modules()
    cfg = Config.fromfile(args.config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.images:
            classes = DATASETS.get(cfg.train_dataloader.dataset.type).METAINFO
            make_data(folder, classes['classes'], args.images, args.boxes)
            use_data(cfg, folder)
        parts = {
            'import of PyTorch and MMDetection': IMPORTED - STARTED,
            'import of this package': READY - IMPORTED,
            **start(cfg, folder)
        }
    print('\n| part | seconds |\n| --- | ---: |')
    for name, seconds in parts.items():
        print(f'| {name} | {seconds:.2f} |')
    print(f'| all | {sum(parts.values()):.2f} |')


if __name__ == '__main__':
    sys.exit(main())
