"""The official weight decay and clipping, for mmengine.

Source: google/automl ``efficientdet/det_model_fn.py``.
"""
import re
from typing import List

import torch
from mmengine.dist import all_reduce_params, get_world_size
from mmengine.logging import MMLogger
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIMIZERS
from torch import nn

from ..registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class GroupedOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Joins parameters with equal options into one parameter group.

    mmengine makes a group of each parameter, hundreds of them, but torch's
    optimizers fuse their work only within a group. The official recipe needs
    two groups: kernels, which decay, and all other parameters.

    ``flat_decay_mult`` of ``paramwise_cfg``, which is for parameters with
    fewer than two dimensions, also applies to parameters that a key of
    ``custom_keys`` matches, unless the key has its own ``decay_mult``. With
    mmengine's constructor, another learning rate for the backbone turns on
    the weight decay of its norms and biases.

    A learning rate or weight decay that the config leaves out is the default
    of the optimizer.

    Raises:
        ValueError: If modules share a parameter, which mmengine's groups do
            not allow either.
    """

    def _validate_cfg(self) -> None:
        one = dict(self.optimizer_cfg, params=[nn.Parameter(torch.zeros(1))])
        like = OPTIMIZERS.build(one)
        self.base_lr = like.defaults.get('lr')
        self.base_wd = like.defaults.get('weight_decay')
        super()._validate_cfg()

    def add_params(self,
                   params: List[dict],
                   module: nn.Module,
                   prefix: str = '',
                   **kwargs) -> None:
        """Adds the parameters of ``module`` as mmengine's method does.

        mmengine logs each option of each parameter; this method, one line.
        """
        if prefix:  # a call for a submodule
            super().add_params(params, module, prefix=prefix, **kwargs)
            return
        logger = MMLogger.get_current_instance()
        logger.addFilter(_is_needed)
        try:
            super().add_params(params, module, **kwargs)
        finally:
            logger.removeFilter(_is_needed)
        flat = self.paramwise_cfg.get('flat_decay_mult')
        keys = self.paramwise_cfg.get('custom_keys', ())
        names = {id(p): name for name, p in module.named_parameters()}
        groups, seen = {}, set()
        for options in params:
            param, = options.pop('params')
            name = names[id(param)]
            if name in seen:
                raise ValueError(
                    f'{name} is shared by several modules. Set optim_wrapper'
                    '.paramwise_cfg.bypass_duplicate=True')
            seen.add(name)
            # mmengine has applied the multipliers to lr and weight_decay.
            options.pop('lr_mult', None)
            if (options.pop('decay_mult', None) is None and flat is not None
                    and param.ndim < 2 and any(key in name for key in keys)):
                options['weight_decay'] = (self.base_wd or 0) * flat
            options = dict(
                lr=self.base_lr, weight_decay=self.base_wd) | options
            groups.setdefault(repr(options), (options, []))[1].append(param)
        params[:] = [dict(o, params=p) for o, p in groups.values()]
        parts = [f'{len(p)} with {o}' for o, p in groups.values()]
        parts.append(f'{len(names) - len(seen)} frozen')
        logger.info(f'Parameters: {"; ".join(parts)}')


def _is_needed(record) -> bool:
    return not re.match('paramwise_options|.* is skipped since its requires_g',
                        record.getMessage())


@OPTIM_WRAPPERS.register_module()
class LocalClipOptimWrapper(OptimWrapper):
    """Clips the gradient of each rank before the gradients are summed.

    With R ranks, the official code on TPUs steps along the sum over ranks of
    ``clip(g_r / R)`` (google/automl ``det_model_fn.py``).
    DistributedDataParallel clips the mean of ``g_r``. The norm of one rank's
    share is about R times smaller, so that local clipping acts rarely and
    affects only the rank with the large gradient. With one rank, both are the
    same.

    The logged ``grad_norm`` is that of the first rank's share. All ranks must
    have gradients for the same parameters. Half precision needs mmengine's
    AmpOptimWrapper, which clips the mean.
    """

    def should_sync(self) -> bool:
        """Returns False: a rank keeps its own gradient until it is clipped."""
        return False

    def step(self, **kwargs) -> None:
        """Clips this rank's share, sums the shares and updates the weights.

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
