"""What the processes of compare_necks.py do: a run, or measuring the costs.

Also what both studies ask of the folder of their results.
"""
import json
import os
import resource
import statistics
import tempfile
import time
from functools import partial

from study_configs import BATCH_SIZE, make_config

from mmdet_efficientdet.utils import write_file

LAST = 20  # steps over which the loss is averaged


def check_settings(out, settings):
    """Refuses to mix runs of different settings in one folder."""
    settings = json.loads(json.dumps(settings))  # tuples are lists there
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
        raise SystemExit(f'{out} has runs of other settings '
                         f'({differ}); give these, or another --out')


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


def measure(study, variants, repeats, out, log):
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
        for _ in range(repeats + 1):  # the first does not count
            for variant, functions in calls.items():
                start = time.process_time()
                with torch.set_grad_enabled(name == 'step_ms'):
                    functions[name]()
                times[variant].append(1000 * (time.process_time() - start))
        for variant, values in times.items():
            costs[variant][name] = statistics.median(values[1:])
    write_file(out / 'costs.json', json.dumps(costs, indent=1).encode())
