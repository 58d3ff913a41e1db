"""Verify that each config of configs/bifpn trains, tests, infers and exports.

From each config a small one is derived: the trees of tools/prepare_trees.py,
one class, random weights, small images, few queries or regions. MMDetection's
train.py trains the network for a few steps on the same four images, test.py
tests it, DetInferencer processes the held-out photograph, and ONNX Runtime
runs the exported neck. The optimizer is the same for all configs.

Example:
    python tools/proof/verify_detectors.py retinanet_r50_bifpn_1x_coco

Prints a Markdown table. A config passes if its losses fall and if the
exported neck gives the same outputs; the exit status is 1 if one does not.
The first steps do not count, because losses that are weighted by IoU begin
near zero as long as no box overlaps a tree. The same command resumes where it
was stopped.

Needs the data of tools/prepare_trees.py, onnx, onnxruntime and, for ConvNeXt,
mmpretrain.
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

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'configs' / 'bifpn'


def parse_args(argv=None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'configs',
        nargs='*',
        help='names of configs, without .py (default: all of configs/bifpn)')
    parser.add_argument(
        '--work-dir',
        default=ROOT / 'work_dirs' / 'detectors',
        type=Path,
        help='folder for configs, logs and results (default: '
        'work_dirs/detectors)')
    parser.add_argument(
        '--image-size',
        default=128,
        type=int,
        help='side of training images in pixels (default: %(default)s)')
    parser.add_argument(
        '--steps',
        default=20,
        type=int,
        help='training steps that count (default: %(default)s)')
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # answers --help before the libraries are imported

import mmdet
import numpy as np
import onnxruntime
import torch
from mmdet.apis import DetInferencer
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from small_configs import DATA, NUM_UNCOUNTED, derive
from terminaltables import GithubFlavoredMarkdownTable

from mmdet_efficientdet.utils import write_file

SCRIPTS = Path(mmdet.__file__).parent / '.mim' / 'tools'
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


def report(rows: list) -> str:
    """A Markdown table, and below it the errors."""
    formats = dict(
        parameters=lambda n: f'{n / 1e6:.1f} M',
        first='{:.3f}'.format,
        last='{:.3f}'.format,
        ap50='{:.3f}'.format,
        onnx='{:.0e}'.format,
        seconds='{:.0f} s'.format)
    cells = [[
        formats.get(key, str)(row[key]) if key in row else 'failed'
        for key in COLUMNS
    ] for row in rows]
    errors = [
        f'{row["config"]}: {row["error"]}' for row in rows if row['error']
    ]
    table = GithubFlavoredMarkdownTable([list(COLUMNS.values()), *cells])
    return '\n'.join([table.table, *errors])


def main() -> None:
    """Verifies all configs, or those that are named, and prints the table."""
    args = parse_args()
    names = args.configs or sorted(path.stem for path in CONFIGS.glob('*.py'))
    register_all_modules()
    rows = [
        verify(CONFIGS / f'{name}.py', args.work_dir / name, args.image_size,
               args.steps) for name in names
    ]
    print(report(rows))
    sys.exit(any(row['error'] for row in rows))


if __name__ == '__main__':
    main()
