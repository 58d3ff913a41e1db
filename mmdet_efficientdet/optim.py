"""The official learning rate, weight decay and clipping, for mmengine.

Source: google/automl ``efficientdet/det_model_fn.py``.
"""
import logging
import math
from typing import List

import torch
from mmengine.dist import all_reduce_params, get_world_size
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.optim.scheduler.lr_scheduler import LRSchedulerMixin
from mmengine.optim.scheduler.param_scheduler import _ParamScheduler
from torch import nn

from .registry import (HOOKS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS,
                       PARAM_SCHEDULERS)


@PARAM_SCHEDULERS.register_module()
class WarmupCosineLR(LRSchedulerMixin, _ParamScheduler):
    """Linear warm-up, then a cosine of the step counted from the very start.

    With ``W`` steps of warm-up of ``T`` in all, the rate at step ``s`` is the
    peak times ``start_factor + (1 - start_factor) * s / W`` before ``W``, then
    times ``(1 + cos(pi * s / (T - W))) / 2``. The cosine does not begin anew
    after the warm-up, as that of the host's pair of ``LinearLR`` and
    ``CosineAnnealingLR`` does, so it starts a little below the peak and turns
    just before the end. Everything is relative to the optimizer's ``lr``, so
    that scaling this for another batch scales the start, too.

    Args:
        optimizer (Optimizer | OptimWrapper): What to schedule.
        warmup (int): Length of the warm-up, in the unit of ``end``. Defaults
            to 1.
        start_factor (float): Rate of step 0, over the peak. Defaults to 0.05,
            which is the official 0.008 at 128 images.
        end (int): Length of the training. The runner fills in that of its
            loop.
        last_step (int): Defaults to -1.
        by_epoch (bool): Whether a step is an epoch. Defaults to True; with
            ``convert_to_iter_based=True`` in a config, ``warmup`` and ``end``
            are epochs and steps are iterations, as in the official code.
        verbose (bool): Prints each rate. Defaults to False.

    Raises:
        ValueError: If ``warmup`` is negative or ``start_factor`` not in 0..1.
    """

    def __init__(self,
                 optimizer,
                 warmup: int = 1,
                 start_factor: float = 0.05,
                 end: int = 10**9,
                 last_step: int = -1,
                 by_epoch: bool = True,
                 verbose: bool = False) -> None:
        if warmup < 0 or not 0 <= start_factor <= 1:
            raise ValueError(
                f'warmup={warmup} must be 0 or more steps, and start_factor='
                f'{start_factor} a part of the peak, from 0 to 1')
        if warmup < end < 4 * warmup:
            print_log(
                f'The official cosine counts from step 0: of {end} steps with '
                f'{warmup} of warm-up, its rate is at 0 when the warm-up ends '
                'or soon after, and rises again. Set a shorter warmup',
                'current', logging.WARNING)
        self.warmup = warmup
        self.start_factor = start_factor
        super().__init__(optimizer, 0, end, last_step, by_epoch, verbose)

    @classmethod
    def build_iter_from_epoch(cls,
                              *args,
                              epoch_length: int,
                              end: int,
                              warmup: int = 1,
                              by_epoch: bool = True,
                              **kwargs) -> 'WarmupCosineLR':
        """Builds it for iterations from numbers of epochs."""
        if not by_epoch:
            raise ValueError('convert_to_iter_based=True counts warmup and '
                             'end in epochs; remove by_epoch=False')
        return cls(
            *args,
            end=end * epoch_length,
            warmup=warmup * epoch_length,
            by_epoch=False,
            **kwargs)

    def load_state_dict(self, state_dict: dict) -> None:
        """Goes on at the saved step, on the curve of this config.

        A training that is resumed with more epochs thus follows their curve
        instead of staying at the last rate.
        """
        ours = ('end', 'warmup', 'start_factor')
        super().load_state_dict({
            k: v
            for k, v in state_dict.items() if k not in ours
        })
        for group, rate in zip(self.optimizer.param_groups, self._get_value()):
            group['lr'] = rate

    def _get_value(self) -> List[float]:
        """The rate of each parameter group at this step."""
        # last_step does not count on beyond the end.
        step, warmup = self._global_step, self.warmup
        if step < warmup:
            factor = self.start_factor
            factor += (1 - self.start_factor) * step / warmup
        else:
            angle = math.pi * step / max(self.end - warmup, 1)
            factor = (1 + math.cos(angle)) / 2
        return [base * factor for base in self.base_values]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class GroupedOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Joins parameters of equal options into one group.

    The host makes a group of every parameter, hundreds of them, and torch's
    optimizers fuse their work within a group only. The official recipe needs
    two: kernels, which decay, and all else.
    """

    def add_params(self,
                   params: List[dict],
                   module: nn.Module,
                   prefix: str = '',
                   **kwargs) -> None:
        """Adds the parameters of ``module``; see the host's method."""
        super().add_params(params, module, prefix=prefix, **kwargs)
        if prefix:
            return  # a call for a submodule
        groups = {}
        for single in params:
            options = dict(lr=self.base_lr, weight_decay=self.base_wd)
            # The multipliers have been applied to the two.
            options.update({
                key: value
                for key, value in single.items()
                if key not in ('params', 'lr_mult', 'decay_mult')
            })
            group = groups.setdefault(repr(options), dict(options, params=[]))
            group['params'] += single['params']
        params[:] = [{
            key: value
            for key, value in group.items() if value is not None
        } for group in groups.values()]


@OPTIM_WRAPPERS.register_module()
class LocalClipOptimWrapper(OptimWrapper):
    """Clips the gradient of each rank before they are summed.

    With R ranks the official code on TPUs steps along the sum over ranks of
    ``clip(g_r / R)`` (google/automl ``det_model_fn.py``), while the host, as
    all of DistributedDataParallel's users, clips the mean of ``g_r``. The
    norm of a rank's share is R times smaller, so that clipping acts rarely
    here, and only on the rank whose batch is at fault. With one rank both are
    the same.

    The logged ``grad_norm`` is that of the first rank's share. Every rank
    must have gradients for the same parameters. Half precision needs the
    host's AmpOptimWrapper, which clips the mean.
    """

    def should_sync(self) -> bool:
        """Never: every rank keeps its own gradient until it is clipped."""
        return False

    def step(self, **kwargs) -> None:
        """Clips this rank's share, sums over ranks and updates.

        Args:
            kwargs: See ``torch.optim.Optimizer.step``.
        """
        grads = [
            parameter.grad for group in self.optimizer.param_groups
            for parameter in group['params'] if parameter.grad is not None
        ]
        torch._foreach_div_(grads, get_world_size())
        if self.clip_grad_kwargs:
            self._clip_grad()
        all_reduce_params(grads)
        self.optimizer.step(**kwargs)


@HOOKS.register_module()
class BatchScaleHook(Hook):
    """Completes ``--auto-scale-lr`` where gradients are accumulated.

    The host scales the rate by the images of one iteration of all ranks. A
    step of the optimizer sees ``accumulative_counts`` times as many.
    """

    priority = 'VERY_HIGH'

    def before_run(self, runner) -> None:
        """Scales before anything is resumed, and says what came of it."""
        scaling, wrapper = runner.auto_scale_lr or {}, runner.optim_wrapper
        if not (scaling.get('enable') and isinstance(wrapper, OptimWrapper)):
            return
        loader, world = runner.train_dataloader, runner.world_size
        counts, batch = wrapper._accumulative_counts, loader.batch_size
        ratio = world * batch * counts / scaling['base_batch_size']
        for group in wrapper.param_groups:
            # The host does not scale what the log shows as base_lr.
            unscaled = group is wrapper.base_param_settings
            for key in {'lr', 'initial_lr'} & group.keys():
                group[key] *= ratio if unscaled else counts
        for scheduler in runner.param_schedulers or []:
            if scheduler.param_name == 'lr':
                scheduler.base_values = [
                    group['initial_lr'] for group in wrapper.param_groups
                ]
        start = max(group['lr'] for group in wrapper.param_groups)
        peak = max(
            group.get('initial_lr', start) for group in wrapper.param_groups)
        runner.logger.info(
            f'One step of the optimizer sees {world * batch * counts} images '
            f'({world} processes x {batch} images x {counts} accumulated): '
            f'learning rate {peak:g}, from {start:g} at the start')
