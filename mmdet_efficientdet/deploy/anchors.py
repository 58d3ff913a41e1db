"""Anchors and box decoding of google/automl ``tf2/anchors.py``.

All boxes are (x1, y1, x2, y2) in pixels of the network's input.
"""
from typing import List, Sequence, Tuple

import torch
from torch import Tensor

ASPECTS = ((1.0, 1.0), (1.4, 0.7), (0.7, 1.4))


class AnchorGenerator:
    """Anchors whose strides follow from the sizes of features and input.

    A fixed stride of ``2 ** level`` is wrong if the input is not a multiple
    of it. Here the stride is ``input size / feature size``, a float for each
    axis. Anchors are also placed on padding and are not clipped. The anchors
    of a cell are ordered by octave, then by aspect.

    Args:
        octave_base_scale (float): Side of the smallest square anchor in
            strides. Defaults to 4.0.
        scales_per_octave (int): Octave ``i`` of ``n`` enlarges the anchors by
            ``2 ** (i / n)``. Defaults to 3.
        aspect_pairs (Sequence[tuple]): Factors (width, height) of the square
            anchor's sides. The published D0-D7x were trained with the default
            pairs, which lose 2 % of the area; ``sqrt(2)`` and its inverse
            keep it.

    Raises:
        ValueError: If an aspect is not a pair.
    """

    def __init__(
            self,
            octave_base_scale: float = 4.0,
            scales_per_octave: int = 3,
            aspect_pairs: Sequence[Tuple[float, float]] = ASPECTS) -> None:
        self.octave_base_scale = octave_base_scale
        self.scales_per_octave = scales_per_octave
        if not aspect_pairs or any(
                not isinstance(pair, (list, tuple)) or len(pair) != 2
                for pair in aspect_pairs):
            raise ValueError(f'aspect_pairs={aspect_pairs} must be a list of '
                             'pairs (width, height), such as (1.4, 0.7)')
        self.aspect_pairs = tuple(tuple(pair) for pair in aspect_pairs)

    @property
    def num_base_priors(self) -> List[int]:
        """Anchors per cell, in a list as MMDetection's heads expect."""
        return [self.scales_per_octave * len(self.aspect_pairs)]

    def grid_priors(self,
                    featmap_sizes: Sequence[Tuple[int, int]],
                    input_size: Tuple[int, int],
                    device: str = 'cpu') -> List[Tensor]:
        """The anchors of each level.

        Args:
            featmap_sizes (Sequence[tuple]): Height and width of the levels.
            input_size (tuple[int]): Height and width of the padded input.
            device (str | torch.device): Device of the anchors.

        Returns:
            list[Tensor]: ``(H_i * W_i * A, 4)`` float32 for each level, in
            the order row, column, octave, aspect.
        """
        as_double = dict(dtype=torch.float64, device=device)
        octaves = torch.arange(self.scales_per_octave, **as_double)
        octaves = 2**(octaves / self.scales_per_octave)
        pairs = torch.tensor(self.aspect_pairs, **as_double)
        # Half sides (A, 2) in strides, as (x, y).
        half = (octaves[:, None, None] * pairs).reshape(-1, 2)
        half = half * self.octave_base_scale / 2
        anchors = []
        for size in featmap_sizes:
            stride = [n / m for n, m in zip(input_size, size)]
            stride = torch.tensor(stride[::-1], **as_double)  # (x, y)
            y, x = torch.meshgrid(
                *(torch.arange(n, **as_double) + 0.5 for n in size),
                indexing='ij')
            centers = (torch.stack([x, y], -1) * stride)[..., None, :]
            sides = half * stride
            boxes = torch.cat([centers - sides, centers + sides], -1)
            anchors.append(boxes.reshape(-1, 4).float())
        return anchors


def decode_boxes(anchors: Tensor, deltas: Tensor) -> Tensor:
    """Boxes ``(..., 4)`` of deltas (dx, dy, dw, dh) ``(..., 4)``."""
    anchor_center, anchor_side = center_and_side(anchors)
    center = deltas[..., :2] * anchor_side + anchor_center
    half = deltas[..., 2:].exp() * anchor_side / 2
    return torch.cat([center - half, center + half], -1)


def center_and_side(boxes: Tensor) -> Tuple[Tensor, Tensor]:
    """Centres and sides ``(..., 2)``, as (x, y), of boxes."""
    side = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + side / 2, side
