"""Checks of learning rate, batch and norms, for the real batch."""
from typing import List, Tuple

import numpy as np
from mmdet.registry import DATASETS
from mmengine.config import Config
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..datasets.annotation_checks import Finding
from ..datasets.class_names import innermost

MIN_GROUP = 8  # images whose statistics a batch norm takes


def check_recipe(cfg: Config, model: nn.Module,
                 num_gpus: int) -> List[Finding]:
    """Checks learning rate and batch norms for the real batch."""
    found = []
    batch = cfg.train_dataloader.get('batch_size', 1)
    optim = cfg.get('optim_wrapper', {})
    steps = optim.get('accumulative_counts', 1)
    scaling = cfg.get('auto_scale_lr') or {}
    base, real = scaling.get('base_batch_size'), num_gpus * batch * steps
    lr = optim.get('optimizer', {}).get('lr')
    if (lr and base and not scaling.get('enable')
            and not 0.5 < base / real < 2):
        found.append(
            Finding(
                False, 'learning_rate', 1,
                f'lr={lr:g} is for batches of {base}, but they are {real} '
                f'({num_gpus} GPUs x {batch} images x {steps} steps)',
                f'--auto-scale-lr, or lr={lr * real / base:.3g}; if it was '
                f'chosen for {real}, auto_scale_lr.base_batch_size={real}'))
    norms, sharing = _training_norms(cfg, model, num_gpus)
    group = batch * sharing
    if norms and group < MIN_GROUP:
        found.append(
            Finding(
                False, 'batch_norm', len(norms),
                f'{len(norms)} batch norms take their statistics from '
                f'{group} images', f'batches of {MIN_GROUP} or more, or '
                "norm_cfg=dict(type='GN', num_groups=8), or norm_eval=True of "
                'the model', tuple(norms[:3])))
    return found


def _training_norms(cfg: Config, model: nn.Module,
                    num_gpus: int) -> Tuple[List[str], int]:
    """Batch norms that take statistics, and over how many GPUs."""
    norms = {
        name: module
        for name, module in model.train().named_modules()
        if isinstance(module, _BatchNorm) and module.training
    }
    sync = cfg.get('sync_bn') or any(
        isinstance(norm, nn.SyncBatchNorm) for norm in norms.values())
    return list(norms), num_gpus if sync else 1


def check_last_batch(cfg: Config, model: nn.Module, num_gpus: int,
                     dataset) -> List[Finding]:
    """Checks that no batch norm gets one pixel of one image.

    torch raises there, at the end of the first epoch. The coarsest level has
    one pixel if the input is no larger than its stride.

    Args:
        cfg, model, num_gpus: See :func:`check_training`.
        dataset (Dataset | dict): Of the training. Built only if it matters.
    """
    loader = cfg.train_dataloader
    side = _input_side(cfg)
    norms, sharing = _training_norms(cfg, model, num_gpus)
    norms = [name for name in norms if not name.startswith('backbone.')]
    if not norms or not side or side > 2**(model.bbox_head.num_levels + 2):
        return []
    sampler = loader.get('sampler') or {}
    batches = loader.get('batch_sampler') or {}
    batch = last = batches.get('batch_size', loader.get('batch_size', 1))
    whole = (
        loader.get('drop_last') or batches.get('drop_last')
        or loader.get('num_batch_per_epoch') or sampler.get('infinite')
        or 'Infinite' in str(sampler.get('type')))
    if not whole and batch > 1:
        if isinstance(dataset, dict):
            dataset = DATASETS.build(dataset)
        images = -(-len(dataset) // num_gpus)
        if cfg.train_cfg.get('max_iters', images) >= images / batch:
            last = images % batch or batch
    if last * sharing > 1:
        return []
    return [
        Finding(
            True, 'last_batch', 1,
            f'the last of the batches, of up to {batch} images, has one '
            f'image, and at {side} pixels the coarsest level has one pixel, '
            'of which batch norms cannot take statistics',
            'train_dataloader.drop_last=True, or another batch_size')
    ]


def _input_side(cfg: Config) -> int:
    """The longer side of the largest input, or 0 where it is not known."""
    sides = []
    for part in innermost(cfg.train_dataloader.dataset):
        kinds = ('Resize', 'Crop', 'Pad', 'Mosaic', 'MixUp', 'Affine',
                 'Expand', 'Rotate')
        changing = [
            transform for transform in part.get('pipeline', []) if any(
                kind in str(transform.type) for kind in kinds)
        ]
        if not changing:
            return 0
        last, size = changing[-1], None
        if str(last.type).endswith('ResizeCrop'):
            size = last.image_size
        elif last.type == 'Resize' and not last.get('keep_ratio'):
            size = last.get('scale')
        if not size:
            return 0
        sides.append(np.max(size))
    divisor = cfg.model.data_preprocessor.get('pad_size_divisor', 1)
    return int(-(-max(sides) // divisor) * divisor)
