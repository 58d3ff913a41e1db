"""Stops training at the first loss that is not finite or has no bound."""
import math
import os.path as osp
from functools import partial
from typing import List

import torch
from mmdet.structures.bbox import get_box_tensor
from mmengine.dist import all_reduce, get_dist_info
from mmengine.logging import MessageHub
from torch import Tensor, nn

from ..utils import plain_data, write_file


class NonFiniteLossError(RuntimeError):
    """A term of the loss is infinite, NaN or beyond the limit."""


def check_finite(losses: dict,
                 model: nn.Module,
                 batch_inputs: Tensor,
                 batch_data_samples: list,
                 limit: float = math.inf) -> None:
    """Raises an error on all ranks if a loss of any rank is not finite.

    The optimizer has not stepped yet, so the weights are those of the previous
    step. The batch (inputs, boxes, labels, metadata) is saved in the work
    directory. The check costs one transfer from the device.

    Args:
        losses (dict): Name to scalar, or to a list of scalars.
        model (nn.Module): Its parameters are checked after a failure.
        batch_inputs (Tensor): Images ``(N, 3, H, W)``.
        batch_data_samples (list): ``DetDataSample`` of each image.
        limit (float): Terms must be smaller than it. Defaults to infinity.

    Raises:
        NonFiniteLossError: If a term is not finite or not below the limit,
            on any rank.
    """
    terms = {
        name: sum(value) if isinstance(value, (list, tuple)) else value
        for name, value in losses.items()
    }
    values = torch.stack([value.detach().mean() for value in terms.values()])
    rank, world_size = get_dist_info()
    failed = values.new_zeros(world_size)
    failed[rank] = ~(values.abs() < limit).all()
    all_reduce(failed)
    if not failed.any():
        return
    info = MessageHub.get_current_instance().runtime_info
    step = info.get('iter', 0) + 1
    if not failed[rank]:
        raise NonFiniteLossError(
            f'step {step}: the loss is not below {limit:g} on rank '
            f'{failed.nonzero().flatten().tolist()} of {world_size}; see the '
            'message of that rank')
    values = dict(zip(terms, values.tolist()))
    bad = [f'{k}={v}' for k, v in values.items() if not abs(v) < limit]
    path = osp.join(
        info.get('work_dir', '.'), f'nonfinite_step_{step}_rank_{rank}.pth')
    saved = _save_batch(path, step, values, batch_inputs, batch_data_samples)
    images = [sample.metainfo.get('img_path') for sample in batch_data_samples]
    raise NonFiniteLossError(
        f'step {step}: {", ".join(bad)}, but each loss must be finite and '
        f'below {limit:g} (model.max_loss); the optimizer has not stepped. '
        f'{_suspect(model, batch_inputs, batch_data_samples)}\n  images: '
        f'{", ".join(map(str, images))}\n  {saved}\n  What to do: check '
        'these images and boxes, or train without --amp, and continue with '
        '--resume. Or lower the learning rate (--auto-scale-lr adapts it to '
        'the batch size) or lengthen the warm-up, and start a new training, '
        'for example with load_from=an earlier checkpoint; --resume would '
        'keep the learning rate of the checkpoint')


def _suspect(model: nn.Module, inputs: Tensor, samples: list) -> str:
    """A sentence about the possible cause."""
    bboxes = [get_box_tensor(sample.gt_instances.bboxes) for sample in samples]
    for name, tensors in (('images', [inputs]), ('boxes', bboxes)):
        if not all(tensor.isfinite().all() for tensor in tensors):
            return f'The {name} contain numbers that are not finite.'
    # Statistics of norms are not checked: this batch has changed them.
    for name, tensor in model.named_parameters():
        if not tensor.isfinite().all():
            return (f'{name} is not finite either: an earlier step has broken '
                    'the weights, so these images need not be the cause.')
    return 'Weights, images and boxes are finite.'


def _save_batch(path: str, step: int, losses: dict, inputs: Tensor,
                samples: List) -> str:
    """Saves the batch as plain data and says where, or why not."""
    samples = [
        dict(
            meta=plain_data(sample.metainfo),
            bboxes=get_box_tensor(sample.gt_instances.bboxes).cpu(),
            labels=sample.gt_instances.labels.cpu()) for sample in samples
    ]
    batch = dict(
        step=step, losses=losses, inputs=inputs.cpu(), samples=samples)
    try:
        write_file(path, partial(torch.save, batch))
    except OSError as error:  # The error about the loss is more important.
        return f'The batch could not be saved: {error}'
    return (f'The batch (inputs, boxes, labels) is in {path}: '
            'torch.load(..., weights_only=True)')
