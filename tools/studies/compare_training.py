"""Compare how fast our recipe and effdet's trainer learn, on small data.

Both train Lite0 for a few steps from the same ImageNet weights, frozen up to
stride 16, on the same pictures in the same order, and the averaged weights of
both are evaluated by pycocotools. `ours` is the network, loss, transforms and
settings of efficientdet_d0_1xb8-adamw-1k_coco.py; `effdet` is effdet's
DetBenchTrain with its RandomResizePad and a cosine, in a plain loop. The other
variants change one thing of `ours` or `effdet` each.

Example:
    python tools/studies/compare_training.py --rates 3e-3 6e-3 --seeds 0 1 \\
        --data data/nuclei/train.json data/nuclei/val.json

Choose by validation parts, and keep test parts for the end. Prints a Markdown
table, and writes it to --out as table.md with results.csv, results.png and a
file for each run. The same command resumes where it was stopped. Needs effdet:
pip install effdet==0.4.1
"""
import argparse
import json
from pathlib import Path

# What each changes of the recipe, see training_runs.our_settings.
EFFDET = dict(
    trainer='effdet',
    transform='RandomResizePad',
    start='effdet',
    norms='batch',
    drop_path=0.2,
    decay='all')
VARIANTS = dict(
    ours={},
    effdet=dict(EFFDET, average=0.95, hold=0.0),
    effdet_hold=dict(EFFDET, average=0.95),
    effdet_ramp=dict(EFFDET, hold=0.0),
    cosine=dict(hold=0.0),
    transform=dict(transform='RandomResizePad'),
    official_start=dict(start='official'),
    start=dict(start='effdet'),
    network=dict(trainer='effdet'),
    norms=dict(norms='batch'),
    drop_path=dict(norms='batch', drop_path=0.2),
    momentum=dict(momentum=0.01),
    fast_momentum=dict(momentum=0.3),
    betas=dict(betas=(0.9, 0.99)),
    backbone=dict(backbone=0.3),
    depthwise=dict(depthwise=2.0),
    box_loss=dict(box_loss=2.0),
    no_warmup=dict(warmup=0.0),
    long_warmup=dict(warmup=0.3),
    decay=dict(decay='all'),
    no_clip=dict(clip=1e9),
    clip=dict(clip=1.0),
    average=dict(average=0.95),
    jitter=dict(jitter=(0.1, 2.0)),
    narrow_jitter=dict(jitter=(0.8, 1.25)),
    no_jitter=dict(jitter=(1.0, 1.0)))


def parse_args(argv=None):
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--data',
        nargs=2,
        type=Path,
        required=True,
        metavar=('TRAIN', 'VAL'),
        help="annotation files in COCO's format; pictures are in images/ "
        'beside them')
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('work_dirs/training'),
        help='folder for all results (default: %(default)s)')
    parser.add_argument(
        '--variants',
        nargs='+',
        default=['ours', 'effdet'],
        choices=VARIANTS,
        metavar='NAME',
        help=f'some of {", ".join(VARIANTS)} (default: ours effdet)')
    parser.add_argument(
        '--rates',
        nargs='+',
        type=float,
        help="peak learning rates (default: the recipe's)")
    parser.add_argument(
        '--seeds',
        nargs='+',
        type=int,
        default=[0, 1, 2],
        help='seeds of the trainings (default: 0 1 2)')
    parser.add_argument(
        '--steps',
        type=int,
        default=120,
        help='steps of a training (default: %(default)s)')
    parser.add_argument(
        '--side',
        type=int,
        default=256,
        help='height and width of the input in pixels (default: %(default)s)')
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # answers --help before the libraries are imported

import torch
from mmengine.logging import MMLogger
from study_runs import check_settings
from training_data import read_data
from training_report import write_results
from training_runs import our_settings, run

from mmdet_efficientdet.utils import register_all_modules, write_file


def main():
    """Makes the runs that are missing, then table and picture."""
    args = parse_args()
    MMLogger.get_instance('mmengine', log_level='ERROR')
    register_all_modules()
    torch.set_num_threads(1)
    ours = our_settings()
    runs = args.out / 'runs'
    runs.mkdir(parents=True, exist_ok=True)
    data_files = [str(file) for file in args.data]
    check_settings(
        args.out,
        dict(data=data_files, steps=args.steps, side=args.side, ours=ours))
    data, pool = read_data(args.data[0]), {}
    variants = {name: {**ours, **VARIANTS[name]} for name in args.variants}
    by_pool = sorted(
        variants,
        key=lambda name: str(
            [variants[name][key] for key in ('transform', 'jitter')]))
    for seed in args.seeds:
        for name in by_pool:
            for rate in args.rates or [ours['rate']]:
                file = runs / f'{name}_{rate:g}_seed{seed}.json'
                if not file.is_file():
                    row = dict(variant=name, rate=rate, seed=seed)
                    row.update(
                        run(args, data, variants[name], rate, seed, pool))
                    write_file(file, json.dumps(row).encode())
                    print(file.stem, row, flush=True)
    write_results(args.out, list(VARIANTS), args)


if __name__ == '__main__':
    main()
