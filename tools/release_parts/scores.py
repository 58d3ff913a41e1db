"""AP of a released detector, and of a checkpoint in MMDetection."""
import contextlib
import copy
import io
import tempfile
import time
from pathlib import Path

import numpy as np
from export_parts.evaluation import Photographs
from mmengine.config import Config
from mmengine.runner import Runner
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from mmdet_efficientdet import Detector

ALL = 10**9  # pictures


def score_detector(detector: Detector, annotations: Path,
                   folder: Path) -> dict:
    """COCO's numbers of a detector that needs no MMDetection.

    Args:
        detector (Detector): Any.
        annotations (Path): In COCO's format.
        folder (Path): Of its pictures.

    Returns:
        dict: ``AP``, ``AP50`` and ``AP75`` in points of 100, ``images``,
        ``seconds`` for a picture, and ``classes``, a list of name, boxes, AP
        and AP50.

    Raises:
        ValueError: If the annotations do not fit the detector, or a picture
            cannot be read.
    """
    photographs = Photographs(annotations, folder, detector.classes, ALL)
    results, start = {}, time.perf_counter()
    for number, path in tqdm(photographs.items, unit='picture', disable=None):
        found = detector(path, threshold=0)
        results[number] = found.boxes, found.scores, found.labels
    seconds = (time.perf_counter() - start) / len(results)
    return dict(
        numbers(photographs.evaluate(results), photographs),
        images=len(results),
        seconds=round(seconds, 4))


def numbers(run, photographs: Photographs) -> dict:
    """AP of all and of each class, in points of 100; -1 without boxes."""

    def points(values: np.ndarray) -> float:
        values = values[values > -1]
        return round(100 * float(values.mean()), 2) if values.size else -1.0

    # (IoU, recall, class, area, most detections)
    precision = run.eval['precision'][:, :, :, 0, -1] if run else \
        np.zeros((10, 1, 1))
    classes = []
    for name, category in zip(photographs.classes, photographs.category_ids):
        if category is None:
            continue
        boxes = len(
            photographs.coco.getAnnIds(catIds=[category], iscrowd=False))
        index = run.params.catIds.index(category) if run else 0
        part = precision[:, :, index]
        classes.append([name, boxes, points(part), points(part[0])])
    return dict(
        AP=points(precision),
        AP50=points(precision[0]),
        AP75=points(precision[5]),
        classes=classes)


def score_in_host(config: Config, checkpoint: str, annotations: Path,
                  folder: Path) -> float:
    """The AP of a checkpoint by MMDetection's test loop, in points of 100.

    Args:
        config (Config): Of the detector; it is not changed.
        checkpoint (str): A file, or a name such as
            effdet://tf_efficientdet_d0.
        annotations (Path): In COCO's format.
        folder (Path): Of its pictures.

    Raises:
        ValueError: If the annotations do not exist, or lack a class of the
            config, for which MMDetection would shift the labels; the hook
            ``PreflightHook`` of the shipped configs finds this.
    """
    config = copy.deepcopy(config)
    loader = config.test_dataloader
    dataset = loader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    if not annotations.is_file():
        raise ValueError(f'the annotations {annotations} do not exist')
    loader.dataset = dict(
        type='CocoDataset',
        ann_file=str(annotations.absolute()),
        data_prefix=dict(img=f'{folder.absolute()}/'),
        metainfo=dataset.get('metainfo', {}),
        pipeline=dataset.pipeline,
        test_mode=True)
    config.test_evaluator = dict(
        type='CocoMetric', metric='bbox', ann_file=str(annotations.absolute()))
    config.load_from, config.resume = checkpoint, False
    config.log_level = 'WARNING'
    config.model.backbone.init_cfg = None
    with tempfile.TemporaryDirectory() as work_dir:
        # mmengine keeps a visualizer, and its folder, for each name.
        config.visualizer, config.experiment_name = None, Path(work_dir).name
        config.work_dir = work_dir
        config.test_evaluator.outfile_prefix = f'{work_dir}/found'
        with contextlib.redirect_stdout(io.StringIO()):
            Runner.from_cfg(config).test()
            found = Path(work_dir, 'found.bbox.json')
            if found.read_text() == '[]':
                return 0.0
            truth = COCO(str(annotations))
            # MMDetection rounds its numbers to three digits.
            run = COCOeval(truth, truth.loadRes(str(found)), 'bbox')
            run.evaluate()
            run.accumulate()
            run.summarize()
    return round(100 * float(run.stats[0]), 2)
