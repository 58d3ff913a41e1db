"""How well the anchors fit the boxes, and what input would fit better."""
from typing import Callable, List, NamedTuple, Sequence

import numpy as np
import torch
from mmdet.structures.bbox import bbox_overlaps
from torch import nn

from ..models.anchors import AnchorGenerator
from ..scaling import FIRST_LEVEL
from .findings import Finding, find

MIN_RECALL = 0.3  # below which training suffers
ENOUGH = 0.7  # recall for which no larger input is looked for
MAX_BOXES = 2000  # of which anchors are chosen


class InputBoxes(NamedTuple):
    """Boxes as the network sees them.

    ``boxes`` is ``(M, 4)``, xyxy in pixels of the input, ``inputs`` ``(M,
    2)``, height and width of the padded input of each, ``labels`` ``(M, )``.
    """
    boxes: np.ndarray
    inputs: np.ndarray
    labels: np.ndarray


def to_input(boxes: np.ndarray, sizes: np.ndarray, labels: np.ndarray,
             transforms: Sequence[Callable], divisor: int) -> InputBoxes:
    """Scales boxes as the test pipeline and the preprocessor do.

    Args:
        boxes (np.ndarray): ``(M, 4)``, xyxy in the original image.
        sizes (np.ndarray): ``(M, 2)``, height and width of their images.
        labels (np.ndarray): ``(M, )``.
        transforms (Sequence): Those of the test pipeline that change sizes.
        divisor (int): Inputs are padded to multiples of it.
    """
    factors, inputs = np.ones((len(boxes), 2)), np.zeros((len(boxes), 2))
    for size in np.unique(sizes, axis=0):
        results = dict(img=np.zeros(size.astype(int), np.uint8))
        for transform in transforms:
            results = transform(results)
        mine = (sizes == size).all(1)
        factors[mine] = results.get('scale_factor', 1)
        inputs[mine] = np.ceil(np.divide(results['img'].shape,
                                         divisor)) * divisor
    return InputBoxes(boxes * np.tile(factors, 2), inputs, labels)


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


def check_anchors(head: nn.Module, data: InputBoxes,
                  classes: Sequence[str]) -> List[Finding]:
    """Checks that boxes of each class have anchors with an IoU of 0.5.

    Where they do not, it looks for a size of the input that is the least for
    most of them, or the best one.
    """

    def hits(boxes: InputBoxes) -> np.ndarray:
        return best_iou(head.prior_generator, boxes, head.num_levels) >= 0.5

    rows, missed, side = [], 0, int(data.inputs.max(initial=0))
    hit = hits(data)
    for label in np.unique(data.labels):
        mine = data.labels == label
        now = hit[mine].mean()
        if now >= MIN_RECALL:
            continue
        missed += (~hit[mine]).sum()
        best, size = now, side
        some = InputBoxes(*(array[mine][:MAX_BOXES] for array in data))
        for larger in range(side // 128 * 128 + 128, 4 * side + 1, 128):
            scale = larger / side
            recall = hits(
                some._replace(
                    boxes=some.boxes * scale,
                    inputs=np.ceil(some.inputs * scale))).mean()
            if recall > best and best < ENOUGH:
                best, size = recall, larger
        rows.append(
            f'{classes[int(label)]!r}: recall {now:.2f} at {side} pixels' +
            (f', {best:.2f} at image_size={size}' if size > side else ''))
    return find('anchors', rows, missed=missed, total=len(hit))
