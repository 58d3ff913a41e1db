"""Boxes and AP from the heads of PyTorch and from an artefact."""
import contextlib
import io
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import cv2
import numpy as np
import torch
from mmengine.config import Config
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_iou

from mmdet_efficientdet.deploy.pictures import scaled_size
from mmdet_efficientdet.deploy.postprocess import (NMS_PRE, decode, select,
                                                   suppress)
from mmdet_efficientdet.deploy.settings import DetectorSettings
from mmdet_efficientdet.models.anchors import AnchorBoxCoder
from mmdet_efficientdet.scaling import MAX_PER_IMG

LEAST_CALIBRATION = 16  # images; fewer do not show the ranges of the maps
Rows = Tuple[np.ndarray, np.ndarray, np.ndarray]  # boxes, scores, labels


@dataclass
class Photographs:
    """Images with boxes, as COCO's format has them.

    Args:
        annotations (Path): The JSON file.
        folder (Path): Of the images.
        classes (Sequence[str]): Names of the classes, in the order of the
            outputs.
        limit (int): The number of images to use at most.

    Raises:
        ValueError: If a file is missing, or has none of the classes.
    """
    annotations: Path
    folder: Path
    classes: Sequence[str]
    limit: int = 500

    def __post_init__(self) -> None:
        if not self.annotations.is_file():
            raise ValueError(
                f'the annotations {self.annotations} do not exist. An export '
                'is checked on photographs with boxes: give --data '
                'ANNOTATIONS.json and --images FOLDER')
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.coco = COCO(str(self.annotations))
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise ValueError(
                f"{self.annotations} is not in COCO's format. For other data, "
                'give --data ANNOTATIONS.json and --images FOLDER') from error
        ids = {x['name']: x['id'] for x in self.coco.loadCats(
            self.coco.getCatIds())}  # yapf: disable
        self.category_ids = [ids.get(name) for name in self.classes]
        if not any(x is not None for x in self.category_ids):
            raise ValueError(f'{self.annotations} has none of the classes '
                             f'{list(self.classes)[:5]}; it has '
                             f'{list(ids)[:5]}')
        images = self.coco.loadImgs(sorted(self.coco.getImgIds()))
        if not images:
            raise ValueError(f'{self.annotations} has no images')
        self.items = [(x['id'], self.folder / x['file_name'])
                      for x in images[:self.limit]]
        for _, path in self.items:
            if not path.is_file():
                raise ValueError(f'the image {path} does not exist; give the '
                                 'folder with --images')

    def ap(self, results: Dict[int, Rows]) -> float:
        """COCO's AP in points of 100."""
        run = self.evaluate(results)
        return max(0.0, float(run.stats[0])) * 100 if run else 0.0

    def evaluate(self, results: Dict[int, Rows]) -> Optional[COCOeval]:
        """COCO's evaluation; None without boxes."""
        rows = []
        for image, (boxes, scores, labels) in results.items():
            for (x1, y1, x2, y2), score, label in zip(boxes.tolist(),
                                                      scores.tolist(),
                                                      labels.tolist()):
                if self.category_ids[int(label)] is not None:
                    rows.append(dict(
                        image_id=image, score=score,
                        category_id=self.category_ids[int(label)],
                        bbox=[x1, y1, x2 - x1, y2 - y1]))  # yapf: disable
        if not rows:
            return None
        with contextlib.redirect_stdout(io.StringIO()):
            run = COCOeval(self.coco, self.coco.loadRes(rows), 'bbox')
            run.params.imgIds = list(results)
            run.evaluate()
            run.accumulate()
            run.summarize()
        return run


def dataset_of(config: Config, loader: str) -> Tuple[Path, Path]:
    """Annotation file and image folder of a config's dataset."""
    dataset = config.get(loader, {}).get('dataset', {})
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    if not dataset.get('ann_file'):
        raise ValueError(f'the {loader} of the config names no annotations; '
                         'give --data ANNOTATIONS.json --images FOLDER')
    root = Path(dataset.get('data_root') or '')
    prefix = dataset.get('data_prefix', {})
    prefix = prefix.get('img', prefix.get('img_path', ''))
    return root / dataset['ann_file'], root / prefix


def read_image(path: Path) -> np.ndarray:
    """An image ``(H, W, 3)``, RGB.

    Raises:
        ValueError: If it cannot be read.
    """
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(f'{path} cannot be read as an image')
    return np.ascontiguousarray(image[..., ::-1])


def fit(image: np.ndarray, settings: DetectorSettings) -> Tuple:
    """Resizes to the input's size.

    Returns:
        tuple: The input ``(1, H, W, 3)`` uint8, and its pixels for one of the
        image as (x, y).
    """
    height, width = settings.image_size
    shape = image.shape[:2]
    size = (height, width)
    if settings.resize == 'pad':
        size = scaled_size(shape, settings.image_size)[1]
    resized = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    canvas = np.empty((1, height, width, 3), np.uint8)
    canvas[:] = np.round(settings.mean)
    canvas[0, :size[0], :size[1]] = resized
    return canvas, (size[1] / shape[1], size[0] / shape[0])


def calibration_images(folder: Path, paths: Sequence[Path],
                       settings: DetectorSettings, number: int,
                       seed: int) -> np.ndarray:
    """Inputs ``(n, H, W, 3)`` for static quantisation, chosen by seed.

    Raises:
        ValueError: If there are too few images, or one cannot be read.
    """
    paths = sorted(paths)
    if len(paths) < LEAST_CALIBRATION or number < LEAST_CALIBRATION:
        raise ValueError(
            f'int8 is calibrated on images like those of the training, at '
            f'least {LEAST_CALIBRATION}; {min(len(paths), number)} of {folder}'
            ' are given. Use --calibration FOLDER and --calibration-images')
    random.Random(seed).shuffle(paths)
    return np.concatenate(
        [fit(read_image(path), settings)[0] for path in paths[:number]])


@torch.no_grad()
def detect(deltas: np.ndarray, logits: np.ndarray, anchors: torch.Tensor,
           config: dict, tail: str) -> Rows:
    """Boxes of one image in pixels of the input.

    Args:
        deltas, logits (np.ndarray): ``(1, A, 4)`` and ``(1, A, K)``.
        anchors (Tensor): ``(A, 4)``.
        config (dict): The head's ``test_cfg``.
        tail (str): 'soft', the suppression of the config; 'hard' of each
            class by itself; 'one_class', hard, across classes and with one
            class for each anchor, as TensorFlow Lite's operator does.
    """
    deltas, logits = torch.as_tensor(deltas), torch.as_tensor(logits)
    nms = dict(config.get('nms', {}))
    best = None
    if tail != 'soft':
        nms = dict(
            type='nms', iou_threshold=0.5, class_agnostic=tail == 'one_class')
    if tail == 'one_class':
        logits, best = logits.max(2, keepdim=True)
    logits, index, labels = select(logits, config.get('nms_pre', NMS_PRE))
    if best is not None:
        labels = best[..., 0].gather(1, index)
    boxes = decode(deltas, anchors, index, AnchorBoxCoder())
    boxes, scores, labels = suppress(boxes, logits.sigmoid(), labels,
                                     config.get('max_per_img', MAX_PER_IMG),
                                     **nms)
    keep = scores[0] > 0
    return tuple(x[0][keep].numpy() for x in (boxes, scores, labels))


def to_image(rows: Rows, scale: Sequence[float], shape: Sequence[int]) -> Rows:
    """Boxes in pixels of the image, clipped to it."""
    boxes = rows[0] / np.tile(np.float32(scale), 2)
    return (boxes.clip(0, np.tile(shape[1::-1], 2)), *rows[1:])


def agreement(expected: Rows, found: Rows, least: float = 0.3) -> List[bool]:
    """For each box above a score, whether the other side has it, too.

    It has if a box of the same class has an IoU of at least 0.9 and a score
    that differs by at most 0.05.
    """
    ours, theirs = ([torch.from_numpy(x) for x in rows]
                    for rows in (expected, found))
    same = ((box_iou(ours[0], theirs[0]) >= 0.9)
            & (ours[2][:, None] == theirs[2])
            & ((ours[1][:, None] - theirs[1]).abs() <= 0.05))
    return same.any(1)[ours[1] >= least].tolist()
