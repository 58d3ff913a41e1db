"""Prediction with the plain network of a detector."""
from typing import Optional

import torch
from mmdet.structures import SampleList
from torch import Tensor, nn

from ..deploy import PlainNetwork, plain_network
from ..scaling import MIN_SIDE


class PlainPredictMixin:
    """Mixin of single-stage detectors that fold their norms to predict.

    In evaluation mode and without gradients, ``predict`` runs the plain
    network, which is made once and again after any change: of the mode, of a
    tensor, of its place or of the modules. The detector itself runs if one of
    its modules has a hook, with another precision than float32, and if an
    option has no plain form. ``fast_predict=False`` turns the plain network
    off.
    """

    fast_predict = True
    _plain = (None, None)  # state of the detector, its plain network

    def train(self, mode: bool = True) -> nn.Module:
        """Sets the mode and forgets the plain network."""
        self._plain = (None, None)
        return super().train(mode)

    def predict(self,
                batch_inputs: Tensor,
                batch_data_samples: SampleList,
                rescale: bool = True) -> SampleList:
        """Predicts boxes; see MMDetection's ``SingleStageDetector``."""
        network = None
        if min(batch_inputs.shape[-2:]) >= MIN_SIDE:
            network = self.current_plain_network()
        if network is None:
            return super().predict(batch_inputs, batch_data_samples, rescale)
        results = self.bbox_head.predict_by_feat(
            *network(batch_inputs),
            batch_img_metas=[x.metainfo for x in batch_data_samples],
            rescale=rescale)
        return self.add_pred_to_datasample(batch_data_samples, results)

    def current_plain_network(self) -> Optional[PlainNetwork]:
        """The plain network of the present weights, if it may be used."""
        if (not self.fast_predict or self.training or torch.is_grad_enabled()
                or torch.is_autocast_enabled()
                or torch.is_autocast_enabled('cpu')
                or torch.compiler.is_compiling()):
            return None
        state = _state(self)
        if state is None:
            return None
        if state != self._plain[0]:
            try:
                network = plain_network(self)
            except ValueError:  # an option has no plain form
                network = None
            self._plain = state, network
        return self._plain[1]


def _state(detector: nn.Module) -> Optional[list]:
    """What changes with the weights; None for hooks or other precisions."""
    state = []
    for module in detector.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return None
        state.append(type(module))
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is None:
                    continue
                if tensor.dtype not in (torch.float32, torch.int64):
                    return None
                state.append((tensor.data_ptr(), tensor._version))
    return state
