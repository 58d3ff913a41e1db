"""Box coding and targets of google/automl ``tf2/anchors.py``.

All boxes are (x1, y1, x2, y2) in pixels of the network's input.
"""
from typing import Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmdet.models.task_modules.coders import BaseBBoxCoder
from mmdet.structures.bbox import bbox_overlaps, get_box_tensor
from mmengine.structures import InstanceData
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..deploy.anchors import AnchorGenerator, center_and_side, decode_boxes
from ..registry import TASK_UTILS
from .window_matching import match_in_windows

TASK_UTILS.register_module(module=AnchorGenerator)


@TASK_UTILS.register_module()
class AnchorBoxCoder(BaseBBoxCoder):
    """Codes a box as (dx, dy, dw, dh) relative to an anchor, without clamps.

    Centre offsets are in units of the anchor's sides, and sizes are logarithms
    of ratios; there are no means and deviations. Unlike MMDetection's coder,
    decoding neither limits the exponent nor clips boxes to the image.
    """

    encode_size = 4

    def encode(self, bboxes: Tensor, gt_bboxes: Tensor) -> Tensor:
        """Returns the deltas ``(..., 4)`` that turn anchors into boxes.

        Args:
            bboxes (Tensor): Anchors ``(..., 4)``.
            gt_bboxes (Tensor): Boxes ``(..., 4)``.
        """
        center, side = center_and_side(get_box_tensor(gt_bboxes))
        anchor_center, anchor_side = center_and_side(get_box_tensor(bboxes))
        side, anchor_side = side.clamp(min=1e-8), anchor_side.clamp(min=1e-8)
        return torch.cat([(center - anchor_center) / anchor_side,
                          (side / anchor_side).log()], -1)

    def decode(self,
               bboxes: Tensor,
               pred_bboxes: Tensor,
               max_shape: Optional[tuple] = None) -> Tensor:
        """Returns the boxes ``(..., 4)`` of predicted deltas.

        Args:
            bboxes (Tensor): Anchors ``(..., 4)``.
            pred_bboxes (Tensor): Deltas ``(..., 4)``.
            max_shape (tuple, optional): Ignored; boxes are not clipped.
        """
        return decode_boxes(get_box_tensor(bboxes), pred_bboxes)


def match_anchors(anchors: Tensor, gt_bboxes: Tensor,
                  gt_valid: Tensor) -> Tensor:
    """The box that each anchor has to predict, for a whole batch.

    An anchor is matched to the box that it overlaps most if their IoU is at
    least 0.5. Then each box is matched to the anchor that it overlaps most,
    however small the IoU is. If several boxes have the same best anchor, it is
    matched to the first of them. The first of equal IoUs is taken. No anchors
    are ignored.

    Args:
        anchors (Tensor): ``(A, 4)``.
        gt_bboxes (Tensor): ``(N, G, 4)``; images with fewer boxes are padded.
        gt_valid (Tensor): ``(N, G)`` bool; False for padding.

    Returns:
        Tensor: ``(N, A)`` int64, index of the box or -1 for background.
    """
    num_images, num_gts = gt_valid.shape
    matches = anchors.new_full((num_images, len(anchors)),
                               -1,
                               dtype=torch.long)
    if num_gts == 0:
        return matches
    iou = _pairwise_iou(gt_bboxes, anchors)
    iou.masked_fill_(~gt_valid[..., None], -1)
    best_iou, best_gt = iou.max(dim=1)
    matches = torch.where(best_iou >= 0.5, best_gt, matches)

    best_anchor = iou.argmax(dim=2)  # (N, G), the first of equal ones
    gt_index = torch.arange(num_gts, device=anchors.device)
    gt_index = torch.where(gt_valid, gt_index, num_gts)
    claimed = torch.full_like(matches, num_gts)
    claimed.scatter_reduce_(1, best_anchor, gt_index, 'amin')
    return torch.where(claimed < num_gts, claimed, matches)


def _pairwise_iou(boxes: Tensor, anchors: Tensor) -> Tensor:
    """IoU ``(N, G, A)``, one axis at a time, which halves the memory."""

    def overlap(axis: int) -> Tensor:
        start = torch.maximum(boxes[..., axis, None], anchors[:, axis])
        end = torch.minimum(boxes[..., axis + 2, None], anchors[:, axis + 2])
        return end.sub_(start).clamp_(min=0)

    def area(x: Tensor) -> Tensor:
        return (x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1])

    inter = overlap(0).mul_(overlap(1))
    union = (area(boxes)[..., None] + area(anchors)).sub_(inter)
    # Anchors have an area, so the union is never zero.
    return inter.div_(union)


def anchor_targets(
    anchors: Tensor,
    batch_bboxes: Sequence[Tensor],
    batch_labels: Sequence[Tensor],
    num_classes: int,
    coder: AnchorBoxCoder,
    featmap_sizes: Optional[Sequence[Tuple[int, int]]] = None
) -> Tuple[Tensor, Tensor, Tensor]:
    """Training targets of a whole batch.

    Args:
        anchors (Tensor): ``(A, 4)``.
        batch_bboxes (Sequence[Tensor]): ``(G_i, 4)`` of each image.
        batch_labels (Sequence[Tensor]): ``(G_i, )`` of each image, from 0.
        num_classes (int): The label of the background.
        coder (AnchorBoxCoder): Encodes the boxes.
        featmap_sizes (Sequence[tuple], optional): Height and width of the
            levels, if the anchors are those of :class:`AnchorGenerator`. Then
            they are matched in windows on a CPU, which is faster; on a GPU
            windows would wait for it. Defaults to None.

    Returns:
        tuple[Tensor]: Labels ``(N, A)``, deltas ``(N, A, 4)`` that are zero
        for background, and the number of positive anchors, a scalar.
    """
    counts = anchors.new_tensor([len(bboxes) for bboxes in batch_bboxes])
    bboxes = [get_box_tensor(bboxes).to(anchors) for bboxes in batch_bboxes]
    bboxes = pad_sequence(bboxes, True)
    num_images, num_gts = bboxes.shape[:2]
    valid = torch.arange(num_gts, device=anchors.device) < counts[:, None]
    in_windows = featmap_sizes and anchors.device.type == 'cpu'
    if in_windows:
        matches = match_in_windows(anchors, featmap_sizes, bboxes, valid)
    else:
        matches = match_anchors(anchors, bboxes, valid)
    positive = matches >= 0
    # The last slot of each image stands for the background, index -1.
    labels = F.pad(
        pad_sequence(list(batch_labels), True, num_classes), (0, 1),
        value=num_classes)
    bboxes = F.pad(bboxes, (0, 0, 0, 1))
    image = torch.arange(num_images, device=anchors.device)[:, None]
    if in_windows:
        row, anchor = positive.nonzero(as_tuple=True)
        deltas = anchors.new_zeros(*matches.shape, 4)
        deltas[row, anchor] = coder.encode(anchors[anchor],
                                           bboxes[row, matches[row, anchor]])
    else:  # To select the positive anchors would wait for the GPU.
        deltas = coder.encode(anchors, bboxes[image, matches])
        deltas.masked_fill_(~positive[..., None], 0)
    return labels[image, matches], deltas, positive.sum()


def background_weights(anchors: Tensor, background: Tensor,
                       batch_ignored: Sequence[Optional[InstanceData]],
                       threshold: float) -> Tensor:
    """Weights ``(N, A)``, 0 for background anchors in ignored regions.

    Args:
        anchors (Tensor): ``(A, 4)``.
        background (Tensor): ``(N, A)`` bool.
        batch_ignored (Sequence): ``bboxes`` of the regions of each image.
        threshold (float): Share of an anchor above which it lies in a region.
    """
    weights = torch.ones_like(background, dtype=anchors.dtype)
    for row, mask, ignored in zip(weights, background, batch_ignored):
        if ignored is not None and len(ignored):
            regions = get_box_tensor(ignored.bboxes).to(anchors)
            share = bbox_overlaps(anchors, regions, 'iof').amax(1)
            row[mask & (share > threshold)] = 0
    return weights
