"""Compare necks under one detector, on the trees of tools/prepare_trees.py.

    python tools/compare_necks.py

trains EfficientDet-Lite0 with each neck, seed and fold in a process of its
own, with the shipped recipe for trees, cut short. The folds are places: no
pixel of a fold's test tiles is in its training windows. Below --out come the
folds, one file for each run, results.csv, table.md and necks.png. Given again,
the command goes on where it was stopped.
"""
import argparse
import csv
import hashlib
import io
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path

import tree_folds
from scipy import stats

from mmdet_efficientdet.files import write_file

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / 'configs/efficientdet/efficientdet_lite0_1xb8_trees.py'
BATCH_SIZE = 4
ENLARGEMENT = 1.2  # less than the recipe's: more trees in each step
LAST = 20  # steps over which the loss is averaged
REPEATS = 20  # of which the median is the latency

SHARED = ('in_channels', 'out_channels', 'num_outs', 'norm_cfg')
BIFPN = dict(type='mmdet_efficientdet.BiFPN', act_cfg=dict(type='ReLU6'))
NECKS = dict(
    fpn=dict(type='FPN', add_extra_convs='on_input'),
    pafpn=dict(type='PAFPN', add_extra_convs='on_input'),
    nasfpn=dict(type='NASFPN', stack_times=3),
    bifpn=dict(BIFPN, fusion='fast_normalized'),
    bifpn_softmax=dict(BIFPN, fusion='softmax'),
    bifpn_sum=dict(BIFPN, fusion='sum'),
    bifpn_unbounded=dict(BIFPN, fusion='unbounded'),
    bifpn_1_layer=dict(BIFPN, fusion='fast_normalized', stack_times=1),
    bifpn_2_layers=dict(BIFPN, fusion='fast_normalized', stack_times=2))
BASELINE = 'fpn'


def make_config(neck, seed, fold, steps, folder):
    """The shipped recipe for trees with another neck, cut short.

    The whole backbone is frozen. ``folder`` has the folds.
    """
    from mmengine.config import Config
    cfg = Config.fromfile(RECIPE, import_custom_modules=False)
    cfg.model.neck = dict({key: cfg.model.neck[key]
                           for key in SHARED}, **NECKS[neck])
    cfg.model.backbone.frozen_stages = 5
    # NASFPN needs each level to be half of the one below.
    cfg.model.data_preprocessor.pad_size_divisor = 128
    for file, loader in (('train', cfg.train_dataloader),
                         ('test', cfg.test_dataloader)):
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = f'{folder}/'
        loader.dataset.ann_file = f'{file}_{fold}.json'
    cfg.train_dataloader.batch_size = BATCH_SIZE
    scale = ENLARGEMENT / cfg.enlargement
    for transform in cfg.train_dataloader.dataset.pipeline:
        if 'ratio_range' in transform:
            transform.ratio_range = [r * scale for r in transform.ratio_range]
    for transform in cfg.test_dataloader.dataset.pipeline:
        if 'scale_factor' in transform:
            transform.scale_factor = ENLARGEMENT
    cfg.test_evaluator.ann_file = f'{folder}/test_{fold}.json'
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.train_cfg.max_iters = steps
    cfg.param_scheduler[0].warmup = max(steps // 20, 1)
    cfg.default_hooks.checkpoint = None
    cfg.default_hooks.preflight.enabled = False
    cfg.randomness = dict(seed=seed)
    return cfg


def median_ms(function):
    """The median CPU time of a call, after one that is not counted."""
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return 1000 * statistics.median(seconds[1:])


def measure(model, side):
    """Sizes and latencies of a trained model for an image of ``side`` px."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    model.eval()
    with torch.no_grad():
        image = torch.randn(1, 3, side, side)
        feats = model.backbone(image)
        with FlopCounterMode(display=False) as counter:
            model.neck(feats)
        return dict(
            neck_parameters=sum(p.numel() for p in model.neck.parameters()),
            model_parameters=sum(p.numel() for p in model.parameters()),
            neck_multiply_adds=counter.get_total_flops() // 2,
            neck_ms=median_ms(lambda: model.neck(feats)),
            network_ms=median_ms(lambda: model(image, mode='tensor')))


def run(neck, seed, fold, steps, out, log):
    """Trains and tests once, in this process; the result is a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch
    from mmengine.runner import Runner

    from mmdet_efficientdet.utils import register_all_modules
    register_all_modules(init_default_scope=False)
    torch.set_num_threads(1)
    cfg = make_config(neck, seed, fold, steps, out / 'folds')
    with tempfile.TemporaryDirectory() as cfg.work_dir:
        runner = Runner.from_cfg(cfg)
        # The head starts equal whatever the neck has drawn.
        torch.manual_seed(seed)
        runner.model.bbox_head.init_weights()
        start = time.process_time()
        runner.train()
        step = (time.process_time() - start) / steps
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        history = runner.message_hub
        scores = runner.test()
    row = dict(
        neck=neck,
        seed=seed,
        fold=fold,
        AP50=scores['coco/bbox_mAP_50'],
        AP=scores['coco/bbox_mAP'],
        loss=history.get_scalar('train/loss').mean(LAST),
        step_s=step,
        peak_mb=peak,
        **measure(runner.model, cfg.image_size))
    write_file(result_file(out, neck, seed, fold), json.dumps(row).encode())


def result_file(out, neck, seed, fold):
    """Where the result of a run is."""
    return out / 'runs' / f'{neck}_seed{seed}_fold{fold}.json'


def run_all(tasks, steps, out, jobs):
    """Makes the runs that are missing, ``jobs`` at a time.

    Returns:
        list[str]: What failed.
    """
    todo = [task for task in tasks if not result_file(out, *task).is_file()]
    print(f'{len(tasks) - len(todo)} of {len(tasks)} runs are there', flush=1)
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

    def make(task):
        log = out / 'logs' / f'{result_file(out, *task).stem}.log'
        start = time.time()
        process = context.Process(target=run, args=(*task, steps, out, log))
        process.start()
        process.join()
        return log, process.exitcode, time.time() - start

    failed, start = [], time.time()
    pool = ThreadPoolExecutor(jobs)
    try:
        futures = [pool.submit(make, task) for task in todo]
        for done, future in enumerate(as_completed(futures), 1):
            log, code, seconds = future.result()
            left = (time.time() - start) / done * (len(todo) - done) / 60
            if code:
                failed.append(f'{log.stem} ended with {code}, see {log}')
                result = failed[-1]
            else:
                row = json.loads(
                    (out / 'runs' / f'{log.stem}.json').read_text())
                result = f'{log.stem} AP50 {row["AP50"]:.3f}'
            print(
                f'[{done}/{len(todo)}] {result}, {seconds:.0f} s, '
                f'about {left:.0f} min left',
                flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def paired_difference(rows, neck):
    """AP50 of a neck minus that of the baseline.

    The seeds of a fold share its data, so that they are averaged first, and
    the folds are the sample.

    Returns:
        tuple: Mean, and the half width of the 95 % t interval; either is None
        if there are too few folds.
    """
    scores = {(r['neck'], r['fold'], r['seed']): r['AP50'] for r in rows}
    by_fold = {}
    for (name, *key), score in scores.items():
        if name == neck and (BASELINE, *key) in scores:
            by_fold.setdefault(key[0],
                               []).append(score - scores[(BASELINE, *key)])
    folds = [statistics.mean(values) for values in by_fold.values()]
    if len(folds) < 2:
        return (folds[0] if folds else None), None
    quantile = stats.t.ppf(0.975, len(folds) - 1)
    return (statistics.mean(folds),
            float(quantile * statistics.stdev(folds) / len(folds)**0.5))


def table(rows):
    """The lines of a Markdown table with one row for each neck."""
    lines = [
        '| neck | runs | AP50 | AP50 - FPN (95 %) | shown | AP | loss '
        '| neck par. (k) | model par. (k) | neck multiply-adds (M) '
        '| neck (ms) | network (ms) | step (s) | peak (MB) |',
        '| --- ' + '| ---: ' * 13 + '|'
    ]
    for neck in [n for n in NECKS if any(r['neck'] == n for r in rows)]:
        own = [r for r in rows if r['neck'] == neck]

        def mean(key, own=own):
            return statistics.mean(r[key] for r in own)

        def median(key, own=own):
            return statistics.median(r[key] for r in own)

        centre, half = paired_difference(rows, neck)
        text, shown = '-', '-'
        if neck != BASELINE and half is not None:
            text = (f'{centre:+.3f} [{centre - half:+.3f}, '
                    f'{centre + half:+.3f}]')
            shown = 'no: 0 is inside'
            if abs(centre) > half:
                shown = 'better' if centre > 0 else 'worse'
        lines.append(
            f'| {neck} | {len(own)} | {mean("AP50"):.3f} | {text} | {shown} '
            f'| {mean("AP"):.3f} | {mean("loss"):.3f} '
            f'| {own[0]["neck_parameters"] / 1e3:,.0f} '
            f'| {own[0]["model_parameters"] / 1e3:,.0f} '
            f'| {own[0]["neck_multiply_adds"] / 1e6:,.0f} '
            f'| {median("neck_ms"):.1f} | {median("network_ms"):.1f} '
            f'| {median("step_s"):.2f} | {median("peak_mb"):,.0f} |')
    return lines


def conditions(out, settings):
    """What the numbers are of: the lines below the table."""
    trees, windows = [], []
    for fold in range(len(tree_folds.FOLDS)):
        test, train = (
            json.loads((out / 'folds' / f'{name}_{fold}.json').read_text())
            for name in ('test', 'train'))
        trees.append(f'{len(test["annotations"])}')
        windows.append(f'{len(train["images"])}')
    return [
        '', f'Data: {sum(map(int, trees))} trees in three photographs '
        '(tools/prepare_trees.py). Folds by place: thirds of one photograph, '
        f'then the two others. Trees to test on: {", ".join(trees)}; windows '
        f'to train with: {", ".join(windows)}. Test tiles and training '
        'windows of a fold share no pixel, but thirds are neighbours.',
        f'Training: {settings["steps"]} steps of {BATCH_SIZE} windows at '
        f'{settings["image_size"]} px, backbone pretrained on ImageNet and '
        f'frozen, else {RECIPE.name}: equal for all necks, tuned for none. '
        'The seed gives the order of the data, their augmentation and the '
        'start of the head, equal for all necks, and the start of the neck. '
        f'Loss: mean of the last {LAST} steps.',
        'Interval: t over the folds, of the differences paired by fold and '
        'seed and averaged over seeds first, as seeds share their data. Folds '
        'share training data, too, and the intervals are not corrected for '
        'the number of necks. So few steps are far from convergence: what is '
        'compared is what a neck learns in them. "No" means that this '
        'comparison cannot tell, not that the necks are equal.',
        'Neck and network (backbone, neck and head, without post-processing): '
        f'one image of {settings["image_size"]} px, CPU time of one '
        f'thread, median of {REPEATS}, then of the runs. Step: likewise, with '
        'the loading of data. Multiply-adds of convolutions. Peak: '
        'resident set of the process up to the end of training.',
        f'{platform.machine()}, {os.cpu_count()} CPUs, one thread a run; '
        f'torch {settings["torch"]}, mmdet {settings["mmdet"]}, mmcv '
        f'{settings["mmcv"]}, Python {platform.python_version()}.',
        f'Command: `python {" ".join(sys.argv)}`'
    ]


def draw(rows):
    """Draws AP50 of all runs and differences; returns a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    necks = [n for n in NECKS if any(r['neck'] == n for r in rows)]
    figure = Figure(figsize=(13, 1 + 0.5 * len(necks)), layout='tight')
    left, right = figure.subplots(1, 2, sharey=True)
    for y, neck in enumerate(necks):
        own = [r for r in rows if r['neck'] == neck]
        left.scatter([r['AP50'] for r in own],
                     [y + 0.1 * (r['fold'] - 1.5) for r in own],
                     c=[f'C{r["fold"]}' for r in own],
                     alpha=0.7)
        left.plot(statistics.mean(r['AP50'] for r in own), y, 'k|', ms=22)
        centre, half = paired_difference(rows, neck)
        if neck != BASELINE and centre is not None:
            right.errorbar(centre, y, xerr=half, fmt='ko', capsize=4)
    left.set(
        yticks=range(len(necks)),
        yticklabels=necks,
        ylim=(len(necks) - 0.5, -0.5),
        xlabel='AP50: all runs, a colour and a line for each fold, and mean')
    right.axvline(0, color='gray')
    right.set(xlabel='AP50 - AP50 of FPN: mean and 95 % interval over folds')
    for panel in (left, right):
        panel.grid(alpha=0.3)
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def write_results(out, settings):
    """Writes results.csv, table.md and necks.png from all finished runs."""
    rows = [json.loads(f.read_text()) for f in (out / 'runs').glob('*.json')]
    if not rows:
        return
    rows.sort(
        key=lambda r: (list(NECKS).index(r['neck']), r['seed'], r['fold']))
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    lines = table(rows)
    print('\n'.join(lines))
    write_file(out / 'results.csv', file.getvalue().encode())
    write_file(out / 'table.md',
               '\n'.join([*lines, *conditions(out, settings), '']).encode())
    write_file(out / 'necks.png', draw(rows))


def check_settings(out, settings):
    """Refuses to mix runs of different settings in one folder."""
    file = out / 'settings.json'
    if not file.is_file():
        write_file(file, json.dumps(settings).encode())
    there = json.loads(file.read_text())
    if there != settings:
        differ = ', '.join(
            f'{key} {there.get(key)!r} there and {settings.get(key)!r} now'
            for key in {
                **there,
                **settings
            } if there.get(key) != settings.get(key))
        raise SystemExit(f'compare_necks.py: {out} has runs of other settings '
                         f'({differ}); give these, or another --out')


def main(argv=None):
    """Makes what is missing, then the table and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, default=ROOT / 'data/trees')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/necks'))
    parser.add_argument('--necks', nargs='+', default=NECKS, choices=NECKS)
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument(
        '--folds', nargs='+', type=int, default=range(4), choices=range(4))
    parser.add_argument('--steps', type=int, default=120)
    parser.add_argument('--jobs', type=int, default=1, help='runs at a time')
    args = parser.parse_args(argv)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    receipt = json.loads((args.data / 'receipt.json').read_text())
    cfg = make_config(BASELINE, 0, 0, args.steps, '')
    recipe = json.dumps(
        [cfg.to_dict(), NECKS, tree_folds.FOLDS, tree_folds.TILE])
    settings = dict(
        steps=args.steps,
        image_size=cfg.image_size,
        data=receipt['files_sha256'],
        recipe=hashlib.sha256(recipe.encode()).hexdigest(),
        **{name: version(name)
           for name in ('torch', 'mmdet', 'mmcv')})
    check_settings(out, settings)
    if not (out / 'folds').is_dir():
        tree_folds.write_folds(args.data, out / 'folds')
    # One seed and fold after the other: a part is a comparison, too.
    tasks = [(neck, seed, fold) for seed in args.seeds for fold in args.folds
             for neck in args.necks]
    failed = run_all(tasks, args.steps, out, args.jobs)
    write_results(out, settings)
    if failed:
        raise SystemExit('\n'.join(failed))


if __name__ == '__main__':
    main()
