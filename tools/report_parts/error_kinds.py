"""The kinds of error of a detector, and how its boxes lie, for report.py.

Source of the kinds: Bolya et al., "TIDE: A General Toolbox for Identifying
Object Detection Errors", arXiv 2008.08115. All AP is pycocotools'.
"""
import io
from contextlib import redirect_stdout
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
from mmdet.datasets.api_wrappers import COCO, COCOeval
from pycocotools import mask

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.75)  # of IoU, for AP
LOW, HIGH = 0.1, 0.5  # of IoU: below it, background; from it on, found
KINDS = {
    'localisation': f'right class, IoU of {LOW} to {HIGH}',
    'class': f'wrong class, IoU from {HIGH} on',
    'both': f'wrong class, IoU of {LOW} to {HIGH}',
    'duplicate': 'of an object that a box of higher score has found',
    'background': f'IoU below {LOW} with every object',
    'missed': 'objects that no box means, not even one of the first two kinds'
}
BANDS = (0, 16, 32, 64, 128, 256, np.inf)  # square root of the area, pixels


def matches_of(evaluation: COCOeval) -> np.ndarray:
    """What was matched in boxes of all areas, (classes, images)."""
    params = evaluation.params
    shape = len(params.catIds), len(params.areaRng), len(params.imgIds)
    return np.array(evaluation.evalImgs, dtype=object).reshape(shape)[:, 0]


def evaluate_again(evaluation: COCOeval,
                   thresholds: Sequence[float],
                   results: Optional[List[dict]] = None,
                   truth: Optional[COCO] = None) -> Tuple[list, COCOeval]:
    """AP at each IoU, of other detections or on other ground truth."""
    truth = truth or evaluation.cocoGt
    with redirect_stdout(io.StringIO()):
        found = evaluation.cocoDt if results is None else truth.loadRes(
            results)
        other = COCOeval(truth, found, 'bbox')
        other.params.catIds = evaluation.params.catIds
        other.params.maxDets = evaluation.params.maxDets
        other.params.iouThrs = np.array(thresholds)
        other.params.areaRng, other.params.areaRngLbl = [[0, 1e10]], ['all']
        other.evaluate()
        other.accumulate()
    precision = other.eval['precision'][..., 0, -1]  # (IoU, recall, class)
    values = [row[row > -1] for row in precision]
    return [float(v.mean()) if v.size else -1.0 for v in values], other


def kind_of(iou: np.ndarray, same: np.ndarray) -> Tuple[str, int]:
    """The kind of a detection that is wrong, and the object that it means.

    Args:
        iou (np.ndarray): ``(n, )``, with the objects of its image.
        same (np.ndarray): ``(n, )`` bool, whether they are of its class.
    """
    if not len(iou) or iou.max() < LOW:
        return 'background', -1
    mine, other = np.where(same, iou, 0), np.where(same, 0, iou)
    if LOW <= mine.max() < HIGH:
        return 'localisation', mine.argmax()
    if other.max() >= HIGH:
        return 'class', other.argmax()
    return ('duplicate' if mine.max() >= HIGH else 'both'), -1


def sort_errors(evaluation: COCOeval) -> Dict[str, list]:
    """Pairs (wrong detection, object or None) of each kind.

    For 'missed', pairs of None and an object.
    """
    truth, found = evaluation.cocoGt, evaluation.cocoDt
    kinds = {kind: [] for kind in KINDS}
    for column in matches_of(evaluation).T:
        objects, wrong, right = [], [], set()
        for match in filter(None, column):
            right.update(match['dtMatches'][0])
            objects += [
                truth.anns[id_]
                for id_, ignored in zip(match['gtIds'], match['gtIgnore'])
                if not ignored
            ]
            wrong += [
                found.anns[id_]
                for id_, of, ignored in zip(match['dtIds'], match['dtMatches']
                                            [0], match['dtIgnore'][0])
                if not of and not ignored
            ]
        wrong.sort(key=lambda box: -box['score'])
        boxes = [[box['bbox'] for box in part] for part in (wrong, objects)]
        ious = np.reshape(
            mask.iou(*boxes, [0] * len(objects)), (len(wrong), len(objects)))
        classes = np.array([box['category_id'] for box in objects])
        meant = set(right)
        for box, iou in zip(wrong, ious):
            kind, index = kind_of(iou, classes == box['category_id'])
            thing = objects[index] if index >= 0 else None
            kinds[kind].append((box, thing))
            meant.update([thing['id']] if thing else [])
        kinds['missed'] += [(None, thing) for thing in objects
                            if thing['id'] not in meant]
    return kinds


def gains(evaluation: COCOeval, kinds: Dict[str, list]) -> Dict[str, float]:
    """How much AP50 grows if all errors of one kind are mended.

    Boxes get the place or the class of the object that they mean, unless
    another box has found it; all other wrong boxes are removed. Objects that
    are missed are taken out of the ground truth.
    """
    truth = evaluation.cocoGt
    keys = ('image_id', 'category_id', 'bbox', 'score')
    plain = {
        id_: {
            key: box[key]
            for key in keys
        }
        for id_, box in evaluation.cocoDt.anns.items()
    }
    taken = {
        id_
        for match in filter(None,
                            matches_of(evaluation).flat)
        for id_ in match['dtMatches'][0]
    }
    before, growth = evaluate_again(evaluation, [HIGH])[0][0], {}
    for kind, pairs in kinds.items():
        results, claimed, other = dict(plain), set(taken), None
        if kind == 'missed':
            lost = {thing['id'] for _, thing in pairs}
            other = COCO()
            other.dataset = dict(truth.dataset)
            other.dataset['annotations'] = [
                thing for thing in truth.dataset['annotations']
                if thing['id'] not in lost
            ]
            with redirect_stdout(io.StringIO()):
                other.createIndex()
            pairs = ()
        key = {'localisation': 'bbox', 'class': 'category_id'}.get(kind)
        for box, thing in pairs:
            if key and thing['id'] not in claimed:
                claimed.add(thing['id'])
                results[box['id']] = {**plain[box['id']], key: thing[key]}
            else:
                del results[box['id']]
        after = evaluate_again(evaluation, [HIGH], [*results.values()],
                               other)[0][0] if results else 0.0
        growth[kind] = max(after, 0.0) - max(before, 0.0)
    return growth


def offsets(evaluation: COCOeval, threshold: float) -> np.ndarray:
    """Offsets of boxes with that score from the objects that they match.

    Returns:
        np.ndarray: ``(n, 2, 4)``: of centre x, centre y, width and height, in
        pixels and relative to the object's width and height.
    """
    pairs = [(evaluation.cocoDt.anns[id_]['bbox'],
              evaluation.cocoGt.anns[int(of)]['bbox'])
             for match in filter(None, matches_of(evaluation).flat)
             for id_, of, ignored, score in zip(
                 match['dtIds'], match['dtMatches'][0], match['dtIgnore'][0],
                 match['dtScores'])
             if of and not ignored and score >= threshold]  # yapf: disable
    boxes = np.array(pairs, float).reshape(-1, 2, 4)
    boxes[..., :2] += boxes[..., 2:] / 2
    pixels = boxes[:, 0] - boxes[:, 1]
    relative = pixels / np.tile(boxes[:, 1, 2:], 2)
    return np.stack([pixels, relative], 1)


def recall_rows(evaluation: COCOeval, threshold: float) -> List[tuple]:
    """(size, objects, recall at any score, recall from that score on)."""
    rows, anns = [], evaluation.cocoGt.anns
    scores = evaluation.cocoDt.anns
    data = np.array(
        [(np.sqrt(np.prod(anns[id_]['bbox'][2:])),
          scores[int(by)]['score'] if by else -np.inf)
         for match in filter(None, matches_of(evaluation).flat)
         for id_, by, ignored in zip(match['gtIds'], match['gtMatches'][0],
                                     match['gtIgnore'])
         if not ignored]).reshape(-1, 2)  # yapf: disable
    for low, high in zip(BANDS, BANDS[1:]):
        score = data[(data[:, 0] >= low) & (data[:, 0] < high), 1]
        if len(score):
            name = f'{low} to {high}' if high < np.inf else f'from {low} on'
            rows.append((name, len(score), float(
                (score > -np.inf).mean()), float((score >= threshold).mean())))
    return rows
