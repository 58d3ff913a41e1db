"""Measure memory and time of training, with and without checkpointing.

Trains the detector of each size's shipped config for a few steps on random
images and boxes at the size's official image size: once as it is and once
with model.with_cp=True, which recomputes activations in the backward pass.
Each training has a process of its own.

Example:
    python tools/studies/measure_training.py --size d0 d4 --batch-size 2

Prints a Markdown table. Memory on the CPU is the largest resident set of the
process, beside what it held before the first step. On a GPU it is the most
that torch allocated. Time is that of the fastest step after the first.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from terminaltables import GithubFlavoredMarkdownTable

from mmdet_efficientdet.scaling import SCALING
from mmdet_efficientdet.utils import config_file

MEGABYTE = 2**20


def random_batch(side, batch_size, boxes, num_classes):
    """Images of noise with boxes of all sizes, as a data loader gives them."""
    import torch
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    images, samples = [], []
    for _ in range(batch_size):
        corners = torch.rand(boxes, 2, 2).sort(1).values * side
        images.append(
            torch.randint(0, 256, (3, side, side), dtype=torch.uint8))
        samples.append(
            DetDataSample(
                gt_instances=InstanceData(
                    bboxes=corners.flatten(1),
                    labels=torch.randint(num_classes, (boxes, ))),
                metainfo=dict(img_shape=(side, side))))
    return dict(inputs=images, data_samples=samples)


def resident(field):
    """``VmRSS``, the resident set now, or ``VmHWM``, its peak, in bytes."""
    line, = (
        line for line in Path('/proc/self/status').read_text().split('\n')
        if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(size, with_cp, image_size, batch_size, boxes, steps, threads):
    """Trains for a few steps in this process.

    Returns:
        dict: ``before`` and ``peak`` in bytes, and ``seconds`` of a step.
    """
    import torch
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.device import get_device
    from mmengine.optim import build_optim_wrapper

    from mmdet_efficientdet.utils import register_all_modules

    register_all_modules()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = Config.fromfile(config_file(size))
    config.model.with_cp = with_cp
    config.model.backbone.init_cfg = None
    config.model.data_preprocessor.pad_size_divisor = image_size
    model = MODELS.build(config.model).train()
    model.init_weights()
    device = torch.device(get_device())
    model.to(device)
    optim_wrapper = build_optim_wrapper(model, config.optim_wrapper)
    data = random_batch(image_size, batch_size, boxes,
                        model.bbox_head.num_classes)
    on_gpu = device.type == 'cuda'
    before = torch.cuda.memory_allocated() if on_gpu else resident('VmRSS')
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        model.train_step(data, optim_wrapper)['loss'].item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident('VmHWM')
    return dict(
        before=before,
        peak=peak,
        seconds=min(seconds[1:]),
        device=torch.cuda.get_device_name() if on_gpu else 'CPU',
        torch=torch.__version__)


def in_own_process(**settings):
    """Runs :func:`measure` in a fresh process, whose peak is its own."""
    done = subprocess.run(
        [sys.executable, __file__, '--measure',
         json.dumps(settings)],
        stdout=subprocess.PIPE,
        text=True)
    if done.returncode:
        raise SystemExit(f'measure_training.py: the process for {settings} '
                         f'ended with {done.returncode}; a negative number '
                         'is a signal, -9 most often for want of memory')
    return json.loads(done.stdout.splitlines()[-1])


def report(rows):
    """A Markdown table.

    Args:
        rows (list[tuple]): Size, image size, and the results of
            :func:`measure` without and with checkpointing.
    """
    lines = [
        ('size', 'input', 'before (MB)', 'peak (MB)', 'checkpointing (MB)',
         'memory of the step', 'step (s)', 'checkpointing (s)', 'time')
    ]
    for size, side, plain, saving in rows:
        before, peak, less = (
            n / MEGABYTE
            for n in (plain['before'], plain['peak'], saving['peak']))
        own = (less - saving['before'] / MEGABYTE) / (peak - before)
        lines.append((size, side, f'{before:,.0f}', f'{peak:,.0f}',
                      f'{less:,.0f}', f'x {own:.2f}',
                      f'{plain["seconds"]:.2f}', f'{saving["seconds"]:.2f}',
                      f'x {saving["seconds"] / plain["seconds"]:.2f}'))
    return GithubFlavoredMarkdownTable(lines).table


def main():
    """Measures each size and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--size',
        nargs='+',
        default=['d0', 'd2', 'd4'],
        choices=list(SCALING),
        metavar='SIZE',
        help=f'some of {", ".join(SCALING)} (default: d0 d2 d4)')
    parser.add_argument(
        '--image-size',
        type=int,
        help="side of the images in pixels (default: the size's own)")
    parser.add_argument(
        '--batch-size',
        type=int,
        default=1,
        help='images in a step (default: %(default)s)')
    parser.add_argument(
        '--boxes',
        type=int,
        default=20,
        help='boxes in an image (default: %(default)s)')
    parser.add_argument(
        '--steps',
        type=int,
        default=3,
        help='steps after the first (default: %(default)s)')
    parser.add_argument(
        '--threads',
        type=int,
        default=os.cpu_count(),
        help='threads of torch (default: one for each CPU)')
    parser.add_argument('--measure', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.steps, args.batch_size, args.threads) < 1:
        parser.error('--steps, --batch-size and --threads must be positive')
    if args.measure:
        print(json.dumps(measure(**json.loads(args.measure))))
        return
    rows = []
    for size in args.size:
        side = args.image_size or SCALING[size].image_size
        pair = [
            in_own_process(
                size=size,
                with_cp=with_cp,
                image_size=side,
                batch_size=args.batch_size,
                boxes=args.boxes,
                steps=args.steps,
                threads=args.threads) for with_cp in (False, True)
        ]
        rows.append((size, side, *pair))
    print(f'{pair[0]["device"]} ({platform.machine()}, {args.threads} '
          f'threads), torch {pair[0]["torch"]}, float32, '
          f'{args.batch_size} image(s) with {args.boxes} boxes each, fastest '
          f'of {args.steps} steps; load of the machine now: '
          f'{os.getloadavg()[0]:.1f}\n')
    print(report(rows))


if __name__ == '__main__':
    main()
