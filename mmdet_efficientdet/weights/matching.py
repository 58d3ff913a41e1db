"""Gives the tensors of another project our names, axes and order."""
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Dict, List, Mapping, Optional, Tuple

import torch
from torch import Tensor

from ..models.efficientdet import CLASS_PREDICTOR
from .layouts import BACKBONES, IGNORED, LAYOUTS, Layout
from .tensorflow import EMA_SUFFIX

# Marks the name of a moving average. The rest is the name of the weight.
_AVERAGE = re.compile(rf'{EMA_SUFFIX}$|'
                      r'/\.OPTIMIZER_SLOT/\w+/average(?=/\.ATTRIBUTES/)')
_FUSION_WEIGHTS = r'.*\.p\d_w[12]'
# Of TensorFlow's kernels in our order, of depthwise ones last.
_AXES = (3, 2, 0, 1), (2, 3, 0, 1)
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
        values (dict): Our name to the tensor of the source, in our axes, or
            to zeros for a redundant bias that the source does not have.
        missing (list[str]): Only in the model, with shapes.
        leftover (list[str]): Only in the source.
        mismatched (list[str]): Of another shape, or not of a float type.
        receipt (list[str]): What was used, set to zero and ignored.
        num_outputs (tuple[int]): Rows of the class predictor in the source.
    """
    layout: Layout
    shapes: Dict[str, Tuple]
    values: Dict[str, Tensor] = field(default_factory=dict)
    missing: List[str] = field(default_factory=list)
    leftover: List[str] = field(default_factory=list)
    mismatched: List[str] = field(default_factory=list)
    receipt: List[str] = field(default_factory=list)
    num_outputs: Tuple[int, ...] = ()

    def add(self, key: str, values: List[Tensor]) -> None:
        """Fills one tensor, unless its shape or type differs.

        Args:
            key (str): Its name.
            values (list[Tensor]): Of the source; arrays become tensors.
                TensorFlow stores the fusion weights of a node one by one.
        """
        values = [torch.as_tensor(part) for part in values]
        value = values[0]
        floats = all(part.is_floating_point() and part.layout is torch.strided
                     for part in values)
        if floats and self.layout.tensorflow:
            if key.endswith('fusion_weights'):
                alike = all(part.shape == value.shape for part in values)
                value = torch.stack(values) if alike else torch.cat(
                    [part.reshape(-1) for part in values])
            elif value.ndim == 4:
                value = value.permute(_AXES['depthwise' in key])
        given, shape = tuple(value.shape), self.shapes[key]
        if key.startswith(CLASS_PREDICTOR):
            # The source has its own number of classes.
            self.num_outputs = self.num_outputs or given[:1]
            shape = self.num_outputs + shape[1:]
        if given != shape or not floats:
            self.mismatched.append(f'{key} {given} {value.dtype}, {shape}')
        self.values[key] = value

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
        state_dict = {}
        for key in self.shapes:
            value = self.values[key].detach().to(
                torch.float32,
                copy=True,
                memory_format=torch.contiguous_format)
            if ratio_major and re.match(r'bbox_head\.conv_\w+\.pointwise',
                                        key):
                # anchors of each ratio, then scale, to each scale, then ratio
                value = value.unflatten(0, (3, 3, -1))
                value = value.transpose(0, 1).flatten(0, 2)
            elif (self.layout.y_first
                  and key.startswith('bbox_head.conv_reg.pointwise')):
                # (y, x, h, w) of each anchor to (x, y, w, h)
                value = value.unflatten(0, (-1, 4))[:, [1, 0, 3, 2]]
                value = value.flatten(0, 1)
            state_dict[key] = value
        broken = [k for k, v in state_dict.items() if not v.isfinite().all()]
        if broken:
            raise ValueError(f'{len(broken)} tensors hold NaN or infinity: '
                             f'{", ".join(broken[:10])}')
        return state_dict


def match(tensors: Mapping[str, Tensor],
          model_shapes: Mapping[str, Tuple],
          arch: str,
          num_levels: int,
          averages: bool = True,
          layout: Optional[Layout] = None) -> Match:
    """Finds the place of every tensor of another EfficientDet.

    Every tensor of the source is used once, or ignored for a reason that the
    receipt gives.

    Args:
        tensors (Mapping): Name to tensor or array, in one of ``LAYOUTS`` or,
            for a backbone alone, of ``BACKBONES``.
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
    for key in shapes:
        names = layout.names(key, arch, num_levels)
        if names and candidates.keys() >= {*names}:
            used.update(names)
            found.add(key, [candidates[name] for name in names])
    # A project has all biases of a kind or none. If one is absent, it is lost.
    kinds = {_NUMBER.sub('', key) for key in found.values}
    num_zeros = 0
    for key in [key for key in shapes if key not in found.values]:
        if (re.fullmatch(_REDUNDANT_BIAS, key) and layout.modules
                and _NUMBER.sub('', key) not in kinds):
            found.values[key] = torch.zeros(shapes[key])
            num_zeros += 1
        else:
            found.missing.append(f'{key} {shapes[key]}')
    found.leftover = sorted({**weights, **averaged}.keys() - used)
    found.receipt = [
        f'layout: {layout.title}', f'filled: {len(found.values)} tensors of '
        f'the {"backbone" if layout.classifier else "model"}'
    ]
    if averaged:
        num_averaged = len(used & averaged.keys())
        found.receipt.append(
            f'used: {num_averaged} moving averages, '
            f'{len(used) - num_averaged} raw' if averages else
            f'used: {len(used)} raw, not the {len(averaged)} moving averages')
    if num_zeros:
        found.receipt.append(f'set to zero: {num_zeros} biases before '
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
    kinds = dict(IGNORED)
    if layout.classifier:
        kinds['tensors of the classifier'] = layout.classifier
    if not any(key.endswith('fusion_weights') for key in shapes):
        kinds['fusion weights, which a sum does not use'] = _FUSION_WEIGHTS
    weights, averaged, ignored = {}, {}, Counter()
    for given, value in tensors.items():
        name = _AVERAGE.sub('', given)
        group = weights if name == given else averaged
        name = layout.normalized(name)
        kind = [k for k, names in kinds.items() if re.fullmatch(names, name)]
        if not kind and name in group:
            raise ValueError(f'the source holds {name} twice, once as {given}')
        ignored.update(kind[:1])
        if not kind:
            group[name] = value
    return weights, averaged, ignored
