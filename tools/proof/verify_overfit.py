"""Show that the detector learns a few pictures of trees by heart.

A sound training can always do this; one whose images, boxes or anchors do not
meet cannot. Windows of tools/prepare_trees.py are trained whole and without
augmentation, by the recipe for trees, and found in the same windows. The exit
status is 1 if AP50 does not reach ``--goal``.
"""
import argparse
import json
import tempfile
import time
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import Runner

ROOT = Path(__file__).resolve().parents[2]
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
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--data', type=Path, default=ROOT / 'data/trees')
    parser.add_argument('--windows', type=int, default=16)
    parser.add_argument('--steps', type=int, default=200, help='at most')
    parser.add_argument('--interval', type=int, default=25, help='of tests')
    parser.add_argument('--goal', type=float, default=0.95)
    args = parser.parse_args(argv)
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
