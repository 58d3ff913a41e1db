"""Stops a training at the first loss that is not a finite number."""
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
    """A term of the loss is infinite or not a number."""


def check_finite(losses: dict, model: nn.Module, batch_inputs: Tensor,
                 batch_data_samples: list) -> None:
    """Raises at the first loss that is not finite, on all ranks at once.

    The weights are still those of the step before: the optimizer has not
    stepped. Costs one transfer from the device.

    Args:
        losses (dict): Name to scalar, or to a list of them.
        model (nn.Module): Asked only then whether its weights are finite.
        batch_inputs (Tensor): Saved then, in the work directory, with boxes,
            labels and names.
        batch_data_samples (list): ``DetDataSample`` of each image.

    Raises:
        NonFiniteLossError: If a term is not finite, on any rank.
    """
    terms = {
        name: sum(value) if isinstance(value, (list, tuple)) else value
        for name, value in losses.items()
    }
    values = torch.stack([value.detach().mean() for value in terms.values()])
    rank, world_size = get_dist_info()
    failed = values.new_zeros(world_size)
    failed[rank] = ~values.isfinite().all()
    all_reduce(failed)
    if not failed.any():
        return
    info = MessageHub.get_current_instance().runtime_info
    step = info.get('iter', 0) + 1
    if not failed[rank]:
        raise NonFiniteLossError(
            f'step {step}: the loss is not finite on rank '
            f'{failed.nonzero().flatten().tolist()} of {world_size}; the '
            'message of that rank says more')
    values = dict(zip(terms, values.tolist()))
    bad = [
        f'{name}={value}' for name, value in values.items()
        if not torch.tensor(value).isfinite()
    ]
    path = osp.join(
        info.get('work_dir', '.'), f'nonfinite_step_{step}_rank_{rank}.pth')
    saved = _save_batch(path, step, values, batch_inputs, batch_data_samples)
    images = [sample.metainfo.get('img_path') for sample in batch_data_samples]
    raise NonFiniteLossError(
        f'step {step}: {", ".join(bad)}; the optimizer has not stepped. '
        f'{_suspect(model, batch_inputs, batch_data_samples)}\n  images: '
        f'{", ".join(map(str, images))}\n  {saved}\n  What helps: a look at '
        'these images and boxes, or a training without --amp: then go on with '
        '--resume. Or a lower learning rate or a longer warm-up '
        '(--auto-scale-lr fits it to the batch): then start anew, with '
        'load_from=an earlier checkpoint if you like, as --resume keeps the '
        'rate of its checkpoint')


def _suspect(model: nn.Module, inputs: Tensor, samples: list) -> str:
    """Where the first number that is not finite may come from."""
    if not inputs.isfinite().all():
        return 'The images themselves hold numbers that are not finite.'
    for sample in samples:
        if not get_box_tensor(sample.gt_instances.bboxes).isfinite().all():
            return 'The boxes themselves hold numbers that are not finite.'
    # Not the averages of norms, which this very batch has changed.
    for name, tensor in model.named_parameters():
        if not tensor.isfinite().all():
            return (f'{name} is not finite either: an earlier step has spoilt '
                    'the weights, so these images need not be the cause.')
    return 'Weights, images and boxes are finite.'


def _save_batch(path: str, step: int, losses: dict, inputs: Tensor,
                samples: List) -> str:
    """Saves the batch as plain data; says where, or why not."""
    batch = dict(
        step=step,
        losses=losses,
        inputs=inputs.detach().cpu(),
        samples=[
            dict(
                meta=plain_data(sample.metainfo),
                bboxes=get_box_tensor(sample.gt_instances.bboxes).cpu(),
                labels=sample.gt_instances.labels.cpu()) for sample in samples
        ])
    try:
        write_file(path, partial(torch.save, batch))
    except OSError as error:  # the loss matters more
        return f'The batch could not be saved: {error}'
    return (f'The batch (inputs, boxes, labels) is in {path}: '
            'torch.load(..., weights_only=True)')
