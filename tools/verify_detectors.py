"""Show that each config of configs/bifpn trains, tests, infers and exports.

From each config a small one is derived: the trees of tools/prepare_trees.py,
one class, random weights, small images, few queries or regions. The network
is built, trained for a few steps on the same four windows by MMDetection's
train.py and tested by its test.py; DetInferencer looks at the held-out
photograph, and ONNX Runtime computes what the neck does. The optimizer is the
same for all. A row is passed if the losses fall and the neck's outputs agree;
the exit status is 1 if one is not. The first steps do not count: untrained
boxes overlap no tree, so losses that are weighted by IoU begin near zero. What
is done is kept: run the same command again to go on. Prints a Markdown table.

Needs onnx, onnxruntime and, for its ConvNeXt, mmpretrain.
"""
import argparse
import io
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import mmdet
import numpy as np
import onnxruntime
import torch
from mmdet.apis import DetInferencer
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from mmdet_efficientdet.utils import write_file

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = Path(mmdet.__file__).parent / '.mim' / 'tools'
CONFIGS = ROOT / 'configs' / 'bifpn'
DATA = ROOT / 'data' / 'trees'
WINDOW = 400  # pixels, the side of the data's images
NUM_IMAGES = 4  # in every batch
NUM_UNCOUNTED = 10  # steps before those of which the losses are compared
NUM_AVERAGED = 5  # losses at either end of the counted steps
BOUND = 1e-4  # of the ONNX outputs' errors, relative to the largest value
COLUMNS = dict(
    config='config',
    lines='lines',
    parameters='parameters',
    first='first losses',
    last='last losses',
    ap50='AP50',
    boxes='boxes',
    onnx='ONNX difference',
    seconds='time')


def to_random_weights(node) -> None:
    """Makes a model's config one class and all weights trained from scratch.

    Args:
        node (dict | list | any): Changed in place, with all that is in it.
    """
    if isinstance(node, (list, tuple)):
        for value in node:
            to_random_weights(value)
    if not isinstance(node, dict):
        return
    if (node.get('init_cfg') or {}).get('type') == 'Pretrained':
        node['init_cfg'] = None
    if 'num_classes' in node:
        node['num_classes'] = 1
    if node.get('frozen_stages', 0) > 0:
        node['frozen_stages'] = -1
    for key, value in dict(norm_eval=False, requires_grad=True).items():
        if key in node:
            node[key] = value
    for value in node.values():
        to_random_weights(value)


def with_masks(name: str, folder: Path) -> Path:
    """Writes annotations whose masks are the boxes; returns the file."""
    content = json.loads((DATA / name).read_text())
    for annotation in content['annotations']:
        x, y, w, h = annotation['bbox']
        annotation['segmentation'] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    write_file(folder / name, json.dumps(content).encode())
    return folder / name


def derive(config: Path, folder: Path, image_size: int, steps: int) -> Config:
    """The config on the trees, for a training of ``steps`` steps.

    Args:
        config (Path): A config for COCO.
        folder (Path): Where annotations with masks are written.
        image_size (int): Height and width of training images in pixels.
        steps (int): Steps that count.
    """
    cfg = Config.fromfile(config)
    model = cfg.model
    to_random_weights(model)
    model.data_preprocessor.pop('batch_augments', None)
    if 'num_queries' in model:
        # No more than the pixels that they are chosen from
        model.num_queries = model.test_cfg.max_per_img = 50
    if 'rpn_head' in model:
        stages = model.train_cfg.rcnn
        for stage in stages if isinstance(stages, list) else [stages]:
            stage.sampler.num = 64
        model.test_cfg.rpn.max_per_img = 100
    has_masks = 'mask_head' in model.get('roi_head', {})
    for key in ('custom_hooks', 'auto_scale_lr', 'tta_model', 'tta_pipeline'):
        cfg.pop(key, None)

    resize = dict(
        type='Resize', scale_factor=image_size / WINDOW, keep_ratio=True)
    load = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True, with_mask=has_masks)
    ]

    def loader(name: str, pipeline: list, sampler: dict, batch_size: int,
               **options) -> dict:
        ann_file = with_masks(name, folder)
        return dict(
            batch_size=batch_size,
            num_workers=0,
            sampler=sampler,
            dataset=dict(
                type='CocoDataset',
                ann_file=str(ann_file),
                data_prefix=dict(img=str(DATA / 'images')),
                metainfo=dict(classes=('Tree', )),
                pipeline=pipeline,
                **options))

    cfg.train_dataloader = loader(
        'train.json', [
            *load, resize,
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackDetInputs')
        ],
        dict(type='InfiniteSampler'),
        NUM_IMAGES,
        filter_cfg=dict(filter_empty_gt=True),
        indices=NUM_IMAGES)
    cfg.test_dataloader = loader(
        'test.json', [
            load[0], resize, load[1],
            dict(
                type='PackDetInputs',
                meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
                           'scale_factor'))
        ],
        dict(type='DefaultSampler', shuffle=False),
        1,
        test_mode=True)
    cfg.test_evaluator = dict(
        type='CocoMetric',
        ann_file=cfg.test_dataloader['dataset']['ann_file'],
        metric=['bbox', 'segm'] if has_masks else 'bbox')
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.train_cfg = dict(
        type='IterBasedTrainLoop', max_iters=NUM_UNCOUNTED + steps)
    cfg.optim_wrapper = dict(
        type='OptimWrapper',
        optimizer=dict(type='AdamW', lr=5e-4, weight_decay=1e-4),
        clip_grad=dict(max_norm=10))
    cfg.param_scheduler = []
    cfg.default_hooks.logger.interval = 1
    cfg.default_hooks.checkpoint = dict(
        type='mmdet_efficientdet.SafeCheckpointHook',
        by_epoch=False,
        interval=NUM_UNCOUNTED + steps)
    cfg.log_processor = dict(
        type='LogProcessor', window_size=1, by_epoch=False)
    cfg.randomness = dict(seed=0)
    return cfg


def run(script: str, log: Path, *args) -> None:
    """Runs one of MMDetection's scripts.

    Args:
        script (str): Its name under the host's tools.
        log (Path): File that gets its output.
        args: Its command line.

    Raises:
        RuntimeError: If it fails, with the last line of its output.
    """
    with log.open('w') as file:
        code = subprocess.run(
            [sys.executable, SCRIPTS / script, *map(str, args)],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT).returncode
    if code:
        last = log.read_text(errors='replace').strip().split('\n')[-1]
        raise RuntimeError(f'{script}: {last} (see {log})')


def newest(folder: Path, pattern: str) -> Path:
    """The file that was written last."""
    return max(folder.glob(pattern), key=os.path.getmtime)


def train(config: Path, steps: int) -> tuple:
    """Trains; returns the means of the first and last counted losses."""
    folder = config.parent / 'train'
    run('train.py', config.parent / 'train.log', config, '--work-dir', folder)
    lines = newest(folder, '*/vis_data/scalars.json').read_text().splitlines()
    losses = [json.loads(line)['loss'] for line in lines]
    if len(losses) != NUM_UNCOUNTED + steps:
        raise RuntimeError(f'{len(losses)} losses were logged')
    losses = losses[NUM_UNCOUNTED:]
    return np.mean(losses[:NUM_AVERAGED]), np.mean(losses[-NUM_AVERAGED:])


def test(config: Path, checkpoint: Path) -> float:
    """Tests on the held-out photograph; returns its AP50.

    That is 0 where nothing is found, of which the metric says nothing.
    """
    folder = config.parent / 'test'
    run('test.py', config.parent / 'test.log', config, checkpoint,
        '--work-dir', folder)
    scores = json.loads(newest(folder, '*/*.json').read_text())
    return scores.get('coco/bbox_mAP_50', 0.0)


def infer(inferencer: DetInferencer) -> int:
    """Looks at the held-out photograph; returns the number of boxes."""
    file_name = json.loads(
        (DATA / 'test.json').read_text())['images'][0]['file_name']
    found, = inferencer(str(DATA / 'images' / file_name))['predictions']
    if not np.isfinite(found['bboxes'] + [[0] * 4]).all():
        raise RuntimeError('not all boxes are finite')
    return len(found['bboxes'])


@torch.no_grad()
def export(model: torch.nn.Module) -> float:
    """Compares the neck with its ONNX file, on features of noise.

    Returns:
        float: Largest difference of an output, in its largest values.
    """
    torch.manual_seed(0)
    feats = tuple(model.backbone(torch.randn(1, 3, 256, 256)))
    expected = model.neck(feats)
    file = io.BytesIO()
    torch.onnx.export(
        model.neck, (feats, ),
        file,
        input_names=[f'feat{i}' for i in range(len(feats))],
        dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue())
    # An input that the neck leaves out is none of the file's.
    given = {f'feat{i}': feat.numpy() for i, feat in enumerate(feats)}
    outputs = session.run(
        None, {i.name: given[i.name]
               for i in session.get_inputs()})
    if [x.shape for x in outputs] != [tuple(x.shape) for x in expected]:
        raise RuntimeError('the ONNX outputs have other shapes')
    return max(
        (torch.from_numpy(x) - y).abs().max().item() / y.abs().max().item()
        for x, y in zip(outputs, expected))


def verify(config: Path, folder: Path, image_size: int, steps: int) -> dict:
    """Does all with one config.

    Args:
        config (Path): A config for COCO.
        folder (Path): Gets the derived config, logs and the row's file.
        image_size (int): Height and width of training images in pixels.
        steps (int): Of the training.

    Returns:
        dict: A value for each of ``COLUMNS``, as far as it came, and
        ``error``: what went wrong, or an empty string.
    """
    start = time.time()
    receipt = folder / 'row.json'
    row = dict(
        config=config.stem,
        lines=len(config.read_text().splitlines()),
        error='')
    recipe = ''

    def say(what: str) -> None:
        print(f'== {config.stem}: {what}', flush=True)

    try:
        cfg = derive(config, folder.parent / 'annotations', image_size, steps)
        recipe = cfg.pretty_text
        if receipt.is_file():
            kept = json.loads(receipt.read_text())
            if kept.pop('recipe') == recipe and not kept['error']:
                say('done before')
                return kept
        folder.mkdir(parents=True, exist_ok=True)
        derived = folder / f'{config.stem}.py'
        cfg.dump(derived)
        say('building')
        network = MODELS.build(cfg.model)
        row['parameters'] = sum(x.numel() for x in network.parameters())
        say('training')
        row['first'], row['last'] = train(derived, steps)
        say(f'losses {row["first"]:.3f} to {row["last"]:.3f}; testing')
        checkpoint = folder / 'train' / f'iter_{NUM_UNCOUNTED + steps}.pth'
        row['ap50'] = test(derived, checkpoint)
        say('inference and export')
        inferencer = DetInferencer(
            str(derived), str(checkpoint), device='cpu', show_progress=False)
        row['boxes'] = infer(inferencer)
        row['onnx'] = export(inferencer.model)
        if not row['last'] < row['first'] < math.inf:
            raise RuntimeError('the losses did not fall')
        if not row['onnx'] < BOUND:
            raise RuntimeError(f'ONNX differs by {row["onnx"]:.1e}')
        checkpoint.unlink()
    except Exception as error:
        row['error'] = f'{type(error).__name__}: {error}'
        say(row['error'])
    row['seconds'] = time.time() - start
    write_file(receipt,
               json.dumps(dict(row, recipe=recipe), indent=1).encode())
    return row


def table(rows: list) -> str:
    """The rows in Markdown, and below them what went wrong."""
    formats = dict(
        parameters=lambda n: f'{n / 1e6:.1f} M',
        first='{:.3f}'.format,
        last='{:.3f}'.format,
        ap50='{:.3f}'.format,
        onnx='{:.0e}'.format,
        seconds='{:.0f} s'.format)
    lines = [
        '| ' + ' | '.join(COLUMNS.values()) + ' |',
        '|---' + '|--:' * (len(COLUMNS) - 1) + '|'
    ]
    for row in rows:
        lines.append('| ' + ' | '.join(
            formats.get(key, str)(row[key]) if key in row else 'failed'
            for key in COLUMNS) + ' |')
    lines += [
        f'{row["config"]}: {row["error"]}' for row in rows if row['error']
    ]
    return '\n'.join(lines)


def main() -> None:
    """Verifies all configs, or those that are named, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        'configs', nargs='*', help='names, without .py; all by default')
    parser.add_argument(
        '--work-dir', default=ROOT / 'work_dirs' / 'detectors', type=Path)
    parser.add_argument('--image-size', default=128, type=int)
    parser.add_argument('--steps', default=20, type=int)
    args = parser.parse_args()
    names = args.configs or sorted(path.stem for path in CONFIGS.glob('*.py'))
    register_all_modules()
    rows = [
        verify(CONFIGS / f'{name}.py', args.work_dir / name, args.image_size,
               args.steps) for name in names
    ]
    print(table(rows))
    sys.exit(any(row['error'] for row in rows))


if __name__ == '__main__':
    main()
