"""The average of the weights, without a call for each tensor."""
import torch
from mmengine.model import MomentumAnnealingEMA
from torch import Tensor, nn

from ..registry import MODELS


@MODELS.register_module()
class ForeachEMA(MomentumAnnealingEMA):
    """mmengine's ``MomentumAnnealingEMA``, updating all tensors at once.

    The averages are bit-identical to those of mmengine, which calls an
    operator for each of the hundreds of tensors.
    """

    def update_parameters(self, model: nn.Module) -> None:
        """Moves the averages towards the weights of ``model``."""
        # As in avg_func of mmengine
        weight = max(self.momentum,
                     self.gamma / (self.gamma + self.steps.item()))
        self._averages, self._sources = [], []
        super().update_parameters(model)
        if self._averages:
            torch._foreach_lerp_(self._averages, self._sources, weight)

    def avg_func(self, averaged_param: Tensor, source_param: Tensor,
                 steps: int) -> None:
        """Collects the pairs of one update."""
        self._averages.append(averaged_param)
        self._sources.append(source_param)
