"""How well the anchors fit the boxes, and which would fit better."""
from functools import cache
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

import mmcv
import numpy as np
import torch
from mmcv.transforms import Resize
from mmdet.structures.bbox import bbox_overlaps
from torch import nn

from ..models.anchors import AnchorGenerator
from ..scaling import FIRST_LEVEL
from .findings import Finding, find
from .transforms import ResizeCrop, scaled_size

MIN_RECALL = 0.3  # below which training suffers
NOTICEABLE = 0.03  # gain in recall below which anchors are kept


class InputBoxes(NamedTuple):
    """Boxes as the network sees them.

    ``boxes`` is ``(M, 4)``, xyxy in pixels of the input, ``inputs`` ``(M,
    2)``, height and width of the padded input of each.
    """
    boxes: np.ndarray
    inputs: np.ndarray


def resized(transforms: Sequence, size: Tuple[int, int]) -> Tuple[int, int]:
    """Returns an image's height and width after a test pipeline."""
    height, width = (int(n) for n in size)
    for transform in transforms:
        if isinstance(transform, ResizeCrop):
            height, width = scaled_size((height, width),
                                        transform.image_size)[1]
        elif isinstance(transform, Resize):
            scale = transform.scale
            if scale is None:
                factor = transform.scale_factor
                pair = isinstance(factor, tuple)
                factor = factor if pair else (factor, factor)
                scale = int(width * factor[0]), int(height * factor[1])
            if transform.keep_ratio:
                scale = mmcv.rescale_size((width, height), scale)
            width, height = scale
    return height, width


def to_input(boxes: np.ndarray, sizes: np.ndarray, transforms: Sequence,
             divisor: int) -> InputBoxes:
    """Scales boxes as the test pipeline and the preprocessor do.

    Args:
        boxes (np.ndarray): ``(M, 4)``, xyxy in the original image.
        sizes (np.ndarray): ``(M, 2)``, height and width of their images.
        transforms (Sequence): The built transforms of the test pipeline.
        divisor (int): Inputs are padded to multiples of it.
    """
    unique, inverse = np.unique(sizes, axis=0, return_inverse=True)
    new = np.array([resized(transforms, size) for size in unique], float)
    new, unique = new.reshape(-1, 2), unique.reshape(-1, 2)
    factor = (new / unique)[inverse.reshape(-1)][:, ::-1]
    padded = np.ceil(new / divisor) * divisor
    return InputBoxes(boxes * np.tile(factor, 2), padded[inverse.reshape(-1)])


def best_iou(generator: AnchorGenerator, data: InputBoxes,
             num_levels: int) -> np.ndarray:
    """Returns the exact IoU ``(M, )`` of each box with its best anchor.

    Among anchors of one shape, the one in the nearest cell has the largest
    overlap, so that one cell of each level is enough.
    """
    best = np.zeros(len(data.boxes))
    for size in np.unique(data.inputs, axis=0).astype(int).tolist():
        mine = (data.inputs == size).all(1)
        boxes = torch.from_numpy(data.boxes[mine, None])  # (m, 1, 4)
        x, y = (boxes[:, 0, :2] + boxes[:, 0, 2:]).T / 2
        grids = [[-(-n // 2**(FIRST_LEVEL + level)) for n in size]
                 for level in range(num_levels)]
        for (rows, columns), anchors in zip(grids,
                                            generator.grid_priors(grids,
                                                                  size)):
            row = (y * rows / size[0]).floor().long().clip(0, rows - 1)
            column = (x * columns / size[1]).floor().long().clip(
                0, columns - 1)
            near = anchors.double().view(rows, columns, -1, 4)[row, column]
            iou = bbox_overlaps(boxes, near).amax((1, 2))  # of (m, 1, A)
            best[mine] = np.maximum(best[mine], iou.numpy())
    return best


def check_anchors(head: nn.Module, data: InputBoxes) -> List[Finding]:
    """Checks that enough boxes have an anchor with an IoU of 0.5."""
    hit = best_iou(head.prior_generator, data, head.num_levels) >= 0.5
    if hit.sum() >= MIN_RECALL * len(hit):
        return []
    missed = np.flatnonzero(~hit)
    return find('anchors', missed, lambda _: '', total=len(hit))


def recall_and_iou(iou: np.ndarray) -> Tuple[float, float]:
    """Share of boxes with an anchor of IoU >= 0.5, and the mean best IoU."""
    return float((iou >= 0.5).mean()), float(iou.mean())


def _aspects(ratios: np.ndarray, number: int) -> List[Tuple[float, float]]:
    """Pairs (width, height) of area 1 by k-means on the log of the ratio."""
    ratios = np.log(ratios)
    centers = np.quantile(ratios, (np.arange(number) + 0.5) / number)
    for _ in range(30):
        nearest = np.abs(ratios[:, None] - centers).argmin(1)
        centers = np.array([
            ratios[nearest == i].mean() if (nearest == i).any() else center
            for i, center in enumerate(centers)
        ])
    return [(round(float(np.exp(c / 2)), 2), round(float(np.exp(-c / 2)), 2))
            for c in centers]


def advise(generator: AnchorGenerator,
           data: InputBoxes,
           num_levels: int,
           max_boxes: int = 2000) -> Optional[AnchorGenerator]:
    """Searches for anchors that fit noticeably better.

    The number of anchors per cell stays, since the predictors depend on it.
    The scale alone is preferred where more gains little.

    Args:
        generator (AnchorGenerator): The current anchors.
        data (InputBoxes): Boxes at the network's input size.
        num_levels (int): Number of levels, starting at stride 8.
        max_boxes (int): A random sample of so many boxes is used. Defaults
            to 2000.

    Returns:
        AnchorGenerator: None if the anchors should be kept.
    """
    if len(data.boxes) > max_boxes:
        chosen = np.random.default_rng(0).choice(
            len(data.boxes), max_boxes, replace=False)
        data = InputBoxes(*(array[chosen] for array in data))

    @cache
    def recall(candidate: AnchorGenerator) -> Tuple[float, float]:
        return recall_and_iou(best_iou(candidate, data, num_levels))

    def score(candidate: AnchorGenerator) -> float:
        return sum(recall(candidate))

    width, height = (data.boxes[:, 2:] - data.boxes[:, :2]).T
    per_cell = generator.scales_per_octave * len(generator.aspect_pairs)
    shapes = [(generator.scales_per_octave, generator.aspect_pairs)]
    # Nothing but the scale, then other aspects, then another division.
    only_scale = _search(generator.octave_base_scale, shapes, score)
    shapes = [(n, _aspects(width / height, per_cell // n))
              for n in range(1, per_cell + 1) if per_cell % n == 0]
    best = _search(generator.octave_base_scale, shapes, score)
    if score(best) < score(only_scale) + NOTICEABLE:
        best = only_scale
    gain = recall(best)[0] - recall(generator)[0]
    return best if gain >= NOTICEABLE else None


def _search(scale: float, shapes: list,
            score: Callable[[AnchorGenerator], float]) -> AnchorGenerator:
    """Returns the best of a small grid of scales and the given shapes."""
    candidates = [
        AnchorGenerator(round(scale * 2**power, 2), number, pairs)
        for number, pairs in shapes for power in np.arange(-3, 2.01, 0.25)
    ]
    return max(candidates, key=score)  # the first of equal ones
