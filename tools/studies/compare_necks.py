"""Compare necks, or ways to scale a detector, on aerial images of trees.

Trains EfficientDet-Lite0 with each variant, seed and fold in a process of its
own, with a shortened version of the shipped recipe for trees. The folds are
places: no pixel of a fold's test images is in its training images. After the
last run the time and memory of all variants are measured in turn; do not use
the machine for anything else meanwhile.

Example:
    python tools/studies/compare_necks.py
    python tools/studies/compare_necks.py --study scaling \\
        --out work_dirs/scaling

Prints a Markdown table, and writes it to --out as table.md with results.csv,
results.png, costs.json, the folds, and a file and a log for each run. The same
command resumes where it was stopped. Needs the data of tools/prepare_trees.py.
"""
import argparse
import hashlib
import json
import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import packages_distributions, version
from pathlib import Path

from study_configs import BATCH_SIZE, RECIPE, ROOT, STUDIES, make_config


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
        '--out',
        type=Path,
        default=Path('work_dirs/necks'),
        help='folder for all results (default: %(default)s)')
    parser.add_argument(
        '--study',
        default='necks',
        choices=STUDIES,
        help='what is compared (default: %(default)s)')
    parser.add_argument(
        '--variants', nargs='+', help='some of the study (default: all)')
    parser.add_argument(
        '--seeds',
        nargs='+',
        type=int,
        default=[0, 1, 2],
        help='seeds of the trainings (default: 0 1 2)')
    parser.add_argument(
        '--folds',
        nargs='+',
        type=int,
        default=range(4),
        choices=range(4),
        help='folds to test on (default: all)')
    parser.add_argument(
        '--steps',
        type=int,
        default=200,
        help='steps of a training (default: %(default)s)')
    parser.add_argument(
        '--jobs',
        type=int,
        default=1,
        help='runs at the same time (default: %(default)s)')
    args = parser.parse_args(argv)
    variants = list(STUDIES[args.study])
    args.variants = args.variants or variants
    if not set(args.variants) <= set(variants):
        parser.error(f'--variants {" ".join(args.variants)}: the study '
                     f'{args.study!r} has {", ".join(variants)}')
    return args


if __name__ == '__main__':
    parse_args()  # answers --help before the libraries are imported

import tree_folds
from comparison_report import write_results
from study_runs import (LAST, check_settings, log_file, measure, result_file,
                        run)

REPEATS = 15  # measurements, whose median is a time


def run_all(study, tasks, steps, out, jobs):
    """Makes the runs that are missing, ``jobs`` at a time, then the costs.

    Returns:
        list[str]: What failed.
    """
    todo = [task for task in tasks if not result_file(out, *task).is_file()]
    print(
        f'{len(tasks) - len(todo)} of {len(tasks)} runs are there', flush=True)
    # Spares a quarter of the time: glibc keeps the memory of each layer.
    os.environ.update(
        OMP_NUM_THREADS='1',
        MALLOC_MMAP_THRESHOLD_=str(2**30),
        MALLOC_TRIM_THRESHOLD_=str(2**31))
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(
        ['mmdet.apis', 'mmdet.engine', 'mmdet_efficientdet.models'])
    for folder in ('runs', 'logs'):
        (out / folder).mkdir(exist_ok=True)

    def start_and_wait(target, *args):
        process = context.Process(target=target, args=args)
        process.start()
        process.join()
        return process.exitcode

    def make(task):
        log = log_file(out, *task)
        start = time.time()
        code = start_and_wait(run, study, *task, steps, out, log)
        return task, code, time.time() - start

    failed, start = [], time.time()
    pool = ThreadPoolExecutor(jobs)
    try:
        futures = [pool.submit(make, task) for task in todo]
        for done, future in enumerate(as_completed(futures), 1):
            task, code, seconds = future.result()
            left = (time.time() - start) / done * (len(todo) - done) / 60
            # Not by the exit code, which threads may take from one another
            file = result_file(out, *task)
            if file.is_file():
                row = json.loads(file.read_text())
                result = f'{file.stem} AP50 {row["AP50"]:.3f}'
            else:
                failed.append(f'{file.stem} ended with {code}, see '
                              f'{log_file(out, *task)}')
                result = failed[-1]
            print(
                f'[{done}/{len(todo)}] {result}, {seconds:.0f} s, '
                f'about {left:.0f} min left',
                flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    costs = out / 'costs.json'
    variants = list(dict.fromkeys(variant for variant, *_ in tasks))
    there = json.loads(costs.read_text()) if costs.is_file() else {}
    if not there.keys() >= set(variants):
        print('measuring costs: leave the machine alone', flush=True)
        log = out / 'logs' / 'costs.log'
        code = start_and_wait(measure, study, variants, REPEATS, out, log)
        if code:
            failed.append(f'measuring costs ended with {code}, see {log}')
    return failed


def main(argv=None):
    """Makes what is missing, then the table and the picture."""
    args = parse_args(argv)
    variants = list(STUDIES[args.study])
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    receipt = json.loads((args.data / 'receipt.json').read_text())
    configs = [
        make_config(args.study, variant, 0, 0, args.steps, '').to_dict()
        for variant in variants
    ]
    recipe = json.dumps([configs, tree_folds.FOLDS, tree_folds.TILE])
    settings = dict(
        study=args.study,
        steps=args.steps,
        image_size=configs[0]['image_size'],
        sides={
            v: c['image_size']
            for v, c in zip(variants, configs)
        },
        batch_size=BATCH_SIZE,
        recipe_name=RECIPE.name,
        last=LAST,
        repeats=REPEATS,
        data=receipt['files_sha256'],
        recipe_sha256=hashlib.sha256(recipe.encode()).hexdigest(),
        # mmdet and mmcv may come from distributions of other names.
        **{
            name: version(packages_distributions()[name][0])
            for name in ('torch', 'mmdet', 'mmcv')
        })
    check_settings(out, settings)
    if not (out / 'folds').is_dir():
        tree_folds.write_folds(args.data, out / 'folds')
    # One seed and fold after the other: a part is a comparison, too.
    tasks = [(variant, seed, fold) for seed in args.seeds
             for fold in args.folds for variant in args.variants]
    failed = run_all(args.study, tasks, args.steps, out, args.jobs)
    write_results(out, variants, settings)
    if failed:
        raise SystemExit('\n'.join(failed))


if __name__ == '__main__':
    main()
