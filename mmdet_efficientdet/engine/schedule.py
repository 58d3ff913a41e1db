"""The official learning rate, and its scaling to another batch.

Source: google/automl ``efficientdet/det_model_fn.py``.
"""
import logging
import math
from typing import List

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.optim.scheduler.lr_scheduler import LRSchedulerMixin
from mmengine.optim.scheduler.param_scheduler import _ParamScheduler

from ..registry import HOOKS, PARAM_SCHEDULERS


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
        by_epoch (bool): Whether a step is an epoch. Defaults to True; with
            ``convert_to_iter_based=True`` in a config, ``warmup`` and ``end``
            are epochs and steps are iterations, as in the official code. A
            loop that counts iterations needs False.
        verbose (bool): Prints each rate. Defaults to False.

    Raises:
        ValueError: If ``warmup`` is negative or ``start_factor`` not in 0..1.
    """

    def __init__(self,
                 optimizer,
                 warmup: int = 1,
                 start_factor: float = 0.05,
                 end: int = 10**9,
                 by_epoch: bool = True,
                 verbose: bool = False) -> None:
        if warmup < 0 or not 0 <= start_factor <= 1:
            raise ValueError(
                f'warmup={warmup} must be 0 or more steps, and start_factor='
                f'{start_factor} a part of the peak, from 0 to 1')
        self.warmup = warmup
        self.start_factor = start_factor
        super().__init__(optimizer, 0, end, -1, by_epoch, verbose)
        if end <= 2 * warmup:
            print_log(
                f'The warm-up takes {warmup} of {end} steps, which leaves no '
                'time to learn at the peak. Set a shorter warmup; a loop that '
                'counts iterations needs param_scheduler=[dict('
                "type='mmdet_efficientdet.WarmupCosineLR', by_epoch=False, "
                'warmup=<iterations>)]', 'current', logging.WARNING)
        elif end < 10 * warmup:
            print_log(
                f'The official cosine counts from step 0: of {end} steps with '
                f'{warmup} of warm-up, its rate is 0 at step {end - warmup} '
                f'and rises again, to {self._factor(end - 1):.0%} of the '
                'peak. Set a shorter warmup', 'current', logging.WARNING)

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
        """Goes on at the saved step, on the curve of this config's length.

        A training that is resumed with more epochs thus follows their curve
        instead of staying at the last rate. The peak stays that of the
        checkpoint, as with every scheduler of the host.

        Raises:
            ValueError: If the checkpoint counts epochs and this iterations,
                or the other way round.
        """
        if state_dict.get('by_epoch', self.by_epoch) != self.by_epoch:
            raise ValueError(
                'the schedule of the checkpoint has by_epoch='
                f'{not self.by_epoch}, that of the config {self.by_epoch}. '
                'Resume with the same, or start anew with load_from')
        before = state_dict.get('warmup', self.warmup)
        if before != self.warmup:
            print_log(
                f'The warm-up of the checkpoint has {before} steps, that of '
                f'the config {self.warmup}. If epochs have another length now '
                '(batch, processes, data), the schedule goes on at another '
                'place of its curve', 'current', logging.WARNING)
        ours = ('end', 'warmup', 'start_factor')
        super().load_state_dict({
            k: v
            for k, v in state_dict.items() if k not in ours
        })
        for group, rate in zip(self.optimizer.param_groups, self._get_value()):
            group['lr'] = rate

    def _get_value(self) -> List[float]:
        """The rate of each parameter group at this step."""
        # The host stops counting last_step at the end, but not this; a
        # training that goes on keeps the last rate.
        factor = self._factor(min(self._global_step, self.end - 1))
        return [base * factor for base in self.base_values]

    def _factor(self, step: int) -> float:
        if step < self.warmup:
            return self.start_factor + (1 -
                                        self.start_factor) * step / self.warmup
        angle = math.pi * step / max(self.end - self.warmup, 1)
        return (1 + math.cos(angle)) / 2


@HOOKS.register_module()
class BatchScaleHook(Hook):
    """Completes ``--auto-scale-lr`` where gradients are accumulated.

    The host scales the rate by the images of one iteration of all ranks. A
    step of the optimizer sees ``accumulative_counts`` times as many.
    """

    priority = 'VERY_HIGH'

    def before_run(self, runner) -> None:
        """Scales, before anything is resumed."""
        scaling, wrapper = runner.auto_scale_lr or {}, runner.optim_wrapper
        if not isinstance(wrapper, OptimWrapper) or hasattr(self, '_peak'):
            return  # several optimizers, or a test after a training
        self._images = None
        if scaling.get('enable'):
            counts, world = wrapper._accumulative_counts, runner.world_size
            given = runner.cfg.train_dataloader.batch_size
            # A batch sampler of the config may have another size.
            batch = runner.train_dataloader.batch_sampler.batch_size
            if not isinstance(batch, int):
                batch = given
            self._images = world * batch * counts
            runner.logger.info(
                f'One step of the optimizer sees {self._images} images '
                f'({world} processes x {batch} images x {counts} accumulated)')
            ratio = self._images / scaling['base_batch_size']
            scaled = world * given / scaling['base_batch_size']  # by the host
            for group in wrapper.param_groups:
                # The host does not scale what the log shows as base_lr.
                unscaled = group is wrapper.base_param_settings
                for key in {'lr', 'initial_lr'} & group.keys():
                    group[key] *= ratio if unscaled else ratio / scaled
            for scheduler in runner.param_schedulers or []:
                if scheduler.param_name == 'lr':
                    scheduler.base_values = [
                        group['initial_lr'] for group in wrapper.param_groups
                    ]
        self._peak = _peak(wrapper)

    def before_train(self, runner) -> None:
        """Says what the rate is, now that a checkpoint may have been read."""
        wrapper = runner.optim_wrapper
        if not isinstance(wrapper, OptimWrapper):
            return
        peak = _peak(wrapper)
        if self._images:
            now = max(group['lr'] for group in wrapper.optimizer.param_groups)
            runner.logger.info(
                f'Base learning rate {peak:g}, and {now:g} at this step')
        if not math.isclose(peak, self._peak):
            runner.logger.warning(
                f'The learning rate stays {peak:g}, with which the checkpoint '
                f'was trained; that of this config, {self._peak:g}, is for a '
                'training from load_from')


def _peak(wrapper: OptimWrapper) -> float:
    return max(
        group.get('initial_lr', group['lr'])
        for group in wrapper.optimizer.param_groups)
