"""Checks of a recipe: batch, length, schedule, averages and machine."""
import os
from typing import List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..datasets.findings import Finding, find
from ..scaling import FIRST_LEVEL, dicts, innermost

MIN_GROUP = 8  # images whose statistics a batch norm takes
MIN_IMAGES = 30  # below which a detector learns nothing general
# Steps below which little is learned, by a head that starts at random and
# from a published detector
MIN_STEPS = {False: 300, True: 100}
SLACK = 10  # lengths of the warm-up, or of a norm's memory, in a training
MAX_SIMULATED = 10000  # steps; after more, no usual average is behind
# Transforms that change the size of the image
RESIZING = ('Resize', 'Crop', 'Pad', 'Mosaic', 'MixUp', 'Affine', 'Expand',
            'Rotate')


class Length(NamedTuple):
    """Steps of an epoch and of all; images of a process in a step."""
    epoch: int
    steps: int
    batch: int
    last: int  # batch of an epoch


def length_of(cfg: Config, num_gpus: int, images: int) -> Length:
    """The length of a training on so many images."""
    loader, loop = cfg.train_dataloader, cfg.train_cfg
    sampler = loader.get('sampler') or {}
    batches = loader.get('batch_sampler') or {}
    batch = batches.get('batch_size', loader.get('batch_size', 1))
    drop = loader.get('drop_last') or batches.get('drop_last')
    share = -(-images // num_gpus)
    epoch = share // batch if drop else -(-share // batch)
    short = loader.get('num_batch_per_epoch')
    epoch = min(epoch, short or epoch)
    steps = loop.get('max_iters') or loop.get('max_epochs', 1) * epoch
    whole = (
        drop or short or steps < epoch or sampler.get('infinite')
        or 'Infinite' in str(sampler.get('type')))
    return Length(epoch, steps, batch, not whole and share % batch or batch)


def check_recipe(cfg: Config, model: nn.Module,
                 num_gpus: int) -> List[Finding]:
    """Checks learning rate and norms at the actual batch, and the machine."""
    found = []
    batch = cfg.train_dataloader.get('batch_size', 1)
    optim = cfg.get('optim_wrapper', {})
    steps = optim.get('accumulative_counts', 1)
    scaling = cfg.get('auto_scale_lr') or {}
    base, real = scaling.get('base_batch_size'), num_gpus * batch * steps
    lr = optim.get('optimizer', {}).get('lr')
    if (lr and base and not scaling.get('enable')
            and not 0.5 < base / real < 2):
        product = f'{num_gpus} GPUs x {batch} images x {steps} steps'
        values = dict(lr=lr, base=base, real=real, better=lr * real / base)
        found.append(Finding('learning_rate', product=product, **values))
    norms, sharing = _training_norms(cfg, model, num_gpus)
    group = batch * sharing
    if group < MIN_GROUP:
        found += find('batch_norm', [*norms], group=group, least=MIN_GROUP)
    cores, gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    here = min(num_gpus, gpus or num_gpus)  # processes on this machine
    workers = here * cfg.train_dataloader.get('num_workers', 0)
    threads = here * torch.get_num_threads()
    values = dict(workers=workers, cores=cores, threads=threads)
    if workers > cores:
        found.append(Finding('workers', better=cores // here, **values))
    elif not gpus and threads > here and workers + threads > cores:
        found.append(Finding('threads', **values))
    return found


def _training_norms(cfg: Config, model: nn.Module,
                    num_gpus: int) -> Tuple[dict, int]:
    """Batch norms that compute statistics by name, and on how many GPUs."""
    norms = {
        name: module
        for name, module in model.train().named_modules()
        if isinstance(module, _BatchNorm) and module.training
    }
    sync = cfg.get('sync_bn') or any(
        isinstance(norm, nn.SyncBatchNorm) for norm in norms.values())
    return norms, num_gpus if sync else 1


def check_length(cfg: Config, model: nn.Module, num_gpus: int,
                 images: int) -> List[Finding]:
    """Checks what depends on the number of images.

    A batch norm gets one pixel of a single image, where PyTorch raises an
    error, if the input is not larger than the stride of the coarsest level.

    Args:
        cfg, model, num_gpus: See :func:`check_training`.
        images (int): Number of training images.
    """
    length = length_of(cfg, num_gpus, images)
    if not length.epoch:
        return [Finding('no_steps', images=images, batch=length.batch)]
    found, steps = [], length.steps
    if images < MIN_IMAGES:
        found.append(Finding('few_images', images=images, least=MIN_IMAGES))
    norms, sharing = _training_norms(cfg, model, num_gpus)
    # Those of the backbone get more pixels, and start with statistics.
    norms = {k: v for k, v in norms.items() if not k.startswith('backbone.')}
    side = max(train_input(cfg) or [0])
    levels = getattr(getattr(model, 'bbox_head', None), 'num_levels', 0)
    coarsest = 2**(FIRST_LEVEL + levels - 1)  # stride
    if norms and length.last * sharing == 1 and 0 < side <= coarsest:
        found.append(Finding('last_batch', batch=length.batch, side=side))
    loaded = bool(cfg.get('load_from') or cfg.get('resume'))
    least = MIN_STEPS[loaded]
    if steps < least:
        fix = (f'max_epochs={-(-least // length.epoch)}'
               if 'max_epochs' in cfg.train_cfg else f'max_iters={least}')
        found.append(Finding('steps', steps=steps, least=least, better=fix))
    found += check_warmup(cfg, length)
    slow = [] if loaded else [
        name for name, norm in norms.items()
        if norm.momentum and norm.momentum * steps < SLACK
    ]
    parts = ', '.join(dict.fromkeys(name.split('.')[0] for name in slow))
    found += find('cold_norms', slow, steps=steps, parts=parts)
    for hook in dicts([cfg.get('default_hooks'), cfg.get('custom_hooks')]):
        if str(hook.get('type')).rstrip("'>").endswith('EMAHook'):
            share = stale_share(hook, steps) if steps < MAX_SIMULATED else 0
            found += find(
                'ema', ('', ) * (share > 0.5), share=share, better=20 / steps)
    return found


def stale_share(hook: dict, steps: int) -> float:
    """Share of weights of the first half in the average of a training."""
    hook = {k: v for k, v in hook.items() if k not in ('type', 'priority')}
    layer = nn.Linear(1, 1, bias=False)
    average = MODELS.build(
        dict(EMAHook(**hook).ema_cfg), default_args=dict(model=layer))
    for step in range(steps):
        nn.init.constant_(layer.weight, step < steps / 2)
        average.update_parameters(layer)
    return average.module.weight.item()


def check_warmup(cfg: Config, length: Length) -> List[Finding]:
    """Checks that schedules leave their warm-up, and writes a shorter one."""
    found, schedules = [], cfg.get('param_scheduler') or []
    for item in [schedules] if isinstance(schedules, dict) else schedules:
        key = 'warmup' if 'warmup' in item else 'end'
        kind = str(item['type']).rstrip("'>").rpartition('.')[2]
        if key == 'end' and (item.get('begin') or kind != 'LinearLR'):
            continue
        unit = length.epoch if item.get('by_epoch', True) else 1
        warmup = item.get(key, 0) * unit
        if SLACK * warmup <= length.steps:
            continue
        better = {**item, 'by_epoch': False, key: max(1, length.steps // 20)}
        better.pop('convert_to_iter_based', None)
        line = ', '.join(f'{k}={v!r}' for k, v in better.items())
        found.append(
            Finding('warmup', warmup=warmup, steps=length.steps, line=line))
    return found


def train_input(cfg: Config) -> Optional[Tuple[int, int]]:
    """Height and width of the largest input in training, None if unknown."""
    sides = []
    for part in innermost(cfg.train_dataloader.dataset):
        last = [dict(type=''), *(
            transform for transform in part.get('pipeline', [])
            if any(kind in str(transform.type) for kind in RESIZING))
        ][-1]  # yapf: disable
        size = None
        if str(last['type']).endswith('ResizeCrop'):
            size = last['image_size']
        elif last['type'] == 'Resize' and not last.get('keep_ratio'):
            size = (last.get('scale') or ())[::-1]
        if not size:
            return None
        sides.append(np.broadcast_to(size, 2))
    divisor = np.array(cfg.model.data_preprocessor.get('pad_size_divisor', 1))
    return tuple((-(-np.max(sides, 0) // divisor) * divisor).tolist())


def check_parity(train: Optional[Tuple[int, int]], test: np.ndarray,
                 num_levels: int) -> List[Finding]:
    """Checks that levels which are odd in training are so in testing.

    An odd level is padded at both borders before its size is halved, and an
    even one at the end only: features lie elsewhere in the image. On the last
    two levels this was not seen to matter.

    Args:
        train (tuple[int], optional): Height and width in training, if known.
        test (np.ndarray): ``(M, 2)``, those in testing.
        num_levels (int): Of the pyramid.
    """
    if not train:
        return []
    halvings = FIRST_LEVEL + num_levels - 2

    def odd(size: Sequence[int]) -> list:
        return [-(-int(n) // 2**i) % 2 for n in size for i in range(halvings)]

    other = [s for s in np.unique(test, axis=0) if odd(s) != odd(train)]
    return find(
        'parity',
        other,
        lambda size: '{:g} x {:g}'.format(*size),
        train='{} x {}'.format(*train),
        multiple=2**halvings)
