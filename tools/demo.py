"""Train, test and draw a small detector of trees, from download to picture.

Example:
    python -m mmdet_efficientdet demo

Downloads and prepares the data, trains EfficientDet-Lite0 with MMDetection's
train.py, tests it with test.py on the held-out part and on another site, and
draws the detections in the held-out photograph with DetInferencer. The
training takes about 15 minutes on two cores. The same command resumes an
interrupted training and does not repeat a step that is finished.

Prints AP and AP50 of both sets and the path of the picture. The data is
written to data/trees, everything else to the work directory.
"""
import argparse
import json
import os
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


def run(title: str, log: Path, *command: str) -> None:
    """Runs a command and shows its lines of progress.

    Args:
        title (str): What to tell people.
        log (Path): File that gets all of the output.
        command (str): Script and arguments for this Python.

    Raises:
        SystemExit: If the command fails, with the end of its output.
    """
    print(
        f'== {title}\n   python {" ".join(command)}\n   log: {log}',
        flush=True)
    last = deque(maxlen=30)
    log.parent.mkdir(parents=True, exist_ok=True)
    # One thread: others would wait in the way of the data loaders.
    environment = {'OMP_NUM_THREADS': '1', **os.environ}
    with log.open('w') as file, subprocess.Popen([sys.executable, *command],
                                                 env=environment,
                                                 stdout=subprocess.PIPE,
                                                 stderr=subprocess.STDOUT,
                                                 text=True,
                                                 errors='replace') as process:
        for line in process.stdout:
            file.write(line)
            last.append(line)
            if ' Iter(' in line or 'Resumed epoch' in line:
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
    run('training, about 15 minutes on two cores', work_dir / 'train.log',
        str(SCRIPTS / 'train.py'), CONFIG, '--work-dir', str(work_dir),
        '--resume', *options)
    print(f'   {time.time() - start:.0f} s')
    return checkpoint


def test(work_dir: Path, checkpoint: Path, name: str) -> dict:
    """Tests on one set of the data; returns its AP and AP50."""
    result = work_dir / f'{name}.json'
    if (not result.is_file()
            or result.stat().st_mtime < checkpoint.stat().st_mtime):
        out = work_dir / name
        run(f'test on {name}', work_dir / f'{name}.log',
            str(SCRIPTS / 'test.py'), CONFIG, str(checkpoint), '--work-dir',
            str(out), '--cfg-options',
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
    args = parser.parse_args()
    work_dir = args.work_dir or Path(f'work_dirs/trees_seed{args.seed}')
    work_dir = work_dir.resolve()
    cfg = Config.fromfile(CONFIG)
    check_recipe(work_dir, cfg, args.seed)
    run('data', work_dir / 'data.log', str(TOOLS / 'prepare_trees.py'))
    checkpoint = train(work_dir, cfg, '--cfg-options',
                       f'randomness.seed={args.seed}')
    print(f'== {"set":9}{"AP":>7}{"AP50":>7}')
    for name in ('test', 'osbs'):
        scores = test(work_dir, checkpoint, name)
        print(f'   {name:9}{scores["coco/bbox_mAP"]:7.3f}'
              f'{scores["coco/bbox_mAP_50"]:7.3f}')
    print(f'== picture: {draw(work_dir, checkpoint, 0.3)}')


if __name__ == '__main__':
    main()
