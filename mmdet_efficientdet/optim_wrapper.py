"""Gradient clipping as on TPUs."""
import torch
from mmengine.dist import all_reduce_params, get_world_size
from mmengine.optim import OptimWrapper

from .registry import OPTIM_WRAPPERS


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
