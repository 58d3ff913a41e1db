"""Compare necks, or ways to scale, under one detector on aerial trees.

    python tools/compare_necks.py
    python tools/compare_necks.py --study scaling --out work_dirs/scaling

trains EfficientDet-Lite0 with each variant, seed and fold in a process of its
own, with the shipped recipe for trees, cut short. The folds are places: no
pixel of a fold's test tiles is in its training windows. When all runs are
there, costs are measured, all variants in turn: leave the machine alone then.
Below --out come the folds, one file for each run, costs.json, results.csv,
table.md and results.png. Given again, the command goes on where it was
stopped.
"""
import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from importlib.metadata import version
from pathlib import Path

import tree_folds
from comparison_report import write_results

from mmdet_efficientdet.utils import write_file

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / 'configs/efficientdet/efficientdet_lite0_1xb8_trees.py'
BATCH_SIZE = 4
ENLARGEMENT = 1.2  # less than the recipe's: more trees in each step
LAST = 20  # steps over which the loss is averaged
REPEATS = 15  # of which the median is a time

SHARED = ('in_channels', 'out_channels', 'num_outs', 'norm_cfg')
BIFPN = dict(type='mmdet_efficientdet.BiFPN', act_cfg=dict(type='ReLU6'))
LITE0 = dict(BIFPN, fusion='sum')
# What each variant changes in the recipe; the first is what others are
# compared with.
STUDIES = dict(
    necks=dict(
        fpn=dict(neck=dict(type='FPN', add_extra_convs='on_input')),
        pafpn=dict(neck=dict(type='PAFPN', add_extra_convs='on_input')),
        nasfpn=dict(neck=dict(type='NASFPN', stack_times=3)),
        bifpn=dict(neck=dict(BIFPN, fusion='fast_normalized')),
        bifpn_softmax=dict(neck=dict(BIFPN, fusion='softmax')),
        bifpn_sum=dict(neck=dict(BIFPN, fusion='sum')),
        bifpn_unbounded=dict(neck=dict(BIFPN, fusion='unbounded')),
        bifpn_1_layer=dict(
            neck=dict(BIFPN, fusion='fast_normalized', stack_times=1)),
        bifpn_2_layers=dict(
            neck=dict(BIFPN, fusion='fast_normalized', stack_times=2))),
    # All but the first have 42 % more multiply-adds than it has. The
    # backbone stays, as there are ImageNet weights of few others.
    scaling=dict(
        lite0=dict(neck=LITE0),
        resolution=dict(neck=LITE0, image_size=296),
        width=dict(
            neck=dict(LITE0, out_channels=140),
            bbox_head=dict(in_channels=140)),
        depth=dict(
            neck=dict(LITE0, stack_times=15),
            bbox_head=dict(stacked_convs=14)),
        compound=dict(
            neck=dict(LITE0, out_channels=88, stack_times=6),
            bbox_head=dict(in_channels=88, stacked_convs=4),
            image_size=272)))


def make_config(study, variant, seed, fold, steps, folder):
    """The shipped recipe for trees with a variant, cut short.

    The whole backbone is frozen. ``folder`` has the folds.
    """
    from mmengine.config import Config
    cfg = Config.fromfile(RECIPE, import_custom_modules=False)
    changes = STUDIES[study][variant]
    cfg.model.neck = dict({key: cfg.model.neck[key]
                           for key in SHARED}, **changes['neck'])
    cfg.model.bbox_head.update(changes.get('bbox_head', {}))
    cfg.model.backbone.frozen_stages = 5
    # NASFPN needs each level to be half of the one below.
    cfg.model.data_preprocessor.pad_size_divisor = \
        128 if study == 'necks' else 8
    for file, loader in (('train', cfg.train_dataloader),
                         ('test', cfg.test_dataloader)):
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = f'{folder}/'
        loader.dataset.ann_file = f'{file}_{fold}.json'
    cfg.train_dataloader.batch_size = BATCH_SIZE
    scale = ENLARGEMENT / cfg.enlargement
    side = changes.get('image_size', cfg.image_size)
    for transform in cfg.train_dataloader.dataset.pipeline:
        if 'ratio_range' in transform:  # relative to the size
            transform.image_size = side
            transform.ratio_range = [r * scale for r in transform.ratio_range]
    for transform in cfg.test_dataloader.dataset.pipeline:
        if 'scale_factor' in transform:
            transform.scale_factor = ENLARGEMENT * side / cfg.image_size
    cfg.image_size = side
    cfg.test_evaluator.ann_file = f'{folder}/test_{fold}.json'
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.train_cfg.max_iters = steps
    cfg.param_scheduler[0].warmup = max(steps // 20, 1)
    cfg.default_hooks.checkpoint = None
    cfg.default_hooks.preflight.enabled = False
    cfg.randomness = dict(seed=seed)
    return cfg


def start_process(log):
    """What comes first in a process of one thread with a log."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    from mmdet_efficientdet.utils import register_all_modules
    register_all_modules(init_default_scope=False)
    torch.set_num_threads(1)


def build_runner(cfg):
    """The host's, whose head starts equal whatever the neck has drawn."""
    import torch
    from mmengine.runner import Runner
    runner = Runner.from_cfg(cfg)
    torch.manual_seed(cfg.randomness.seed)
    runner.model.bbox_head.init_weights()
    return runner


def run(study, variant, seed, fold, steps, out, log):
    """Trains and tests once, in this process; the result is a file."""
    start_process(log)
    cfg = make_config(study, variant, seed, fold, steps, out / 'folds')
    with tempfile.TemporaryDirectory() as cfg.work_dir:
        runner = build_runner(cfg)
        runner.train()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        history = runner.message_hub
        scores = runner.test()
    row = dict(
        variant=variant,
        seed=seed,
        fold=fold,
        AP50=scores['coco/bbox_mAP_50'],
        AP=scores['coco/bbox_mAP'],
        loss=history.get_scalar('train/loss').mean(LAST),
        peak_mb=peak)
    write_file(result_file(out, variant, seed, fold), json.dumps(row).encode())


def result_file(out, variant, seed, fold):
    """Where the result of a run is."""
    return out / 'runs' / f'{variant}_seed{seed}_fold{fold}.json'


def log_file(out, *task):
    """Where the output of a run is."""
    return out / 'logs' / f'{result_file(out, *task).stem}.log'


def measure(study, variants, out, log):
    """Writes the sizes and times of all variants, measured in turn.

    Times are CPU times, for one thread: of neck and network for one image,
    and of a training step for a batch, the optimizer included.
    """
    start_process(log)
    import torch
    from mmdet.registry import DATASETS, MODELS
    from mmengine.dataset import pseudo_collate
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import DefaultScope
    from torch.utils.flop_counter import FlopCounterMode
    DefaultScope.get_instance('measure', scope_name='mmdet')
    costs, models, calls = {}, {}, {}
    for variant in variants:
        cfg = make_config(study, variant, 0, 0, 1, out / 'folds')
        cfg.model.backbone.init_cfg = None
        torch.manual_seed(0)
        model = models[variant] = MODELS.build(cfg.model)
        model.init_weights()
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
        batch = pseudo_collate([dataset[i] for i in range(BATCH_SIZE)])
        optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
        image = torch.randn(1, 3, cfg.image_size, cfg.image_size)
        model.eval()
        with torch.no_grad():
            feats = model.backbone(image)
            counts = []
            for part, given in ((model.neck, feats), (model, image)):
                with FlopCounterMode(display=False) as counter:
                    part(given)
                counts.append(counter.get_total_flops() // 2)
        costs[variant] = dict(
            neck_parameters=sum(p.numel() for p in model.neck.parameters()),
            parameters=sum(p.numel() for p in model.parameters()),
            neck_multiply_adds=counts[0],
            multiply_adds=counts[1])
        calls[variant] = dict(
            neck_ms=partial(model.neck, feats),
            network_ms=partial(model, image),
            step_ms=partial(model.train_step, batch, optim_wrapper))
    for name in ('neck_ms', 'network_ms', 'step_ms'):
        times = {variant: [] for variant in variants}
        for model in models.values():
            model.train(name == 'step_ms')
        for _ in range(REPEATS + 1):  # the first does not count
            for variant, functions in calls.items():
                start = time.process_time()
                with torch.set_grad_enabled(name == 'step_ms'):
                    functions[name]()
                times[variant].append(1000 * (time.process_time() - start))
        for variant, values in times.items():
            costs[variant][name] = statistics.median(values[1:])
    write_file(out / 'costs.json', json.dumps(costs, indent=1).encode())


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
        code = start_and_wait(measure, study, variants, out, log)
        if code:
            failed.append(f'measuring costs ended with {code}, see {log}')
    return failed


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
    parser.add_argument('--study', default='necks', choices=STUDIES)
    parser.add_argument(
        '--variants', nargs='+', help='of the study; all by default')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument(
        '--folds', nargs='+', type=int, default=range(4), choices=range(4))
    parser.add_argument('--steps', type=int, default=200)
    parser.add_argument('--jobs', type=int, default=1, help='runs at a time')
    args = parser.parse_args(argv)
    variants = list(STUDIES[args.study])
    wanted = args.variants or variants
    if not set(wanted) <= set(variants):
        parser.error(f'--variants {" ".join(wanted)}: the study '
                     f'{args.study!r} has {", ".join(variants)}')
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
        **{name: version(name)
           for name in ('torch', 'mmdet', 'mmcv')})
    check_settings(out, settings)
    if not (out / 'folds').is_dir():
        tree_folds.write_folds(args.data, out / 'folds')
    # One seed and fold after the other: a part is a comparison, too.
    tasks = [(variant, seed, fold) for seed in args.seeds
             for fold in args.folds for variant in wanted]
    failed = run_all(args.study, tasks, args.steps, out, args.jobs)
    write_results(out, variants, settings)
    if failed:
        raise SystemExit('\n'.join(failed))


if __name__ == '__main__':
    main()
