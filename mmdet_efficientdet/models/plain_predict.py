"""Prediction with the plain network of a detector."""
from typing import Optional

import torch
from mmdet.structures import SampleList
from mmengine.logging import print_log
from torch import Tensor, nn

from ..deploy import PlainNetwork, plain_network
from ..scaling import MIN_SIDE


class PlainPredictMixin:
    """Mixin of single-stage detectors that fold their norms to predict.

    In evaluation mode and without gradients, ``predict`` runs the plain
    network. It is made at the first image, and again after any change of a
    tensor, of its place, or of the modules. The detector itself runs if one of
    its modules has a hook or trains, with another precision than float32, and
    if a module has no plain form. ``fast_predict=False`` turns the plain
    network off.
    """

    fast_predict = True
    _plain = (None, None)  # state of the detector, its plain network

    def train(self, mode: bool = True) -> nn.Module:
        """Sets the mode; in training the plain network is not kept."""
        if mode:
            self._plain = (None, None)
        return super().train(mode)

    def __getstate__(self) -> dict:
        """Neither copies nor files have the plain network."""
        return {k: v for k, v in vars(self).items() if k != '_plain'}

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
        if (not self.fast_predict or torch.is_grad_enabled()
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
            except ValueError as error:
                network = None
                print_log(f'predict runs the detector itself: {error}',
                          'current')
            self._plain = state, network
        return self._plain[1]


def _state(detector: nn.Module) -> Optional[tuple]:
    """What changes with the computation; None if it cannot be plain.

    Versions of tensors do not count what is written through ``data``, as by
    mmengine's EMAHook, so their norms are compared as well.
    """
    kinds, tensors = [], []
    for module in detector.modules():
        if (module.training or module._forward_hooks
                or module._forward_pre_hooks):
            return None
        kinds.append((type(module), getattr(module, 'eps', None)))
        tensors += module._parameters.values()
        tensors += module._buffers.values()
    tensors = [tensor for tensor in tensors if tensor is not None]
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    if any(x.dtype != torch.float32 or x.is_inference() for x in floats):
        return None
    norms = torch.stack(torch._foreach_norm(floats)).tolist()
    return kinds, [(x.data_ptr(), x._version) for x in floats], norms
