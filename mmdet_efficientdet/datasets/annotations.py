"""Annotation files as arrays, with what MMDetection would drop silently."""
import os.path as osp
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from numbers import Real
from typing import List, Optional, Sequence, Tuple

import numpy as np
from mmdet.datasets import CocoDataset, XMLDataset
from mmengine.fileio import load

from .class_names import reads_like

NOT_WANTED, NOT_IN_FILE = -1, -2  # labels of boxes of other categories
IMAGE_FIELDS = ('id', 'file_name', 'height', 'width')
BOX_FIELDS = ('id', 'image_id', 'category_id', 'bbox', 'area')


@dataclass
class Annotations:
    """One annotation file: N images, M boxes.

    Args:
        file (str): Path of the annotation file.
        classes (Sequence[str]): Classes of the config.
        names (list[str], optional): Categories of the file, in its order;
            None where the format lists none.
        image_ids (list): N ids.
        paths (list[str]): N paths of images.
        sizes (np.ndarray): ``(N, 2)``, height and width as the file says.
        ids (list): M ids of boxes; for VOC, the ids of their images.
        boxes (np.ndarray): ``(M, 4)``, (x1, y1, x2, y2) in pixels.
        image (np.ndarray): ``(M, )``, index of each box's image, or -1.
        labels (np.ndarray): ``(M, )``, from 0, ``NOT_WANTED`` for a category
            that the config leaves out, ``NOT_IN_FILE`` for one that is none.
        area (np.ndarray): ``(M, )``, as the file says.
        crowd (np.ndarray): ``(M, )`` bool.
        incomplete (list[str]): Images and boxes without a needed field.
        no_crowd_flag (list): Ids of boxes of the config's classes without
            ``iscrowd``, which training does not need.
        filter_empty (bool): Whether images without boxes are left out.
        test_mode (bool): Whether nothing is left out.
        partial (bool): Whether ``indices`` choose some of the images.
        backend_args (dict, optional): How the host reads the files.
    """
    file: str
    classes: Sequence[str]
    names: Optional[List[str]]
    image_ids: list
    paths: List[str]
    sizes: np.ndarray
    ids: list
    boxes: np.ndarray
    image: np.ndarray
    labels: np.ndarray
    area: np.ndarray
    crowd: np.ndarray
    incomplete: List[str]
    no_crowd_flag: list
    filter_empty: bool
    test_mode: bool
    partial: bool
    backend_args: Optional[dict]

    @cached_property
    def wanted(self) -> np.ndarray:
        """Mask ``(M, )`` of the boxes of the config's classes."""
        return (self.labels >= 0) & (self.image >= 0)

    @cached_property
    def usable(self) -> np.ndarray:
        """Mask ``(M, )`` of what MMDetection keeps, without crowds."""
        inside = np.minimum(self.boxes[:, 2:], self.limits) - np.maximum(
            self.boxes[:, :2], 0)
        return (self.wanted & ~self.crowd & ~(self.area <= 0)
                & (inside > 0).all(1) & (self.sides >= 1).all(1))

    @cached_property
    def sides(self) -> np.ndarray:
        """Width and height ``(M, 2)`` of the boxes."""
        return self.boxes[:, 2:] - self.boxes[:, :2]

    @cached_property
    def limits(self) -> np.ndarray:
        """Width and height ``(M, 2)`` of each box's image."""
        if not len(self.sizes):
            return np.zeros((len(self.image), 2))
        return self.sizes[self.image][:, ::-1]

    def example(self, box: int) -> str:
        """A box of the file, for a message."""
        image = self.image[box]
        name = osp.basename(self.paths[image]) if image >= 0 else 'no image'
        numbers = ', '.join(f'{n:g}' for n in self.boxes[box])
        return (f'{name}: annotation {self.ids[box]}, x1 y1 x2 y2 = '
                f'({numbers})')


def read_annotations(dataset) -> Optional[Annotations]:
    """Reads the file of a dataset of MMDetection, which may be lazy.

    Args:
        dataset (BaseDetDataset): A ``CocoDataset`` or ``XMLDataset``.

    Returns:
        Annotations: None for other formats.
    """
    for kind, read in ((CocoDataset, _read_coco), (XMLDataset, _read_xml)):
        if reads_like(dataset, kind):
            return read(dataset)
    return None


def _read_coco(dataset) -> Annotations:
    content = load(dataset.ann_file, backend_args=dataset.backend_args)
    images, incomplete = _complete(content['images'], IMAGE_FIELDS, 'image')
    anns, missing = _complete(
        content.get('annotations', []), BOX_FIELDS, 'annotation')
    classes = dataset.metainfo['classes']
    position = {image['id']: i for i, image in enumerate(images)}
    # MMDetection numbers classes in the order of the file.
    kept = [c['id'] for c in content['categories'] if c['name'] in classes]
    label = {c['id']: NOT_WANTED for c in content['categories']}
    label.update((key, i) for i, key in enumerate(kept))
    prefix = dataset.data_prefix.get('img', '')
    boxes = _array([ann['bbox'] for ann in anns], 4)
    boxes[:, 2:] += boxes[:, :2]
    return Annotations(
        labels=np.array(
            [label.get(ann['category_id'], NOT_IN_FILE) for ann in anns], int),
        names=[category['name'] for category in content['categories']],
        image_ids=[image['id'] for image in images],
        paths=[osp.join(prefix, image['file_name']) for image in images],
        sizes=_array([(image['height'], image['width']) for image in images],
                     2),
        ids=[ann['id'] for ann in anns],
        boxes=boxes,
        image=np.array([position.get(ann['image_id'], -1) for ann in anns],
                       int),
        area=np.array([ann['area'] for ann in anns], float),
        crowd=np.array([
            bool(ann.get('iscrowd', 0) or ann.get('ignore', 0)) for ann in anns
        ], bool),
        incomplete=incomplete + missing,
        no_crowd_flag=[
            ann['id'] for ann in anns if ann.get('iscrowd') is None
            and label.get(ann['category_id'], NOT_IN_FILE) >= 0
        ],
        **_settings(dataset))


def _read_xml(dataset) -> Annotations:
    """What MMDetection read: of this format it drops but other classes."""
    dataset.full_init()
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    found = [(i, instance) for i, info in enumerate(infos)
             for instance in info['instances']]
    boxes = _array([instance['bbox'] for _, instance in found], 4)
    return Annotations(
        labels=np.array([instance['bbox_label'] for _, instance in found],
                        int),
        names=None,
        image_ids=[info['img_id'] for info in infos],
        paths=[info['img_path'] for info in infos],
        sizes=_array([(info['height'], info['width']) for info in infos], 2),
        ids=[infos[i]['img_id'] for i, _ in found],
        boxes=boxes,
        image=np.array([i for i, _ in found], int),
        area=(boxes[:, 2:] - boxes[:, :2]).prod(1),
        crowd=np.array([instance['ignore_flag'] for _, instance in found],
                       bool),
        incomplete=[],
        no_crowd_flag=[],
        **_settings(dataset))


def _settings(dataset) -> dict:
    return dict(
        file=str(dataset.ann_file),
        classes=dataset.metainfo['classes'],
        filter_empty=bool((dataset.filter_cfg or {}).get('filter_empty_gt')),
        test_mode=dataset.test_mode,
        partial=getattr(dataset, '_indices', None) is not None,
        backend_args=dataset.backend_args)


def _array(rows: list, width: int) -> np.ndarray:
    return np.array(rows, float).reshape(-1, width)


def _complete(entries: List[dict], fields: Tuple[str, ...],
              kind: str) -> Tuple[List[dict], List[str]]:
    """The entries with all fields, and a message for each of the others."""
    good, bad = [], []
    for entry in entries:
        wrong = [
            field for field in fields
            if field not in entry or not _is_sound(field, entry[field])
        ]
        if wrong:
            bad.append(f'{kind} {entry.get("id", "without id")}: '
                       f'{", ".join(wrong)}')
        else:
            good.append(entry)
    return good, bad


def _is_sound(field: str, value) -> bool:
    if field == 'bbox':
        return (isinstance(value, (list, tuple)) and len(value) == 4
                and all(isinstance(n, Real) and isfinite(n) for n in value))
    return field not in ('height', 'width', 'area') or isinstance(value, Real)
