"""Evaluate detections, and count and draw the errors of each image.

For report.py.
"""
import json
import tempfile
from collections import Counter
from pathlib import Path

import mmcv
import numpy as np
import torch
from mmdet.datasets.api_wrappers import COCO, COCOeval
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.structures import InstanceData

# RGB of right, wrong and ignored boxes.
RIGHT, WRONG, IGNORED = range(3)
PALETTE = [(0, 170, 60), (230, 30, 30), (150, 150, 150)]
SIDE = 640  # pixels of the longer side of a drawn image: labels are readable


def read_results(file: Path, known: dict) -> list:
    """Reads detections in COCO's format of results.

    Args:
        file (Path): The JSON file.
        known (dict): The allowed values of image_id and category_id.

    Raises:
        ValueError: If it has another format, or if an id is not known.
    """
    try:
        results = json.loads(file.read_bytes())
        rows = [[*result['bbox'], result['score']] for result in results]
        if {len(row) for row in rows} != {5} or not np.isfinite(rows).all():
            raise ValueError('boxes need 4 finite numbers, or there are none')
        for key, ids in known.items():
            strange = {result[key] for result in results}.difference(ids)
            if strange:
                raise ValueError(
                    f'{key} {strange.pop()!r} is not one of the {len(ids)} of '
                    'the config; give the --cfg-options that test.py had')
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f'{file} cannot be used: {error!r}. Give detections in COCO\'s '
            'format, such as NAME.bbox.json of test.py with --cfg-options '
            'test_evaluator.outfile_prefix=NAME; the pickle of its --out is '
            'not read') from error
    return results


def read_truth(metric: dict, dataset) -> COCO:
    """The boxes to find; each image has an 'img_path'.

    Args:
        metric (dict): The evaluator of the config. Without an ``ann_file``,
            as VOC's, the boxes are those of the data set, and category_id is
            the index of the class.
        dataset (BaseDetDataset): Has the images.

    Raises:
        ValueError: If the two have other images.
    """
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    if metric.get('ann_file'):
        truth = COCO(metric['ann_file'])
    else:
        host = CocoMetric()
        host.dataset_meta = dataset.metainfo
        with tempfile.TemporaryDirectory() as folder:
            boxes = [dict(info, anns=info['instances']) for info in infos]
            truth = COCO(host.gt_to_coco_json(boxes, f'{folder}/truth'))
    paths = {info['img_id']: info['img_path'] for info in infos}
    if set(paths) != set(truth.imgs):
        raise ValueError(
            f'test_dataloader.dataset has {len(paths)} images, but not those '
            f'{len(truth.imgs)} of test_evaluator, {metric["ann_file"]}')
    for id_, path in paths.items():
        image = truth.imgs[id_]
        image.update(
            img_path=path, file_name=image['file_name'] or Path(path).name)
    return truth


def evaluate(cfg: Config, file: Path) -> COCOeval:
    """Evaluates as MMDetection's CocoMetric does, and prints the table.

    Returns:
        COCOeval: Evaluated; each image of its ``cocoGt`` has an 'img_path'.

    Raises:
        ValueError: If the config has several evaluators, or the results do
            not fit.
    """
    metric = cfg.get('test_evaluator')
    if not isinstance(metric, dict):
        raise ValueError('test_evaluator must be one CocoMetric or VOCMetric; '
                         f'here it is {metric}')
    dataset = DATASETS.build(dict(cfg.test_dataloader.dataset, pipeline=[]))
    truth = read_truth(metric, dataset)
    category_ids = truth.get_cat_ids(cat_names=dataset.metainfo['classes'])
    known = dict(image_id=truth.imgs, category_id=category_ids)
    found = truth.loadRes(read_results(file, known))
    evaluation = COCOeval(truth, found, 'bbox')
    evaluation.params.catIds = category_ids
    evaluation.params.maxDets = list(
        metric.get('proposal_nums', (100, 300, 1000)))
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def class_rows(evaluation: COCOeval) -> list:
    """(name, boxes, AP, AP50) of each class, the worst first.

    From as many detections as the summary, so that the mean of a column is
    the number there. AP is -1 where there are no boxes.
    """
    truth, precision = evaluation.cocoGt, evaluation.eval['precision']
    counts = Counter(box['category_id'] for box in truth.anns.values()
                     if not box['iscrowd'])
    rows = []
    for k, category in enumerate(evaluation.params.catIds):
        values = precision[:, :, k, 0]  # (IoU, recall, most detections)
        rows.append((truth.cats[category]['name'], counts[category],
                     values[..., 0].mean(), values[0, :, -1].mean()))
    return sorted(rows, key=lambda row: (row[2] < 0, row[2]))


def count_boxes(matches: np.ndarray) -> tuple:
    """Counts right and wrong boxes of each image, at an IoU of 0.5.

    Detections count from the score on that gives the best F1 of all images.

    Args:
        matches (ndarray): What COCOeval matched, of shape (classes, images).

    Returns:
        tuple: That score, and how many boxes are found, missed and false, of
        shape (3, images).
    """
    image, score, right = [], [], []
    boxes = np.zeros(matches.shape[1], int)
    for (_, i), match in np.ndenumerate(matches):
        if match is not None:
            boxes[i] += np.count_nonzero(match['gtIgnore'] == 0)
            counts = ~match['dtIgnore'][0]
            image.append(np.full(counts.sum(), i))
            score.append(np.array(match['dtScores'])[counts])
            right.append(match['dtMatches'][0][counts] > 0)
    image, score, right = map(np.concatenate, (image, score, right))
    if not len(score):  # all detections lie in crowds
        return 1.0, np.array([0 * boxes, boxes, 0 * boxes])
    order = np.argsort(-score)
    image, score, right = image[order], score[order], right[order]
    f1 = 2 * right.cumsum() / (np.arange(len(right)) + 1 + boxes.sum())
    f1[:-1][score[:-1] == score[1:]] = 0  # equal scores count together
    end = f1.argmax() + 1
    found, shown = (
        np.bincount(x, minlength=len(boxes))
        for x in (image[:end][right[:end]], image[:end]))
    return score[end - 1], np.array([found, boxes - found, shown - found])


def draw_image(evaluation: COCOeval, matches: list, threshold: float):
    """Draws ground truth at the left and predictions at the right.

    Args:
        evaluation (COCOeval): Has the boxes.
        matches (list[dict]): Those of one image, of all classes.
        threshold (float): Lowest score of a prediction.

    Returns:
        ndarray: RGB picture.
    """
    truth, found = evaluation.cocoGt, evaluation.cocoDt
    path = truth.imgs[matches[0]['image_id']]['img_path']
    image = mmcv.imread(path, channel_order='rgb')
    scale = SIDE / max(image.shape[:2])
    image = mmcv.imrescale(image, scale)
    # Where a box reaches beyond it, the host would shrink the picture.
    corner = np.tile(image.shape[1::-1], 2) - 1

    visualizer = DetLocalVisualizer(line_width=2)
    visualizer.dataset_meta = dict(palette=PALETTE)

    def draw(rows, scored):
        """Draws boxes in the colours of their verdicts."""
        boxes = np.array([box['bbox'] for box, _ in rows]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        # The label has the score, since the host's has no percent sign.
        names = [
            truth.cats[box['category_id']]['name'] +
            (f' {box["score"]:.0%}' if scored else '') for box, _ in rows
        ]
        instances = InstanceData(
            bboxes=torch.tensor((boxes * scale).clip(0, corner)),
            labels=torch.tensor([verdict for _, verdict in rows]),
            # matplotlib would typeset what stands between dollars.
            label_names=[name.replace('$', r'\$') for name in names])
        sample = DetDataSample(gt_instances=instances)
        visualizer.add_datasample('', image, sample, draw_pred=False)
        return visualizer.get_image()

    objects, predictions = [], []
    for match in matches:
        shown = {
            id_
            for id_, score in zip(match['dtIds'], match['dtScores'])
            if score >= threshold
        }
        for id_, by, ignored in zip(match['gtIds'], match['gtMatches'][0],
                                    match['gtIgnore']):
            verdict = RIGHT if by in shown else WRONG
            objects.append((truth.anns[id_], IGNORED if ignored else verdict))
        for id_, of, ignored in zip(match['dtIds'], match['dtMatches'][0],
                                    match['dtIgnore'][0]):
            verdict = RIGHT if of else WRONG
            if id_ in shown:
                predictions.append(
                    (found.anns[id_], IGNORED if ignored else verdict))
    return np.concatenate(
        [draw(objects, False), draw(predictions, True)], axis=1)
