"""From predictions to boxes, as three functions on batched tensors.

The official evaluation (google/automl ``tf2/postprocess.py``, ``nms_np.py``)
selects the 5000 strongest pairs of anchor and class of the image, decodes
them and suppresses within each class. None of the three functions branches on
values or loops over classes, images or the boxes of an image; suppression is a
loop of ``max_per_img`` steps.
"""
from typing import Optional, Tuple

import torch
from torch import Tensor

from ..scaling import MAX_PER_IMG

METHODS = ('soft_nms', 'nms')


def select(logits: Tensor, num: int) -> Tuple[Tensor, Tensor, Tensor]:
    """Selects the strongest pairs of anchor and class of each image.

    Of equal logits the lower class comes first, then the lower anchor, as the
    official code has them after suppression; only if they are equal to the
    weakest one that is kept, which of them are kept is up to ``topk``.

    Args:
        logits (Tensor): ``(N, A, K)``. An anchor may be selected for several
            classes.
        num (int): How many pairs to keep, over all levels together; below 1
            for all.

    Returns:
        tuple[Tensor]: Logits, anchor indices and labels, each ``(N, num)``,
        best first.
    """
    num_anchors, num_classes = logits.shape[1:]
    logits = logits.flatten(1)
    if not 0 < num < logits.shape[1]:
        num = logits.shape[1]
    logits, index = logits.topk(num)
    index, labels = index // num_classes, index % num_classes
    # Sorted by rank among the different logits, then by label and anchor.
    rank = (logits != logits.roll(1, 1)).cumsum(1)
    order = ((rank * num_classes + labels) * num_anchors + index).argsort(1)
    return logits, index.gather(1, order), labels.gather(1, order)


def decode(bbox_preds: Tensor, anchors: Tensor, index: Tensor,
           coder) -> Tensor:
    """Decodes the selected anchors only.

    Args:
        bbox_preds (Tensor): Deltas ``(N, A, 4)``.
        anchors (Tensor): ``(A, 4)``.
        index (Tensor): Anchor indices ``(N, num)``.
        coder (AnchorBoxCoder): Decodes the deltas.

    Returns:
        Tensor: Boxes ``(N, num, 4)`` in pixels of the network's input.
    """
    deltas = bbox_preds.gather(1, index[..., None].expand(-1, -1, 4))
    return coder.decode(anchors[index], deltas)


def suppress(bboxes: Tensor,
             scores: Tensor,
             labels: Tensor,
             max_per_img: int = MAX_PER_IMG,
             type: str = 'soft_nms',
             sigma: float = 0.5,
             iou_threshold: float = 0.5,
             min_score: float = 0.001,
             offset: Optional[int] = None) -> Tuple[Tensor, Tensor, Tensor]:
    """Suppresses boxes of the same class that overlap a stronger one.

    Repeatedly the strongest box of the image is taken, and those of its class
    lose score. Since scores only fall, taking the strongest over all classes
    gives the same boxes in the same order as suppressing class by class and
    then keeping the best, but ends after ``max_per_img`` steps, in each of
    which all boxes and images are handled at once. Classes are told apart by
    label and not by shifting boxes, so coordinates may be anything. Of equal
    scores the first is taken; the official loop shuffles its list, so that of
    scores that have decayed to equal values it may take another.

    Args:
        bboxes (Tensor): ``(N, num, 4)``, xyxy pixels.
        scores (Tensor): ``(N, num)``, positive.
        labels (Tensor): ``(N, num)``.
        max_per_img (int): Boxes to keep. Defaults to 100.
        type (str): 'soft_nms' multiplies scores by ``exp(-IoU**2 / sigma)``,
            then drops those below ``min_score``; 'nms' drops boxes with an
            IoU above ``iou_threshold``. Defaults to 'soft_nms'.
        sigma, iou_threshold, min_score (float): See ``type``.
        offset (int, optional): 1 if IoU counts a box's last pixel, else 0.
            Defaults to 1 for 'soft_nms', as in the official NumPy code, and
            to 0 for 'nms', as in TensorFlow's operator; the official hard
            suppression in NumPy has 1.

    Returns:
        tuple[Tensor]: Boxes ``(N, max, 4)``, scores and labels ``(N, max)``,
        best first, where ``max`` is at most ``max_per_img``; the score of a
        slot without a box is 0.

    Raises:
        ValueError: If ``type`` is unknown.
    """
    if type not in METHODS:
        raise ValueError(
            f'nms type {type!r} is unknown; write one of {METHODS}')
    soft = type == 'soft_nms'
    if offset is None:
        offset = 1 if soft else 0
    x1, y1, x2, y2 = bboxes.unbind(-1)
    areas = (x2 - x1 + offset) * (y2 - y1 + offset)
    scores = scores.clone()
    kept_index, kept_scores = [], []
    for _ in range(min(max_per_img, scores.shape[1])):
        best_score, best = scores.max(1, keepdim=True)  # (N, 1)
        kept_scores.append(best_score)
        kept_index.append(best)
        width = torch.minimum(x2, x2.gather(1, best)) - torch.maximum(
            x1, x1.gather(1, best)) + offset
        height = torch.minimum(y2, y2.gather(1, best)) - torch.maximum(
            y1, y1.gather(1, best)) + offset
        inter = width.clamp_(min=0) * height.clamp_(min=0)
        # Boxes that overflow give inf / inf and overlap nothing.
        iou = inter / (areas + areas.gather(1, best) - inter)
        iou = iou.nan_to_num(0)
        if soft:
            weaker = scores * torch.exp(iou.square() / -sigma)
            weaker = torch.where(weaker < min_score, 0, weaker)
        else:
            weaker = torch.where(iou > iou_threshold, 0, scores)
        same_class = labels == labels.gather(1, best)
        scores = torch.where(same_class, weaker, scores)
        scores = scores.scatter(1, best, 0)
    if not kept_index:
        return bboxes[:, :0], scores[:, :0], labels[:, :0]
    index = torch.cat(kept_index, 1)
    return (bboxes.gather(1, index[..., None].expand(-1, -1, 4)),
            torch.cat(kept_scores, 1), labels.gather(1, index))
