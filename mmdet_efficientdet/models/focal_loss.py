"""Focal loss without one-hot targets."""
from typing import Optional

import torch
import torch.nn.functional as F
from mmdet.models.losses import FocalLoss as HostFocalLoss
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..registry import MODELS


@MODELS.register_module()
class FocalLoss(HostFocalLoss):
    """MMDetection's focal loss, which takes less time and memory on a CPU.

    There MMDetection computes about ten tensors of the size of the logits
    for the backward pass. This class keeps one, the gradient, if the sum of
    the loss is asked for (``avg_factor``) and targets are indices. On a GPU
    it runs MMDetection's kernel.
    """

    def forward(self,
                pred: Tensor,
                target: Tensor,
                weight: Optional[Tensor] = None,
                avg_factor: Optional[Tensor] = None,
                **kwargs) -> Tensor:
        """Returns the loss; see MMDetection's ``FocalLoss``."""
        learned = weight is not None and weight.requires_grad
        if (pred.is_cuda or pred.dim() == target.dim() or avg_factor is None
                or kwargs or learned or self.activated
                or self.reduction != 'mean'):
            return super().forward(pred, target, weight, avg_factor, **kwargs)
        total = _FocalSum.apply(pred, target, weight, self.gamma, self.alpha)
        eps = torch.finfo(torch.float32).eps  # as MMDetection
        return self.loss_weight * total / (avg_factor + eps)


class _FocalSum(torch.autograd.Function):
    """The sum of the focal loss, whose gradient is computed with it."""

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, weight: Optional[Tensor],
                gamma: float, alpha: float) -> Tensor:
        num_classes = logits.shape[1]
        if ((target < 0) | (target > num_classes)).any():
            raise ValueError(
                f'targets are {int(target.min())} to {int(target.max())}, but '
                f'must be 0 to {num_classes}, which is the background')
        loss, grad = _focal(logits, gamma, 1 - alpha)
        row = (target < num_classes).nonzero().squeeze(1)
        own = row, target[row]
        loss[own], grad_own = _focal(-logits[own], gamma, alpha)
        grad[own] = -grad_own
        if weight is not None:
            rows = weight.numel() == len(loss)
            weight = weight.view(-1, 1) if rows else weight.view_as(loss)
            loss, grad = (x.mul_(weight) for x in (loss, grad))
        ctx.save_for_backward(grad)
        return loss.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple:
        return (ctx.saved_tensors[0] * grad_output, *[None] * 4)


def _focal(logits: Tensor, gamma: float, factor: float) -> tuple:
    """Loss and gradient of logits whose class is absent."""
    loss = F.softplus(logits, threshold=40)
    score = logits.sigmoid()
    # A power of 1.5, the official one, would take as long as all the rest.
    focus = score.sqrt().mul_(score) if gamma == 1.5 else score.pow(gamma)
    focus.mul_(factor)
    grad = (1 - score).mul_(loss).mul_(gamma).add_(score).mul_(focus)
    return loss.mul_(focus), grad
