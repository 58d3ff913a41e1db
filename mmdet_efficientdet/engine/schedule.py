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
    """Linear warm-up, perhaps the peak, then a cosine.

    With ``W`` steps of warm-up of ``T`` in all, the rate at step ``s`` is the
    peak times ``start_factor + (1 - start_factor) * s / W`` before ``W``, then
    times ``(1 + cos(pi * s / (T - W))) / 2``. Unlike mmengine's ``LinearLR``
    followed by ``CosineAnnealingLR``, the cosine does not restart after the
    warm-up. It begins slightly below the peak and turns shortly before the
    end. With ``hold``, the rate stays at the peak until step ``H = hold * T``,
    and is then ``(1 + cos(pi * (s - H) / (T - H))) / 2`` of it. All rates are
    relative to the optimizer's ``lr``, so that scaling ``lr`` for another
    batch size scales the whole schedule.

    Args:
        optimizer (Optimizer | OptimWrapper): Its learning rate is scheduled.
        warmup (int): Length of the warm-up, in the unit of ``end``. Defaults
            to 1.
        start_factor (float): Rate of step 0 divided by the peak. Defaults to
            0.05, which is the official 0.008 for batches of 128.
        hold (float): Share of the training after which the cosine begins, if
            the warm-up has ended. Defaults to 0, the official cosine.
        end (int): Length of the training. The runner sets it to that of its
            loop.
        by_epoch (bool): Whether a step is an epoch. Defaults to True; with
            ``convert_to_iter_based=True`` in a config, ``warmup`` and ``end``
            are epochs and steps are iterations, as in the official code. An
            iteration-based loop needs False.
        verbose (bool): Prints each rate. Defaults to False.

    Raises:
        ValueError: If ``warmup`` is negative, ``start_factor`` is not in
            [0, 1] or ``hold`` is not in [0, 1).
    """

    def __init__(self,
                 optimizer,
                 warmup: int = 1,
                 start_factor: float = 0.05,
                 hold: float = 0.0,
                 end: int = 10**9,
                 by_epoch: bool = True,
                 verbose: bool = False) -> None:
        if warmup < 0 or not 0 <= start_factor <= 1 or not 0 <= hold < 1:
            raise ValueError(
                f'warmup={warmup} must be at least 0, start_factor='
                f'{start_factor} from 0 to 1, and hold={hold} at least 0 and '
                'less than 1')
        self.warmup = warmup
        self.hold = hold
        self.start_factor = start_factor
        super().__init__(optimizer, 0, end, -1, by_epoch, verbose)

    @classmethod
    def build_iter_from_epoch(cls,
                              *args,
                              epoch_length: int,
                              end: int,
                              warmup: int = 1,
                              by_epoch: bool = True,
                              **kwargs) -> 'WarmupCosineLR':
        """Builds an iteration-based schedule from numbers of epochs."""
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
        """Continues at the saved step with the length of this config.

        A training that is resumed with more epochs follows the longer curve
        instead of staying at the last rate. As with all of mmengine's
        schedulers, the peak rate is that of the checkpoint.

        Raises:
            ValueError: If one of the checkpoint and this schedule counts
                epochs and the other one iterations.
        """
        if state_dict.get('by_epoch', self.by_epoch) != self.by_epoch:
            raise ValueError(
                'the schedule of the checkpoint has by_epoch='
                f'{not self.by_epoch}, but that of the config has by_epoch='
                f'{self.by_epoch}. Resume with the same setting, or start a '
                'new training with load_from')
        before = state_dict.get('warmup',
                                self.warmup), state_dict.get('hold', 0.0)
        if before != (self.warmup, self.hold):
            print_log(
                f'(warmup, hold) of the checkpoint is {before}, but that of '
                f'the config is {(self.warmup, self.hold)}. The schedule '
                'continues at another point of its curve. The warm-up changes '
                'with the length of an epoch (batch size, processes, data)',
                'current', logging.WARNING)
        ours = ('end', 'warmup', 'start_factor', 'hold')
        super().load_state_dict({
            k: v
            for k, v in state_dict.items() if k not in ours
        })
        for group, rate in zip(self.optimizer.param_groups, self._get_value()):
            group['lr'] = rate

    def _get_value(self) -> List[float]:
        """The rate of each parameter group at this step."""
        # mmengine stops counting last_step at the end, but not
        # _global_step. A longer training keeps the last rate.
        step = min(self._global_step, self.end - 1)
        if step < self.warmup:
            rise = (1 - self.start_factor) * step / self.warmup
            factor = self.start_factor + rise
        else:
            start = self.hold * self.end
            length = self.end - (start or self.warmup)
            angle = math.pi * max(step - start, 0) / max(length, 1)
            factor = (1 + math.cos(angle)) / 2
        return [base * factor for base in self.base_values]


@HOOKS.register_module()
class BatchScaleHook(Hook):
    """Makes ``--auto-scale-lr`` count accumulated gradients.

    mmengine scales the rate by the images of one iteration of all ranks. One
    step of the optimizer uses ``accumulative_counts`` times as many images.
    """

    priority = 'VERY_HIGH'

    def before_run(self, runner) -> None:
        """Scales the learning rate before a checkpoint is resumed."""
        scaling, wrapper = runner.auto_scale_lr or {}, runner.optim_wrapper
        if not isinstance(wrapper, OptimWrapper) or hasattr(self, '_peak'):
            return  # several optimizers, or a test after a training
        self._images = None
        if scaling.get('enable'):
            counts, world = wrapper._accumulative_counts, runner.world_size
            given = runner.cfg.train_dataloader.batch_size
            # A custom batch sampler may have another batch size.
            batch = runner.train_dataloader.batch_sampler.batch_size
            if not isinstance(batch, int):
                batch = given
            self._images = world * batch * counts
            runner.logger.info(
                f'One step of the optimizer uses {self._images} images '
                f'({world} processes x {batch} images x {counts} accumulated)')
            ratio = self._images / scaling['base_batch_size']
            scaled = world * given / scaling['base_batch_size']  # by mmengine
            for group in wrapper.param_groups:
                # mmengine does not scale what the log shows as base_lr.
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
        """Logs the learning rate after a checkpoint may have been resumed."""
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
                f'The learning rate stays {peak:g}, as in the checkpoint. '
                f'That of this config, {self._peak:g}, is used for a new '
                'training with load_from')


def _peak(wrapper: OptimWrapper) -> float:
    return max(
        group.get('initial_lr', group['lr'])
        for group in wrapper.optimizer.param_groups)
