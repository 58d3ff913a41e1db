"""Gives the tensors of another project our names, axes and order."""
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Dict, List, Mapping, Tuple

import numpy as np
import torch
from torch import Tensor

from ..models.efficientdet import CLASS_PREDICTOR
from .layouts import BACKBONES, LAYOUTS
from .naming import Layout, OwnLayout
from .tensorflow import EMA_SUFFIX

# What marks the name of a moving average; without it, it is the weight's.
_AVERAGE = re.compile(rf'{EMA_SUFFIX}$|'
                      r'/\.OPTIMIZER_SLOT/\w+/average(?=/\.ATTRIBUTES/)')
# What stands in checkpoints beside weights: pattern of names, and the reason
# why it is left aside.
LEFT_ASIDE = (
    (r'.*/(Momentum|RMSProp)(_\d)?|.*/\.OPTIMIZER_SLOT/.*|'
     r'(.*/)?optimizer/_variables/.*', 'optimizer slots'),
    (r'(.*/)?global_step|(.*/)?save_counter/.*|(.*/)?optimizer/.*',
     'counters and settings of the training'),
    (r'.*\.num_batches_tracked', 'batch counters, which nothing reads'),
)
_NUMBER = re.compile(r'\d+')
_REDUNDANT_BIAS = (r'(neck\..*\.conv(\.pointwise)?|'
                   r'bbox_head\.\w+_convs\.\d+\.pointwise)\.bias')


@dataclass
class Match:
    """Which tensors of a source stand where in our model.

    Args:
        layout (Layout): How the source names them.
        values (dict): Our name to the source's tensors, of which fusion
            weights may have several.
        without_bias (dict): Our name to shape of biases in front of norms,
            which are redundant, and which the source does not have.
        missing (list[str]): What is only in the model, with shapes.
        left (list[str]): What is only in the source.
        wrong (list[str]): What differs in shape, or is no float.
        receipt (list[str]): What was used and what left aside.
    """
    layout: Layout
    values: Dict[str, list] = field(default_factory=dict)
    without_bias: Dict[str, Tuple] = field(default_factory=dict)
    missing: List[str] = field(default_factory=list)
    left: List[str] = field(default_factory=list)
    wrong: List[str] = field(default_factory=list)
    receipt: List[str] = field(default_factory=list)

    @property
    def error(self) -> str:
        """Both sides of what does not fit; empty where all does."""
        if not (self.missing or self.left or self.wrong):
            return ''
        sides = (('+', self.missing), ('-', self.left), ('!', self.wrong))
        return '\n'.join([
            f'the weights ({self.layout.title}) do not fit this model: '
            f'{len(self.missing)} of its tensors are missing, '
            f'{len(self.left)} of the source are left over, '
            f'{len(self.wrong)} differ in shape or type',
            *(f'  {sign} {item}' for sign, side in sides for item in side[:10])
        ])


def match(tensors: Mapping,
          own: Mapping[str, Tuple],
          arch: str,
          num_levels: int,
          averages: bool = True) -> Match:
    """Finds the place of every tensor of another EfficientDet.

    Args:
        tensors (Mapping): Name to array, in any of ``LAYOUTS`` or, for a
            backbone alone, of ``BACKBONES``.
        own (Mapping): Name to shape of our model's state dict.
        arch (str): Architecture of its backbone.
        num_levels (int): Number of its pyramid levels.
        averages (bool): Whether to prefer moving averages of the weights
            where there are any. Defaults to True.

    Raises:
        ValueError: If the names are of no known layout, or two tensors of the
            source have the same place.
    """
    own = {k: v for k, v in own.items() if 'num_batches_tracked' not in k}
    layout = _recognise(tensors, own, arch, num_levels)
    if layout.classifier:
        own = {k: v for k, v in own.items() if k.startswith('backbone.')}
    weights, means, aside = _sort(tensors, layout)
    used = {**weights, **means} if averages else weights
    found, taken, outputs = Match(layout), set(), None
    for key, shape in own.items():
        names = layout.names(key, arch, num_levels)
        values = [used.get(name) for name in names]
        if not values or any(value is None for value in values):
            if re.fullmatch(_REDUNDANT_BIAS, key):
                found.without_bias[key] = shape
            else:
                found.missing.append(f'{key} {tuple(shape)}')
            continue
        taken.update(names)
        found.values[key] = values
        given, shape = _shape(values, key, layout), tuple(shape)
        # The source has its own number of classes.
        if key.startswith(CLASS_PREDICTOR):
            outputs = outputs or given[:1]
            shape = outputs + shape[1:]
        if given != shape or not _are_floats(values):
            found.wrong.append(f'{key} {given} {values[0].dtype}, {shape}')
    # A format leaves out all of a kind; one alone was lost.
    present = {_NUMBER.sub('', key) for key in found.values}
    for key in list(found.without_bias):
        if _NUMBER.sub('', key) in present or isinstance(layout, OwnLayout):
            found.missing.append(f'{key} {found.without_bias.pop(key)}')
    left = {**weights, **means}.keys() - taken
    if not any(key.endswith('fusion_weights') for key in own):
        sums = {name for name in left if re.search(r'\.p\d_w[12]$', name)}
        left -= sums
        if sums:
            aside['fusion weights, which a sum does not use'] = len(sums)
    found.left = sorted(left)
    found.receipt = _receipt(found, len(taken), len(taken & means.keys()),
                             len(means), averages, aside)
    return found


def convert(tensors: Mapping,
            own: Mapping[str, Tuple],
            arch: str,
            num_levels: int,
            averages: bool = True,
            ratio_major: bool = False) -> Tuple[Dict[str, Tensor], List[str]]:
    """Renames and transposes the tensors of another EfficientDet.

    Every tensor of ours is filled, and every one of the source is used once
    or left aside for a reason.

    Args:
        tensors, own, arch, num_levels, averages: As in :func:`match`.
        ratio_major (bool): Whether the anchors of the source are in the order
            of MMDetection's generator, and boxes (x, y, w, h). Defaults to
            False.

    Returns:
        tuple: Our state dict, with a head of as many classes as the source
        or, if the source is a backbone alone, without neck and head; and the
        lines of a receipt.

    Raises:
        ValueError: If something is left over or missing, naming both, or a
            value is not finite.
    """
    found = match(tensors, own, arch, num_levels, averages)
    if found.error:
        raise ValueError(found.error)
    return fill(found, own, ratio_major), found.receipt


def fill(found: Match,
         own: Mapping[str, Tuple],
         ratio_major: bool = False) -> Dict[str, Tensor]:
    """Our state dict of what :func:`match` found, whose error is empty.

    Args:
        found (Match): Its tensors are copied.
        own (Mapping): Name to shape of our model's state dict, whose order
            is kept.
        ratio_major (bool): As in :func:`convert`.

    Raises:
        ValueError: If a value is not finite.
    """
    state_dict = {}
    for key in own:
        if key in found.without_bias:
            state_dict[key] = torch.zeros(found.without_bias[key])
        elif key in found.values:
            state_dict[key] = _to_ours(found.values[key], key, found.layout,
                                       ratio_major)
    broken = [k for k, v in state_dict.items() if not v.isfinite().all()]
    if broken:
        raise ValueError(f'{len(broken)} tensors hold NaN or infinity: '
                         f'{", ".join(broken[:10])}')
    return state_dict


def _recognise(tensors: Mapping, own: Mapping, arch: str,
               num_levels: int) -> Layout:
    """The layout that shares the most names with the source."""

    def matches(layout: Layout) -> int:
        given = {layout.normalized(_AVERAGE.sub('', n)) for n in tensors}
        return sum(
            name in given for key in own
            for name in layout.names(key, arch, num_levels))

    # A detector has all names of its backbone and more, so backbones first.
    counts = {layout: matches(layout) for layout in BACKBONES + LAYOUTS}
    best = max(counts, key=counts.get)
    if not counts[best]:
        raise ValueError(
            'the names of the tensors are of no known EfficientDet, such as '
            f'{", ".join(list(tensors)[:3])}. Known are: '
            f'{", ".join(layout.title for layout in BACKBONES + LAYOUTS)}')
    return best


def _sort(tensors: Mapping, layout: Layout) -> Tuple[Dict, Dict, Counter]:
    """Weights, their moving averages, and how much is neither, and why."""
    reasons = LEFT_ASIDE
    if layout.classifier:
        reasons += ((layout.classifier, 'tensors of the classifier'), )
    weights, means, aside = {}, {}, Counter()
    for given, value in tensors.items():
        name = _AVERAGE.sub('', given)
        group = weights if name == given else means
        name = layout.normalized(name)
        reason = next(
            (why for pattern, why in reasons if re.fullmatch(pattern, name)),
            '')
        if reason:
            aside[reason] += 1
        elif name in group:
            raise ValueError(f'the source holds {name} twice, once as {given}')
        else:
            group[name] = value
    return weights, means, aside


def _receipt(found: Match, taken: int, taken_means: int, means: int,
             averages: bool, aside: Counter) -> List[str]:
    filled = len(found.values) + len(found.without_bias)
    lines = [
        f'layout: {found.layout.title}', f'filled: {filled} tensors of the ' +
        ('backbone' if found.layout.classifier else 'model')
    ]
    if means:
        lines.append(f'used: {taken_means} moving averages, '
                     f'{taken - taken_means} raw' if averages else
                     f'used: {taken} raw, not the {means} moving averages')
    if found.without_bias:
        lines.append(f'set to zero: {len(found.without_bias)} biases in front '
                     'of norms, which the source does not have')
    return lines + [f'left aside: {n} {why}' for why, n in aside.items()]


def _axes(key: str) -> Tuple[int, ...]:
    """Where the axes of a kernel of ours stand in TensorFlow's."""
    return (2, 3, 0, 1) if 'depthwise' in key else (3, 2, 0, 1)


def _shape(values: list, key: str, layout: Layout) -> Tuple[int, ...]:
    """The shape that the tensors will have as one of ours."""
    shape = max(tuple(value.shape) for value in values)
    if layout.tensorflow and key.endswith('fusion_weights'):
        return (len(values), *shape)
    if layout.tensorflow and len(shape) == 4:
        return tuple(shape[axis] for axis in _axes(key))
    return shape


def _are_floats(values: list) -> bool:
    """Whether values are numbers, not those of a quantised network."""
    return all(value.is_floating_point() and value.layout is torch.strided
               if isinstance(value, Tensor) else value.dtype.kind == 'f'
               for value in values)


def _to_ours(values: list, key: str, layout: Layout,
             ratio_major: bool) -> Tensor:
    """One tensor in our axes and order, as a copy of its own."""
    if layout.tensorflow:
        if key.endswith('fusion_weights'):
            values = [np.stack(values)]
        value = np.asarray(values[0])
        if value.ndim == 4:
            value = value.transpose(_axes(key))
        value = torch.from_numpy(np.array(value, np.float32, order='C'))
    else:
        value = values[0].detach().to(torch.float32, copy=True).contiguous()
    if ratio_major and re.match(r'bbox_head\.conv_\w+\.pointwise', key):
        # anchors of each ratio, then scale, to each scale, then ratio
        return value.unflatten(0, (3, 3, -1)).transpose(0, 1).flatten(0, 2)
    if layout.y_first and key.startswith('bbox_head.conv_reg.pointwise'):
        # (y, x, h, w) of each anchor to (x, y, w, h)
        value = value.unflatten(0, (-1, 4))[:, [1, 0, 3, 2]].flatten(0, 1)
    return value
