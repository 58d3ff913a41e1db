"""Verify that the detector can overfit a few images of trees.

A correct training can always overfit; it cannot if images, boxes or anchors
do not match. The detector is trained by the recipe for trees on whole images
of tools/prepare_trees.py, without augmentation, and tested on the same images.

Example:
    python tools/proof/verify_overfit.py

Prints the AP50 and the steps that it took. The exit status is 1 if AP50 stays
below the goal. Needs the data of tools/prepare_trees.py.
"""
import argparse
import json
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def parse_args(argv=None):
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--data',
        type=Path,
        default=ROOT / 'data/trees',
        help='folder that tools/prepare_trees.py has written (default: '
        'data/trees)')
    parser.add_argument(
        '--windows',
        type=int,
        default=16,
        help='number of images (default: %(default)s)')
    parser.add_argument(
        '--steps',
        type=int,
        default=200,
        help='training steps at most (default: %(default)s)')
    parser.add_argument(
        '--interval',
        type=int,
        default=25,
        help='steps from one test to the next (default: %(default)s)')
    parser.add_argument(
        '--goal',
        type=float,
        default=0.95,
        help='AP50 to reach (default: %(default)s)')
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # answers --help before the libraries are imported

from mmengine.config import Config
from mmengine.runner import Runner

CONFIG = ROOT / 'configs/efficientdet/efficientdet_lite0_1xb8_trees.py'
IMAGE_SIZE = 512  # enlarges the windows of 400 px, whose trees are small
SCORE = 'coco/bbox_mAP_50'


def make_config(data, windows, steps, interval, goal):
    """The recipe for trees, on the same windows in training and test."""
    cfg = Config.fromfile(CONFIG)
    images = len(json.loads((data / 'train.json').read_text())['images'])
    spread = [i * images // windows for i in range(windows)]
    resize = dict(type='mmdet_efficientdet.ResizeCrop', image_size=IMAGE_SIZE)
    load, _, annotations, pack = cfg.test_pipeline
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.update(
            data_root=f'{data}/', ann_file='train.json', indices=spread)
    cfg.train_dataloader.dataset.pipeline = [
        cfg.train_pipeline[0], load, annotations, resize,
        dict(type='PackDetInputs')
    ]
    # With their boxes, as the file has those of other windows, too.
    pack.meta_keys = (*pack.meta_keys, 'instances')
    cfg.val_dataloader.dataset.pipeline = [load, resize, annotations, pack]
    cfg.val_evaluator.ann_file = None
    cfg.test_dataloader = cfg.test_evaluator = cfg.test_cfg = None
    cfg.train_cfg.update(max_iters=steps, val_interval=interval)
    cfg.default_hooks.checkpoint = None
    cfg.randomness = dict(seed=0)
    cfg.default_hooks.early_stopping = dict(
        type='EarlyStoppingHook',
        monitor=SCORE,
        stopping_threshold=goal,
        patience=steps)
    return cfg


def main(argv=None):
    """Trains, and prints when the goal was reached."""
    args = parse_args(argv)
    cfg = make_config(args.data.resolve(), args.windows, args.steps,
                      args.interval, args.goal)
    with tempfile.TemporaryDirectory() as cfg.work_dir:
        runner = Runner.from_cfg(cfg)
        start = time.time()
        runner.train()
        seconds = time.time() - start
        trees = sum(
            len(runner.val_dataloader.dataset.get_data_info(i)['instances'])
            for i in range(args.windows))
    reached = runner.message_hub.get_scalar(f'val/{SCORE}').current()
    print(f'{args.windows} windows, {trees} trees: AP50 {reached:.3f} after '
          f'{runner.iter} steps, {seconds:.0f} s')
    if reached < args.goal:
        raise SystemExit(f'verify_overfit.py: AP50 {reached:.3f} is below '
                         f'the goal of {args.goal}')


if __name__ == '__main__':
    main()
