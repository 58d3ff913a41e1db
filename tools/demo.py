"""Train, test and draw a small detector of trees, from download to picture.

Example:
    python -m mmdet_efficientdet demo

Downloads and prepares the data, trains EfficientDet-Lite0 with MMDetection's
train.py, tests it with test.py on the held-out part and on another site, and
draws the detections in the held-out photograph with DetInferencer. The
training takes about 15 minutes of one core, with --quick 3 minutes. The same
command resumes an interrupted training and does not repeat a step that is
finished.

Prints AP and AP50 of both sets beside those to expect, and the path of the
picture. The data is written to data/trees, everything else to the work
directory.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import deque
from importlib.util import find_spec
from pathlib import Path

from mmengine.config import Config

TOOLS = Path(os.path.relpath(Path(__file__).resolve().parent))
SCRIPTS = Path(find_spec('mmdet').origin).parent / '.mim' / 'tools'
CONFIG = os.path.relpath(
    TOOLS / '../configs/efficientdet/efficientdet_lite0_1xb8_trees.py')
DATA = Path('data/trees')  # where the config expects it
SHOWN = 20  # steps from one line of progress to the next
QUICK = 150  # steps of --quick
# One thread: others would wait in the way of the data loaders. Without the
# limits, glibc would return the memory of each layer, and ask for it again.
ENVIRONMENT = dict(
    OMP_NUM_THREADS='1',
    MALLOC_MMAP_THRESHOLD_=str(2**30),
    MALLOC_TRIM_THRESHOLD_=str(2**31))
# AP50 of seeds 0 to 2, see docs/studies.md; of seed 0 for --quick.
EXPECTED = {
    1200: dict(test=(0.530, 0.454, 0.549), osbs=(0.243, 0.390, 0.253)),
    QUICK: dict(test=(0.434, ), osbs=(0.381, ))
}


def run(title: str, log: Path, *command: str, mode: str = 'w') -> None:
    """Runs a command and shows its lines of progress.

    Args:
        title (str): What to tell people.
        log (Path): File that gets all of the output.
        command (str): Script and arguments for this Python.
        mode (str): 'a' to continue the log. Defaults to 'w'.

    Raises:
        SystemExit: If the command fails, with the end of its output.
    """
    print(
        f'== {title}\n   python {" ".join(command)}\n   log: {log}',
        flush=True)
    last = deque(maxlen=30)
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**ENVIRONMENT, **os.environ}
    steps = 0
    with log.open(mode) as file, subprocess.Popen([sys.executable, *command],
                                                  env=environment,
                                                  stdout=subprocess.PIPE,
                                                  stderr=subprocess.STDOUT,
                                                  text=True,
                                                  errors='replace') as process:
        for line in process.stdout:
            file.write(line)
            last.append(line)
            shown = 'Resumed epoch' in line or ' Iter(' in line
            if ' Iter(train)' in line:
                shown = steps % SHOWN == 0  # the first one at once
                steps += 1
            if shown:
                print('   ' + line.split(' - ')[-1].rstrip(), flush=True)
    if process.returncode:
        raise SystemExit(f'{"".join(last)}\n{title}: failed; all of the '
                         f'output is in {log}. Run the same command again')


def check_recipe(work_dir: Path, cfg: Config, seed: int) -> None:
    """Refuses a folder that has files of another recipe or seed."""
    recipe = f'{cfg.pretty_text}# seed {seed}\n'
    receipt = work_dir / 'recipe.py'
    if receipt.is_file() and receipt.read_text() != recipe:
        raise SystemExit(f'{work_dir} has a training with another recipe or '
                         'seed; remove it, or give another --work-dir')
    work_dir.mkdir(parents=True, exist_ok=True)
    receipt.write_text(recipe)


def train(work_dir: Path, cfg: Config, *options: str) -> Path:
    """Trains, or resumes a training; returns the final checkpoint."""
    checkpoint = work_dir / f'iter_{cfg.train_cfg.max_iters}.pth'
    last = work_dir / 'last_checkpoint'  # written after the file is complete
    if last.is_file() and Path(last.read_text()).name == checkpoint.name:
        print(f'== training is finished: {checkpoint}')
        return checkpoint
    start = time.time()
    minutes = 15 * cfg.train_cfg.max_iters / 1200
    run(f'training, about {minutes:.0f} minutes of one core',
        work_dir / 'train.log',
        str(SCRIPTS / 'train.py'),
        CONFIG,
        '--work-dir',
        str(work_dir),
        '--resume',
        '--cfg-options',
        'default_hooks.logger.interval=1',
        *options,
        mode='a')
    print(f'   {time.time() - start:.0f} s')
    return checkpoint


def test(work_dir: Path, checkpoint: Path, name: str) -> dict:
    """Tests on one set of the data; returns its AP and AP50."""
    result = work_dir / f'{name}.json'
    if (not result.is_file()
            or result.stat().st_mtime < checkpoint.stat().st_mtime):
        out = work_dir / name
        run(f'test on {name}', work_dir / f'{name}.log',
            str(SCRIPTS / 'test.py'), CONFIG, str(checkpoint), '--tta',
            '--work-dir', str(out), '--cfg-options',
            f'test_dataloader.dataset.ann_file={name}.json',
            f'test_evaluator.ann_file={DATA}/{name}.json')
        newest = max(out.glob('*/*.json'), key=os.path.getmtime)
        newest.replace(result)
    return json.loads(result.read_text())


def draw(work_dir: Path, checkpoint: Path, threshold: float) -> Path:
    """Draws the boxes on the held-out photograph; returns the picture."""
    image = json.loads((DATA / 'test.json').read_text())['images'][0]
    picture = work_dir / 'vis' / image['file_name']
    if (not picture.is_file()
            or picture.stat().st_mtime < checkpoint.stat().st_mtime):
        from mmdet.apis import DetInferencer
        inferencer = DetInferencer(CONFIG, str(checkpoint), device='cpu')
        inferencer(
            str(DATA / 'images' / image['file_name']),
            pred_score_thr=threshold,
            out_dir=str(work_dir))
    return picture


def main() -> None:
    """Runs all steps and prints AP, AP50 and the path of the picture."""
    parser = argparse.ArgumentParser(
        prog='python -m mmdet_efficientdet demo',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--work-dir',
        type=Path,
        help='folder for logs, checkpoints and the picture (default: '
        'work_dirs/trees_seed followed by the seed)')
    parser.add_argument(
        '--seed',
        default=0,
        type=int,
        help='seed of everything random (default: %(default)s)')
    parser.add_argument(
        '--quick',
        action='store_true',
        help=f'train for {QUICK} steps only, to see that all works')
    args = parser.parse_args()
    os.environ.update({**ENVIRONMENT, **os.environ})  # of the picture, too
    name = f'trees_{"quick_" * args.quick}seed{args.seed}'
    work_dir = (args.work_dir or Path('work_dirs', name)).resolve()
    cfg = Config.fromfile(CONFIG)
    if args.quick:
        cfg.train_cfg.max_iters = QUICK
        cfg.param_scheduler[0].warmup = QUICK // 15
    steps = cfg.train_cfg.max_iters
    check_recipe(work_dir, cfg, args.seed)
    run('data', work_dir / 'data.log', str(TOOLS / 'prepare_trees.py'))
    checkpoint = train(
        work_dir, cfg, f'randomness.seed={args.seed}',
        f'train_cfg.max_iters={steps}',
        f'param_scheduler.0.warmup={cfg.param_scheduler[0].warmup}')
    found = {
        name: test(work_dir, checkpoint, name)
        for name in ('test', 'osbs')
    }
    print(f'== {"set":9}{"AP":>7}{"AP50":>7}  expected AP50')
    for name, scores in found.items():
        expected = EXPECTED[steps][name]
        print(f'   {name:9}{scores["coco/bbox_mAP"]:7.3f}'
              f'{scores["coco/bbox_mAP_50"]:7.3f}'
              f'  {statistics.mean(expected):.3f} ({min(expected):.3f} to '
              f'{max(expected):.3f})')
    print(f'== picture: {draw(work_dir, checkpoint, 0.3)}')


if __name__ == '__main__':
    main()
