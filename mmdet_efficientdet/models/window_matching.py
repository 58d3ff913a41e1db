"""Matching of anchors without comparing every anchor with every box.

The anchors of a level are a grid, so the overlap of a box with all anchors of
one shape is an outer product of overlaps along x and along y. Most shapes
cannot reach an IoU of 0.5 with a given box, and of the others only the cells
near the box do.
"""
from typing import Sequence, Tuple

import torch
from torch import Tensor

MIN_IOU = 0.5
SLACK = 1e-4  # windows are larger than rounding errors of their limits


def match_in_windows(anchors: Tensor, featmap_sizes: Sequence[Tuple[int, int]],
                     gt_bboxes: Tensor, gt_valid: Tensor) -> Tensor:
    """The same matches as those of ``match_anchors``.

    Args:
        anchors (Tensor): ``(A, 4)``, of :class:`AnchorGenerator`.
        featmap_sizes (Sequence[tuple]): Height and width of the levels.
        gt_bboxes (Tensor): ``(N, G, 4)``; images with fewer boxes are padded.
        gt_valid (Tensor): ``(N, G)`` bool; False for padding.

    Returns:
        Tensor: ``(N, A)`` int64, index of the box or -1 for background.
    """
    num_images, num_gts = gt_valid.shape
    num_anchors = len(anchors)
    cells = [height * width for height, width in featmap_sizes]
    per_cell = num_anchors // sum(cells)
    level_anchors = anchors.split([per_cell * count for count in cells])
    image, slot = gt_valid.nonzero(as_tuple=True)
    box, anchor, iou, best = _likely_pairs(level_anchors, featmap_sizes,
                                           gt_bboxes[image, slot])

    def first_box(boxes: Tensor, anchors: Tensor) -> Tensor:
        """The first box of an image that each anchor is paired with."""
        first = torch.full((num_images * num_anchors, ), num_gts)
        index = image[boxes] * num_anchors + anchors
        return first.scatter_reduce_(0, index, slot[boxes], 'amin')

    # Each anchor takes the box that it overlaps most.
    index = image[box] * num_anchors + anchor
    most = iou.new_zeros(num_images * num_anchors)
    most.scatter_reduce_(0, index, iou, 'amax')
    taken = (iou >= MIN_IOU) & (iou == most[index])
    matches = first_box(box[taken], anchor[taken])
    # Each box claims its best anchor: the first of all, if it overlaps none.
    claimed = torch.where(best > 0, num_anchors, 0)
    winning = iou == best[box]
    claimed.scatter_reduce_(0, box[winning], anchor[winning], 'amin')
    claims = first_box(torch.arange(len(image)), claimed)
    matches = torch.where(claims < num_gts, claims, matches)
    matches[matches == num_gts] = -1
    return matches.view(num_images, num_anchors)


def _likely_pairs(level_anchors: Sequence[Tensor],
                  featmap_sizes: Sequence[Tuple[int, int]],
                  boxes: Tensor) -> Tuple[Tensor, ...]:
    """All pairs of an IoU of 0.5 or more, and the best of each box.

    Args:
        level_anchors (Sequence[Tensor]): ``(H_i * W_i * S, 4)`` of each level.
        featmap_sizes (Sequence[tuple]): Height and width of the levels.
        boxes (Tensor): ``(B, 4)``.

    Returns:
        tuple[Tensor]: Index of the box, of the anchor and the IoU of each
        pair, ``(P, )``, and the highest IoU of each box, ``(B, )``.
    """
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    grids = []
    for anchors, (height, width) in zip(level_anchors, featmap_sizes):
        anchors = anchors.view(height, width, -1, 4)
        x = anchors[0].permute(2, 1, 0)  # (4, S, W); y1 and y2 are unused
        y = anchors[:, 0].permute(2, 1, 0)
        overlaps = [
            (torch.minimum(boxes[:, axis + 2, None, None], ends[axis + 2]) -
             torch.maximum(boxes[:, axis, None, None], ends[axis])).clamp_(
                 min=0) for axis, ends in enumerate((x, y))
        ]
        sides = x[2] - x[0], y[3] - y[1]
        grids.append((overlaps, sides))
    # The highest overlaps along both axes meet in one cell.
    peaks = [[part.amax(-1) for part in overlaps] for overlaps, _ in grids]
    total = [area[:, None] + w.amax(-1) * h.amax(-1)
             for _, (w, h) in grids]  # (B, S)
    bounds = [x * y / (sums - x * y) for (x, y), sums in zip(peaks, total)]
    limit = torch.cat(bounds, 1).amax(1).clamp(max=MIN_IOU) * (1 - SLACK)
    found, start = [], 0
    for (overlaps, sides), (peak_x, peak_y), sums, bound, anchors in zip(
            grids, peaks, total, bounds, level_anchors):
        box, shape = ((bound >= limit[:, None]) &
                      (bound > 0)).nonzero(as_tuple=True)
        x, y = (part[box, shape] for part in overlaps)  # (K, W), (K, H)
        least = limit[box] / (1 + limit[box]) * sums[box, shape] * (1 - SLACK)
        pair, row, column = _cells(y >= (least / peak_x[box, shape])[:, None],
                                   x >= (least / peak_y[box, shape])[:, None])
        box, shape = box[pair], shape[pair]
        inter = x[pair, column] * y[pair, row]
        union = (area[box] +
                 sides[0][shape, column] * sides[1][shape, row]).sub_(inter)
        num_shapes = len(sides[0])
        index = (row * x.shape[1] + column) * num_shapes + shape
        found.append((box, start + index, inter.div_(union)))
        start += len(anchors)
    box, anchor, iou = map(torch.cat, zip(*found))
    best = iou.new_zeros(len(boxes)).scatter_reduce_(0, box, iou, 'amax')
    return box, anchor, iou, best


def _cells(rows: Tensor, columns: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """The cells of windows, from their rows ``(K, H)``, columns ``(K, W)``.

    Returns:
        tuple[Tensor]: Index of the window, row and column of each cell.
    """

    def span(mask: Tensor) -> Tuple[Tensor, Tensor]:
        first = mask.int().argmax(-1)
        last = mask.shape[-1] - 1 - mask.flip(-1).int().argmax(-1)
        return first, last - first + 1

    (top, height), (left, width) = span(rows), span(columns)
    counts = height * width
    window = torch.repeat_interleave(counts)
    cell = torch.arange(len(window)) - (counts.cumsum(0) - counts)[window]
    return (window, top[window] + cell // width[window],
            left[window] + cell % width[window])
