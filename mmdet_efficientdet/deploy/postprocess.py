"""From predictions to boxes, in functions on tensors of a whole batch.

The official evaluation (google/automl ``tf2/postprocess.py``, ``nms_np.py``)
selects the 5000 strongest pairs of anchor and class of an image, decodes their
boxes and suppresses boxes within each class. The functions do not branch on
values and do not loop over classes, images or the boxes of an image.

:func:`select` and :func:`suppress` can be compiled by ``torch.jit.script``
and exported to ONNX from opset 16 on. A module that calls the scripted
:func:`suppress` is exported with one ``Loop``; otherwise the exporter unrolls
the ``max_per_img`` steps.
"""
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from ..scaling import MAX_PER_IMG

NMS_PRE = 5000  # pairs of anchor and class that are selected of an image


def join(maps: List[Tensor], width: int) -> Tensor:
    """Joins the maps of all levels.

    Args:
        maps (list[Tensor]): ``(N, A * width, H_i, W_i)`` of each level.
        width (int): Numbers that are predicted for an anchor.

    Returns:
        Tensor: ``(N, sum(H_i * W_i * A), width)``, in the order of anchors.
    """
    rows = [x[0].numel() // width for x in maps]  # so that N may vary later
    return torch.cat([
        x.permute(0, 2, 3, 1).reshape(-1, n, width)
        for x, n in zip(maps, rows)
    ], 1)


def detect(logits: Tensor,
           bbox_preds: Tensor,
           anchors: Tensor,
           coder,
           config: dict,
           with_nms: bool = True) -> Tuple[Tensor, Tensor, Tensor]:
    """Selects, decodes and suppresses.

    Args:
        logits (Tensor): ``(N, A, K)``.
        bbox_preds, anchors, coder: See :func:`decode`.
        config (dict): ``test_cfg`` of ``EfficientDetHead``, of which
            ``nms_pre``, ``nms`` and ``max_per_img`` are used.
        with_nms (bool): Whether to suppress boxes. Defaults to True.

    Returns:
        tuple[Tensor]: Boxes, scores and labels, as :func:`suppress`.
    """
    logits, index, labels = select(logits, config.get('nms_pre', NMS_PRE))
    boxes = decode(bbox_preds, anchors, index, coder)
    found = boxes, logits.sigmoid(), labels
    if with_nms:
        limit = config.get('max_per_img', MAX_PER_IMG)
        found = suppress(*found, limit, **config.get('nms', {}))
    return found


def select(logits: Tensor, num: int) -> Tuple[Tensor, Tensor, Tensor]:
    """Selects the strongest pairs of anchor and class of each image.

    Equal logits are sorted by class and then by anchor, which is their order
    after the official suppression. If several pairs are equal to the weakest
    one that is kept, ``topk`` decides which of them are kept.

    Args:
        logits (Tensor): ``(N, A, K)``. An anchor may be selected for several
            classes.
        num (int): Number of pairs to keep, over all levels together. All are
            kept if it is below 1.

    Returns:
        tuple[Tensor]: Logits, anchor indices and labels, each ``(N, num)``,
        best first.
    """
    num_anchors, num_classes = logits.shape[1:]
    anchors: Optional[Tensor] = None
    if num_classes > 1 and 0 < num < num_anchors:
        # The best pairs are of the best anchors, which are far fewer.
        anchors = logits.amax(2).topk(num)[1]
        each = anchors[..., None].expand(-1, -1, num_classes)
        logits = logits.gather(1, each)
    logits = logits.flatten(1)
    if not 0 < num < logits.shape[1]:
        num = logits.shape[1]
    logits, index = logits.topk(num)
    index, labels = index // num_classes, index % num_classes
    if anchors is not None:
        index = anchors.gather(1, index)
    # The rank of a logit among the different ones. ONNX sums no booleans.
    rank = (logits != logits.roll(1, 1)).long().cumsum(1)
    order = ((rank * num_classes + labels) * num_anchors + index).argsort(1)
    return logits, index.gather(1, order), labels.gather(1, order)


def decode(bbox_preds: Tensor, anchors: Tensor, index: Tensor,
           coder) -> Tensor:
    """Decodes the boxes of the selected anchors.

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
             offset: Optional[int] = None,
             method: str = 'gaussian',
             class_agnostic: bool = False) -> Tuple[Tensor, Tensor, Tensor]:
    """Suppresses boxes that overlap a stronger box of the same class.

    Each step keeps the strongest box of the image and lowers the scores of
    the boxes of its class. Scores only fall, so the result is the same as if
    each class were suppressed by itself and the best boxes were kept. Classes
    are compared by label; coordinates may have any value. The first of equal
    scores is kept. The official loop shuffles its list, so it may keep another
    one of several scores that have decayed to the same value.

    Args:
        bboxes (Tensor): ``(N, num, 4)``, xyxy pixels.
        scores (Tensor): ``(N, num)``, positive.
        labels (Tensor): ``(N, num)``.
        max_per_img (int): Number of boxes to keep; all if it is negative.
            Defaults to 100.
        type (str): 'soft_nms' multiplies scores as ``method`` says and drops
            boxes whose score falls below ``min_score``; 'nms' drops boxes
            with an IoU above ``iou_threshold``. Defaults to 'soft_nms'.
        sigma, iou_threshold, min_score (float): See ``type`` and ``method``.
        offset (int, optional): 1 if the sides of a box include its last
            pixel, else 0. Defaults to 1 for 'soft_nms', as in the official
            NumPy code, and to 0 for 'nms', as in TensorFlow's operator; the
            official hard suppression in NumPy has 1.
        method (str): Of 'soft_nms': 'gaussian' multiplies by ``exp(-IoU**2 /
            sigma)``, 'linear' by ``1 - IoU`` from ``iou_threshold`` on, as
            mmcv does. Defaults to 'gaussian'.
        class_agnostic (bool): Whether boxes suppress those of other classes,
            too. Defaults to False.

    Returns:
        tuple[Tensor]: Boxes ``(N, max, 4)``, scores and labels ``(N, max)``,
        best first, where ``max`` is at most ``max_per_img``; the score of a
        slot without a box is 0.

    Raises:
        ValueError: If ``type`` or ``method`` is unknown, or ``sigma`` is not
            positive.
    """
    # TorchScript has neither the conversion !r nor module-level constants.
    if type not in ['soft_nms', 'nms'] or method not in ['gaussian', 'linear']:
        raise ValueError(f"nms type '{type}' must be one of 'soft_nms', 'nms',"
                         f" and method '{method}' of 'gaussian', 'linear'")
    if sigma <= 0:
        raise ValueError(f'sigma={sigma} of nms must be positive')
    kind = method if type == 'soft_nms' else 'hard'
    if offset is None:
        offset = 0 if kind == 'hard' else 1
    if max_per_img < 0:
        max_per_img = scores.shape[1]
    groups = torch.zeros_like(labels) if class_agnostic else labels
    start, end = bboxes.permute(2, 0, 1).contiguous().split(2)  # (2, N, num)
    sides = end - start + offset
    areas = sides[0] * sides[1]
    rest = scores
    kept = scores[:, :0]
    index = torch.zeros_like(kept, dtype=torch.long)
    for _ in range(min(max_per_img, scores.shape[1])):
        best_score, best, rest = suppress_step(start, end, areas, rest, groups,
                                               kind, sigma, iou_threshold,
                                               min_score, offset)
        kept = torch.cat([kept, best_score], 1)
        index = torch.cat([index, best], 1)
    return (bboxes.gather(1, index[..., None].expand(-1, -1, 4)), kept,
            labels.gather(1, index))


def suppress_step(start: Tensor, end: Tensor, areas: Tensor, scores: Tensor,
                  labels: Tensor, kind: str, sigma: float,
                  iou_threshold: float, min_score: float,
                  offset: int) -> Tuple[Tensor, Tensor, Tensor]:
    """Takes the strongest box of each image and lowers its class's scores.

    Args:
        start (Tensor): x1 and y1 of the boxes, ``(2, N, num)``.
        end (Tensor): x2 and y2 of the boxes, ``(2, N, num)``.
        areas (Tensor): ``(N, num)``.
        scores (Tensor): ``(N, num)``, 0 for boxes that are out.
        labels (Tensor): ``(N, num)``.
        kind (str): How scores decay, 'gaussian' or 'linear', or 'hard', which
            drops boxes.
        sigma, iou_threshold, min_score, offset: See :func:`suppress`.

    Returns:
        tuple[Tensor]: Score and index of the strongest box, ``(N, 1)``, and
        the new scores ``(N, num)``, 0 for that box.
    """
    best_score, best = scores.max(1, keepdim=True)
    index = best.expand(2, -1, -1)
    sides = torch.minimum(end, end.gather(2, index)) - torch.maximum(
        start, start.gather(2, index)) + offset
    sides = sides.clamp_(min=0)
    inter = sides[0] * sides[1]
    # Boxes that overflow give inf / inf and overlap nothing.
    iou = (inter / (areas + areas.gather(1, best) - inter)).nan_to_num(0.)
    if kind == 'hard':
        weaker = scores.masked_fill(iou > iou_threshold, 0)
    else:
        decay = torch.exp(iou.square() / -sigma)
        if kind == 'linear':
            decay = 1 - iou.masked_fill(iou < iou_threshold, 0)
        weaker = scores * decay
        weaker = weaker.masked_fill_(weaker < min_score, 0)
    same_class = labels == labels.gather(1, best)
    scores = torch.where(same_class, weaker, scores)
    return best_score, best, scores.scatter_(1, best, 0)
