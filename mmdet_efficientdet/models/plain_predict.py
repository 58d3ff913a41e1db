"""Prediction with the plain network of a detector."""
from itertools import chain
from typing import List, Optional, Tuple

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from ..deploy.folding import plain_network
from ..deploy.network import PlainNetwork

STEP = 61  # between the values of a large tensor that are compared


class PlainPredictMixin:
    """Mixin of detectors that fold their norms to predict.

    In evaluation mode and without gradients, ``predict`` runs the plain
    network. It is made at the first image, and again after any change of a
    tensor, of its place, or of the modules. The detector itself runs if one of
    its modules has a hook or trains, with another precision than float32, and
    if a module has no plain form. ``fast_predict=False`` turns the plain
    network off.
    """

    fast_predict = True
    _plain = (None, None)  # snapshot of the detector, its plain network

    def train(self, mode: bool = True) -> nn.Module:
        """Sets the mode; in training the plain network is not kept."""
        if mode:
            self._plain = (None, None)
        return super().train(mode)

    def __getstate__(self) -> dict:
        """Neither copies nor files have the plain network."""
        return {k: v for k, v in vars(self).items() if k != '_plain'}

    def current_plain_network(self) -> Optional[PlainNetwork]:
        """The plain network of the present weights, if it may be used."""
        if (not self.fast_predict or torch.is_grad_enabled()
                or torch.is_autocast_enabled()
                or torch.is_autocast_enabled('cpu')
                or torch.compiler.is_compiling()):
            return None
        made_from, network = self._plain
        if made_from is None or made_from.has_changed():
            made_from, network = _Snapshot(self), None
            try:
                network = plain_network(self) if made_from.usable else None
            except ValueError as error:
                print_log(f'predict runs the detector itself: {error}',
                          'current')
            self._plain = made_from, network
        return network


class _Snapshot:
    """What changes with the computation of a detector in evaluation mode.

    Versions of tensors do not count what is written through ``data``, as by
    mmengine's EMAHook, so values are compared as well: all of small tensors
    and of those with short rows or columns, else every 61st. 61 divides no
    width, so a new row or column of weights shows. A single weight of a large
    tensor, written through ``data``, may not.
    """

    def __init__(self, detector: nn.Module) -> None:
        self.modules = list(detector.modules())
        self.hooks = [
            hooks for x in self.modules
            for hooks in (x._forward_hooks, x._forward_pre_hooks)
        ]
        self.tables = [
            table for x in self.modules
            for table in (x._modules, x._parameters, x._buffers)
        ]
        self.norms = [
            x for x in self.modules
            if 'eps' in vars(x) or hasattr(type(x), 'eps')
        ]
        self.tensors = [  # kept, so that none is replaced at the same address
            x for table in self.tables for x in table.values()
            if isinstance(x, Tensor) and x.is_floating_point() and x.numel()
        ]
        self.usable = not any(self.hooks) and not any(
            x.training for x in self.modules) and all(
                x.dtype == torch.float32 and not x.is_inference()
                for x in self.tensors)
        small, large = [], []  # torch.cat is slow for those that have steps
        for x in self.tensors:
            last = sum((n - 1) * step for n, step in zip(x.shape, x.stride()))
            values = x.detach().as_strided((last + 1, ), (1, ))
            if last < 2**12 or min(len(x), x[0].numel()) < STEP:
                small.append(values)
            else:
                large.append(values[::STEP])
        self.samples = [part for part in (small, large) if part]
        self.state, self.values = self._look()

    def has_changed(self) -> bool:
        """Whether anything is no longer as it was."""
        state, values = self._look()
        return state != self.state or not all(
            map(torch.equal, values, self.values))

    def _look(self) -> Tuple[list, List[Tensor]]:
        members = chain.from_iterable(map(dict.values, self.tables))
        state = [
            any(self.hooks), [x.training for x in self.modules],
            list(map(type, self.modules)), [x.eps for x in self.norms],
            list(map(id, members)), [x.data_ptr() for x in self.tensors]
        ]
        if self.usable:  # else tensors may have no versions
            state.append([x._version for x in self.tensors])
        return state, [torch.cat(part) for part in self.samples]
