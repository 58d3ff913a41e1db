"""The averages are mmengine's, in one call."""
import copy
from collections import Counter

import torch
from mmengine.model import MomentumAnnealingEMA
from torch.utils._python_dispatch import TorchDispatchMode

from mmdet_efficientdet import ForeachEMA


class Calls(TorchDispatchMode):
    """Counts the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func._schema.name] += 1
        return func(*args, **kwargs or {})


def test_averages_of_mmengine():
    """Weights, statistics, counts of batches; the first steps, an interval."""
    for options in (dict(momentum=2e-4, gamma=9, update_buffers=True),
                    dict(momentum=0.2, gamma=1, interval=2)):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).train()
        averages = [
            kind(model, **copy.deepcopy(options))
            for kind in (MomentumAnnealingEMA, ForeachEMA)
        ]
        for _ in range(7):
            model(torch.randn(2, 3, 8, 8))
            for value in model.parameters():
                value.data.add_(torch.randn_like(value))
            for average in averages:
                average.update_parameters(model)
            states = [average.state_dict() for average in averages]
            assert states[0].keys() == states[1].keys()
            for key, value in states[0].items():
                assert torch.equal(value, states[1][key]), key
        assert not torch.equal(states[1]['module.0.weight'], model[0].weight)


def test_one_call():
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(9)))
    average = ForeachEMA(model)
    average.update_parameters(model)
    with Calls() as calls:
        average.update_parameters(model)
    lerps = {k: n for k, n in calls.names.items() if 'lerp' in k}
    assert lerps == {'aten::_foreach_lerp_': 1}
