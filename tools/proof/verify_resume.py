"""Verify that a killed and resumed training is bit-identical to another.

MMDetection's train.py trains on the trees of tools/prepare_trees.py for a few
steps: twice without a break, and once killed by SIGKILL at random moments and
resumed each time. The losses of the first two must be equal at every step.
The final checkpoints of all three must be equal in every tensor and number:
weights, EMA weights, optimizer and schedule.

Example:
    python tools/proof/verify_resume.py --steps 50 --kills 5

Prints each kill and the number of differences. The exit status is 1 if there
is one. Needs the data of tools/prepare_trees.py in data/trees.
"""
import argparse
import hashlib
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def parse_args(argv=None):
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--steps',
        default=100,
        type=int,
        help='length of each training (default: %(default)s)')
    parser.add_argument(
        '--kills',
        default=10,
        type=int,
        help='how often the third training is killed (default: %(default)s)')
    parser.add_argument(
        '--seed',
        default=0,
        type=int,
        help='seed of the training and of the kills (default: %(default)s)')
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # answers --help before the libraries are imported

import mmdet
import torch

ROOT = Path(__file__).resolve().parents[2]
TRAIN = Path(mmdet.__file__).parent / '.mim' / 'tools' / 'train.py'
CONFIG = ROOT / 'configs/efficientdet/efficientdet_lite0_1xb8_trees.py'
INTERVAL = 10  # steps from one checkpoint to the next


def state(path):
    """What a training goes on from, by names: hashes of tensors, numbers."""
    saved = torch.load(path, map_location='cpu', weights_only=True)
    found = {}

    def walk(node, key):
        if isinstance(node, torch.Tensor):
            data = node.contiguous().numpy().tobytes()
            node = (node.dtype, node.shape, hashlib.sha256(data).hexdigest())
        if isinstance(node, dict):
            for name, value in node.items():
                walk(value, f'{key}.{name}')
        elif isinstance(node, list):
            for i, value in enumerate(node):
                walk(value, f'{key}.{i}')
        else:
            found[key] = node

    for key in ('state_dict', 'ema_state_dict', 'optimizer',
                'param_schedulers'):
        before = len(found)
        walk(saved[key], key)
        assert len(found) > before, key
    for key in ('seed', 'epoch', 'iter'):
        found[key] = saved['meta'][key]
    return found


def losses(folder):
    """Step to loss, as the logs of a training in ``folder`` have it."""
    found = {}
    for path in sorted(folder.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if 'loss' in row:
                found[row['step']] = row['loss']
    return found


def train(folder, steps, seed, kill=None):
    """Starts or resumes a training; returns the first and last step seen.

    Args:
        folder (Path): Work directory.
        steps (int): Length of the whole training.
        seed (int): Of the training.
        kill (tuple, optional): Step after whose line of the log the training
            is killed, and seconds to wait then.
    """
    command = [
        sys.executable, TRAIN, CONFIG, '--work-dir', folder, '--resume',
        '--cfg-options', f'randomness.seed={seed}',
        f'train_cfg.max_iters={steps}', f'train_cfg.val_interval={steps}',
        f'default_hooks.checkpoint.interval={INTERVAL}',
        'default_hooks.logger.interval=1', 'log_processor.window_size=1'
    ]
    seen, last = [], ''
    with subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True) as process:
        for last in process.stdout:
            match = re.search(r'Iter\(train\) \[ *(\d+)/', last)
            if match:
                seen.append(int(match.group(1)))
                if kill and seen[-1] == kill[0]:
                    time.sleep(kill[1])
                    process.kill()
    if process.returncode != (-9 if kill else 0):
        raise SystemExit(f'train.py ended with {process.returncode}: {last}')
    return seen[0], seen[-1]


def main(argv=None):
    """Trains, kills, compares and prints."""
    args = parse_args(argv)
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        first, second, killed = (
            Path(folder, name) for name in ('first', 'second', 'killed'))
        found = []
        for straight in (first, second):
            start = time.time()
            train(straight, args.steps, args.seed)
            found.append(losses(straight))
            print(f'{len(found[-1])} steps without a break, '
                  f'{time.time() - start:.0f} s')
        equal = sum(found[0][step] == found[1].get(step) for step in found[0])
        print(f'the same loss: {equal} of {len(found[0])} steps')
        begin = 0
        for kill in range(args.kills):
            # Anywhere in its part of the training, or after the last save
            end = args.steps * (kill + 1) // args.kills - 1
            target = draw.randint(begin + 1, max(begin + 1, end))
            wait = draw.uniform(0, 1)
            start, reached = train(killed, args.steps, args.seed,
                                   (target, wait))
            last = killed / 'last_checkpoint'
            saved = Path(last.read_text()).name if last.is_file() else None
            print(f'{kill + 1}: from step {start}, killed {wait:.2f} s after '
                  f'step {target} (the last seen: {reached}); goes on from '
                  f'{saved or "the start"}')
            begin = int(re.search(r'\d+', saved).group()) if saved else 0
        train(killed, args.steps, args.seed)
        states = [
            state(path / f'iter_{args.steps}.pth')
            for path in (first, second, killed)
        ]
    keys = set().union(*states)
    differing = [
        sum(states[0].get(key) != other.get(key) for key in keys)
        for other in states[1:]
    ]
    print(f'of {len(keys)} tensors and numbers differ: {differing[0]} in the '
          f'second training, {differing[1]} in the killed one')
    sys.exit(equal != args.steps or any(differing))


if __name__ == '__main__':
    main()
