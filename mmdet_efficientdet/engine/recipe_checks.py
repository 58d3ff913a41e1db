"""Checks of the learning rate and batch norms at the actual batch size."""
from typing import List, Tuple

import numpy as np
from mmdet.registry import DATASETS
from mmengine.config import Config
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..datasets.class_names import innermost
from ..datasets.findings import Finding, find
from ..scaling import FIRST_LEVEL

MIN_GROUP = 8  # images whose statistics a batch norm takes


def check_recipe(cfg: Config, model: nn.Module,
                 num_gpus: int) -> List[Finding]:
    """Checks learning rate and batch norms at the actual batch size."""
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
        found += find('batch_norm', norms, group=group, least=MIN_GROUP)
    return found


def _training_norms(cfg: Config, model: nn.Module,
                    num_gpus: int) -> Tuple[List[str], int]:
    """Names of batch norms that compute statistics, and on how many GPUs."""
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
    """Checks that no batch norm gets one pixel of a single image.

    PyTorch raises an error there, at the end of the first epoch. The coarsest
    level has one pixel if the input is not larger than its stride.

    Args:
        cfg, model, num_gpus: See :func:`check_training`.
        dataset (Dataset | dict): Of the training. A dict is built only if
            the number of images matters.
    """
    loader = cfg.train_dataloader
    side = _input_side(cfg)
    norms, sharing = _training_norms(cfg, model, num_gpus)
    norms = [name for name in norms if not name.startswith('backbone.')]
    if not norms or not side or side > 2**(FIRST_LEVEL +
                                           model.bbox_head.num_levels - 1):
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
    return [Finding('last_batch', batch=batch, side=side)]


def _input_side(cfg: Config) -> int:
    """The longer side of the largest input, or 0 if it is unknown."""
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
    divisor = np.max(cfg.model.data_preprocessor.get('pad_size_divisor', 1))
    return int(-(-max(sides) // divisor) * divisor)
