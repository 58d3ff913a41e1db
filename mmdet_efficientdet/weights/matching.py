"""Gives the tensors of another project our names, axes and order."""
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Dict, List, Mapping, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from ..models.efficientdet import CLASS_PREDICTOR
from .layouts import BACKBONES, LAYOUTS
from .naming import Layout
from .tensorflow import EMA_SUFFIX

# Marks the name of a moving average. The rest is the name of the weight.
_AVERAGE = re.compile(rf'{EMA_SUFFIX}$|'
                      r'/\.OPTIMIZER_SLOT/\w+/average(?=/\.ATTRIBUTES/)')
# What checkpoints contain beside weights: pattern of names, and what they are.
IGNORED = (
    (r'.*/(Momentum|RMSProp)(_\d)?|.*/\.OPTIMIZER_SLOT/.*|'
     r'(.*/)?optimizer/_variables/.*', 'optimizer slots'),
    (r'(.*/)?global_step|(.*/)?save_counter/.*|(.*/)?optimizer/.*',
     'counters and settings of the training'),
    (r'.*\.num_batches_tracked', 'batch counters, which are not needed'),
)
_FUSION_WEIGHTS = r'.*\.p\d_w[12]'
_NUMBER = re.compile(r'\d+')
_REDUNDANT_BIAS = (r'(neck\..*\.conv(\.pointwise)?|'
                   r'bbox_head\.\w+_convs\.\d+\.pointwise)\.bias')


@dataclass
class Match:
    """Which tensors of a source belong to which of our model.

    Args:
        layout (Layout): How the source names its tensors.
        shapes (dict): Our name to shape, of what the source can fill: the
            model, or its backbone.
        values (dict): Our name to the tensors of the source. Fusion weights
            may have several.
        zeros (list[str]): Redundant biases before norms, which the source
            does not have.
        missing (list[str]): Only in the model, with shapes.
        leftover (list[str]): Only in the source.
        mismatched (list[str]): Of another shape, or not of a float type.
        receipt (list[str]): What was used, set to zero and ignored.
    """
    layout: Layout
    shapes: Dict[str, Tuple]
    values: Dict[str, list] = field(default_factory=dict)
    zeros: List[str] = field(default_factory=list)
    missing: List[str] = field(default_factory=list)
    leftover: List[str] = field(default_factory=list)
    mismatched: List[str] = field(default_factory=list)
    receipt: List[str] = field(default_factory=list)

    @property
    def error(self) -> str:
        """Lists both sides of what does not fit, or is empty."""
        if not (self.missing or self.leftover or self.mismatched):
            return ''
        sides = zip('+-!', (self.missing, self.leftover, self.mismatched))
        return '\n'.join([
            f'the weights ({self.layout.title}) do not fit this model: '
            f'{len(self.missing)} of its tensors are missing, '
            f'{len(self.leftover)} of the source are left over, '
            f'{len(self.mismatched)} differ in shape or type',
            *(f'  {sign} {item}' for sign, side in sides for item in side[:10])
        ])

    def state_dict(self, ratio_major: bool = False) -> Dict[str, Tensor]:
        """The state dict of our model, with copies of the tensors.

        Args:
            ratio_major (bool): Whether the anchors of the source are in the
                order of MMDetection's generator, and boxes (x, y, w, h).
                Defaults to False.

        Returns:
            dict: The head has as many classes as the source. If the source
            is only a backbone, there is neither neck nor head.

        Raises:
            ValueError: If the source does not fit, or a value is not finite.
        """
        if self.error:
            raise ValueError(self.error)
        state_dict = {
            key:
            _to_ours(self.values[key], key, self.layout, ratio_major)
            if key in self.values else torch.zeros(shape)
            for key, shape in self.shapes.items()
        }
        broken = [k for k, v in state_dict.items() if not v.isfinite().all()]
        if broken:
            raise ValueError(f'{len(broken)} tensors hold NaN or infinity: '
                             f'{", ".join(broken[:10])}')
        return state_dict


def match(tensors: Mapping,
          model_shapes: Mapping[str, Tuple],
          arch: str,
          num_levels: int,
          averages: bool = True,
          layout: Optional[Layout] = None) -> Match:
    """Finds the place of every tensor of another EfficientDet.

    Every tensor of the source is used once, or ignored for a reason that the
    receipt gives.

    Args:
        tensors (Mapping): Name to array, in one of ``LAYOUTS`` or, for a
            backbone alone, of ``BACKBONES``.
        model_shapes (Mapping): Name to shape of our model's state dict.
        arch (str): Architecture of its backbone.
        num_levels (int): Number of its pyramid levels.
        averages (bool): Whether to prefer moving averages of the weights.
            Defaults to True.
        layout (Layout, optional): Defaults to the one that shares the most
            names with the source.

    Raises:
        ValueError: If the names are of no known layout, or two tensors of the
            source have the same place.
    """
    shapes = {
        key: tuple(shape)
        for key, shape in model_shapes.items()
        if 'num_batches_tracked' not in key
    }
    layout = layout or _recognize(tensors, shapes, arch, num_levels)
    if layout.classifier:
        shapes = {k: v for k, v in shapes.items() if k.startswith('backbone.')}
    weights, averaged, ignored = _sort(tensors, layout, shapes)
    candidates = {**weights, **averaged} if averages else weights
    found, used = Match(layout, shapes), set()
    for key, shape in shapes.items():
        names = layout.names(key, arch, num_levels)
        values = [candidates.get(name) for name in names]
        if values and all(value is not None for value in values):
            found.values[key] = values
            used.update(names)
        elif re.fullmatch(_REDUNDANT_BIAS, key):
            found.zeros.append(key)
        else:
            found.missing.append(f'{key} {shape}')
    # A project has all biases of a kind or none. If one is absent, it is lost.
    kinds = {_NUMBER.sub('', key) for key in found.values}
    for key in list(found.zeros):
        if _NUMBER.sub('', key) in kinds or not layout.modules:
            found.zeros.remove(key)
            found.missing.append(f'{key} {shapes[key]}')
    found.leftover = sorted({**weights, **averaged}.keys() - used)
    found.mismatched = _mismatched(found)
    found.receipt = [
        f'layout: {layout.title}',
        f'filled: {len(found.values) + len(found.zeros)} tensors of the ' +
        ('backbone' if layout.classifier else 'model')
    ]
    if averaged:
        num_averaged = len(used & averaged.keys())
        found.receipt.append(
            f'used: {num_averaged} moving averages, '
            f'{len(used) - num_averaged} raw' if averages else
            f'used: {len(used)} raw, not the {len(averaged)} moving averages')
    if found.zeros:
        found.receipt.append(f'set to zero: {len(found.zeros)} biases before '
                             'norms, which the source does not have')
    found.receipt += [f'ignored: {n} {kind}' for kind, n in ignored.items()]
    return found


def _recognize(tensors: Mapping, shapes: Mapping, arch: str,
               num_levels: int) -> Layout:
    """The layout that shares the most names with the source."""
    counts = {}
    # A detector has all names of its backbone and more, so backbones first.
    for layout in BACKBONES + LAYOUTS:
        given = {layout.normalized(_AVERAGE.sub('', n)) for n in tensors}
        counts[layout] = sum(
            name in given for key in shapes
            for name in layout.names(key, arch, num_levels))
    best = max(counts, key=counts.get)
    if not counts[best]:
        raise ValueError(
            'the names of the tensors are of no known EfficientDet, such as '
            f'{", ".join(list(tensors)[:3])}. Known are: '
            f'{", ".join(layout.title for layout in BACKBONES + LAYOUTS)}')
    return best


def _sort(tensors: Mapping, layout: Layout,
          shapes: Mapping) -> Tuple[Dict, Dict, Counter]:
    """Weights, their moving averages, and the number of others by kind."""
    kinds = IGNORED
    if layout.classifier:
        kinds += ((layout.classifier, 'tensors of the classifier'), )
    if not any(key.endswith('fusion_weights') for key in shapes):
        kinds += ((_FUSION_WEIGHTS,
                   'fusion weights, which a sum does not use'), )
    weights, averaged, ignored = {}, {}, Counter()
    for given, value in tensors.items():
        name = _AVERAGE.sub('', given)
        group = weights if name == given else averaged
        name = layout.normalized(name)
        kind = next(
            (kind for pattern, kind in kinds if re.fullmatch(pattern, name)),
            '')
        if kind:
            ignored[kind] += 1
        elif name in group:
            raise ValueError(f'the source holds {name} twice, once as {given}')
        else:
            group[name] = value
    return weights, averaged, ignored


def _mismatched(found: Match) -> List[str]:
    """The tensors of another shape, or of a quantized network."""
    mismatched, num_outputs = [], ()
    for key, values in found.values.items():
        given, shape = _shape(values, key, found.layout), found.shapes[key]
        if key.startswith(CLASS_PREDICTOR):
            # The source has its own number of classes.
            num_outputs = num_outputs or given[:1]
            shape = num_outputs + shape[1:]
        floats = all(
            value.is_floating_point() and value.layout is torch.strided
            if isinstance(value, Tensor) else value.dtype.kind == 'f'
            for value in values)
        if given != shape or not floats:
            mismatched.append(f'{key} {given} {values[0].dtype}, {shape}')
    return mismatched


def _shape(values: list, key: str, layout: Layout) -> Tuple[int, ...]:
    """The shape of the tensors as one of ours."""
    shape = max(tuple(value.shape) for value in values)
    if layout.tensorflow and key.endswith('fusion_weights'):
        return (len(values), *shape)
    if layout.tensorflow and len(shape) == 4:
        return tuple(shape[axis] for axis in _axes(key))
    return shape


def _axes(key: str) -> Tuple[int, ...]:
    """The axes of TensorFlow's kernel in the order of ours."""
    return (2, 3, 0, 1) if 'depthwise' in key else (3, 2, 0, 1)


def _to_ours(values: list, key: str, layout: Layout,
             ratio_major: bool) -> Tensor:
    """A copy of one tensor in our axes and order."""
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
