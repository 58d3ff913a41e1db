"""Anchors that would fit the boxes better, for check_dataset.py."""
from functools import cache
from typing import Callable, List, Optional, Tuple

import numpy as np

from mmdet_efficientdet.datasets.anchor_fit import (MAX_BOXES, InputBoxes,
                                                    best_iou)
from mmdet_efficientdet.models import AnchorGenerator

NOTICEABLE = 0.03  # gain in recall below which anchors are kept


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


def advise(generator: AnchorGenerator, data: InputBoxes,
           num_levels: int) -> Optional[AnchorGenerator]:
    """Searches for anchors that fit noticeably better.

    The number of anchors per cell stays, since the predictors depend on it.
    The scale alone is preferred where more gains little.

    Args:
        generator (AnchorGenerator): The current anchors.
        data (InputBoxes): Boxes at the network's input size.
        num_levels (int): Number of levels, starting at stride 8.

    Returns:
        AnchorGenerator: None if the anchors should be kept.
    """
    if len(data.boxes) > MAX_BOXES:
        chosen = np.random.default_rng(0).choice(
            len(data.boxes), MAX_BOXES, replace=False)
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
