"""Gives the tensors of another project our names, axes and order."""
import re
from typing import Dict, List, Mapping, Tuple

import numpy as np
import torch
from torch import Tensor

from .layouts import LAYOUTS
from .naming import Layout

# What stands in checkpoints beside weights: pattern of names, and the reason
# why it is left aside.
LEFT_ASIDE = (
    (r'.*/Momentum|.*/\.OPTIMIZER_SLOT/.*|(.*/)?optimizer/_variables/.*',
     'optimizer slots'),
    (r'(.*/)?global_step|(.*/)?save_counter/.*|(.*/)?optimizer/.*',
     'counters and settings of the training'),
    (r'.*\.num_batches_tracked', 'batch counters, which nothing reads'),
)
_REDUNDANT_BIAS = (r'(neck\..*\.conv(\.pointwise)?|'
                   r'bbox_head\.\w+_convs\.\d+\.pointwise)\.bias')
EMA_SUFFIX = '/ExponentialMovingAverage'
# Category ids of COCO that no object has; an output of 90 has a slot for
# each id from 1.
UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)


def convert(tensors: Mapping,
            own: Mapping[str, Tuple],
            arch: str,
            num_levels: int,
            averages: bool = True) -> Tuple[Dict[str, Tensor], List[str]]:
    """Renames and transposes the tensors of another EfficientDet.

    Every tensor of ours is filled, and every one of the source is used once
    or left aside for a reason.

    Args:
        tensors (Mapping): Name to array, in any of ``LAYOUTS``.
        own (Mapping): Name to shape of our model's state dict.
        arch (str): Architecture of its backbone.
        num_levels (int): Number of its pyramid levels.
        averages (bool): Whether to prefer moving averages of the weights
            where there are any. Defaults to True.

    Returns:
        tuple: Our state dict, with a head of as many classes as the source,
        and the lines of a receipt.

    Raises:
        ValueError: If something is left over or missing, naming both, or a
            value is not finite.
    """
    own = {k: v for k, v in own.items() if 'num_batches_tracked' not in k}
    layout = _recognise(tensors, own, arch, num_levels)
    reasons: Dict[str, int] = {}
    rest, means = {}, {}
    for name, value in tensors.items():
        reason = next(
            (why for what, why in LEFT_ASIDE if re.fullmatch(what, name)), '')
        average = re.sub(r'/\.OPTIMIZER_SLOT/\w+/average(?=/\.ATTR)', '', name)
        if name.endswith(EMA_SUFFIX):
            means[layout.normalized(name[:-len(EMA_SUFFIX)])] = value
        elif average != name:
            means[layout.normalized(average)] = value
        elif reason:
            reasons[reason] = reasons.get(reason, 0) + 1
        else:
            rest[layout.normalized(name)] = value
    unknown = means.keys() - rest.keys()
    used = {**rest, **means} if averages else rest
    raw = len(rest.keys() - means.keys()) if averages else len(rest)
    state_dict, missing, wrong = {}, [], []
    without_bias = 0
    for key, shape in own.items():
        names = layout.names(key, arch, num_levels)
        values = [used.get(name) for name in names]
        if any(value is None for value in values) or not values:
            # A bias in front of a norm is redundant; some leave it out.
            if re.fullmatch(_REDUNDANT_BIAS, key):
                state_dict[key] = torch.zeros(shape)
                without_bias += 1
            else:
                missing += [f'{key} {tuple(shape)}']
            continue
        for name in names:
            rest.pop(name, None)
        value = _to_ours(values, key, layout)
        classes = key.startswith('bbox_head.conv_cls.pointwise')
        if value.shape[classes:] != tuple(shape)[classes:]:
            wrong.append(f'{key} {tuple(value.shape)}, {tuple(shape)}')
        state_dict[key] = value
    unused_sums = [k for k in rest if re.search(r'\.p\d_w[12]$', k)]
    if not any(k.endswith('fusion_weights') for k in own):
        for name in unused_sums:
            rest.pop(name)
        if unused_sums:
            reasons['fusion weights, which a sum does not use'] = \
                len(unused_sums)
    left = sorted([*rest, *unknown])
    if missing or left or wrong:
        raise ValueError('\n'.join([
            f'the weights ({layout.title}) do not fit this model: '
            f'{len(missing)} of its tensors are missing, {len(left)} of the '
            f'source are left over, {len(wrong)} differ in shape',
            *[f'  + {item}' for item in missing[:10]],
            *[f'  - {item}'
              for item in left[:10]], *[f'  ! {item}' for item in wrong[:10]]
        ]))
    broken = [k for k, v in state_dict.items() if not v.isfinite().all()]
    if broken:
        raise ValueError(f'{len(broken)} tensors hold NaN or infinity: '
                         f'{", ".join(broken[:10])}')
    receipt = [
        f'layout: {layout.title}',
        f'filled: {len(state_dict)} tensors of the model'
    ]
    if means:
        receipt.append(f'used: {len(used) - raw} moving averages, {raw} raw'
                       if averages else f'used: {raw} raw, not the '
                       f'{len(means)} moving averages')
    if without_bias:
        receipt.append(f'set to zero: {without_bias} biases in front of '
                       'norms, which the source does not have')
    receipt += [f'left aside: {n} {why}' for why, n in reasons.items()]
    return state_dict, receipt


def _recognise(tensors: Mapping, own: Mapping, arch: str,
               num_levels: int) -> Layout:
    """The layout that shares the most names with the source."""

    def matches(layout: Layout) -> int:
        given = {layout.normalized(name) for name in tensors}
        return sum(
            name in given for key in own
            for name in layout.names(key, arch, num_levels))

    counts = {layout: matches(layout) for layout in LAYOUTS}
    best = max(counts, key=counts.get)
    if not counts[best]:
        raise ValueError(
            'the names of the tensors are of no known EfficientDet, such as '
            f'{", ".join(list(tensors)[:3])}. Known are: '
            f'{", ".join(layout.title for layout in LAYOUTS)}')
    return best


def _to_ours(values: list, key: str, layout: Layout) -> Tensor:
    """One tensor in our axes, as a copy of its own."""
    if layout.tensorflow:
        if key.endswith('fusion_weights'):
            values = [np.stack(values)]
        value = np.asarray(values[0], np.float32)
        if value.ndim == 4:
            depthwise = 'depthwise' in key
            value = value.transpose((2, 3, 0, 1) if depthwise else (3, 2, 0,
                                                                    1))
        value = torch.from_numpy(np.array(value, order='C'))
    else:
        value = values[0].detach().float().clone()
    if layout.y_first and key.startswith('bbox_head.conv_reg.pointwise'):
        # (y, x, h, w) of each anchor to (x, y, w, h)
        value = value.unflatten(0, (-1, 4))[:, [1, 0, 3, 2]].flatten(0, 1)
    return value


def select_coco_classes(state_dict: Dict[str, Tensor],
                        num_anchors: int = 9) -> Dict[str, Tensor]:
    """Keeps the 80 used of the 90 slots of a COCO head.

    Slot ``c`` is category id ``c + 1``; what is kept is bit for bit the same.
    """
    ids = [i for i in range(1, 91) if i not in UNUSED_IDS]
    rows = torch.tensor(ids) - 1
    return {
        key:
        value.unflatten(0, (num_anchors, 90))[:, rows].flatten(0, 1)
        if key.startswith('bbox_head.conv_cls.pointwise') else value
        for key, value in state_dict.items()
    }
