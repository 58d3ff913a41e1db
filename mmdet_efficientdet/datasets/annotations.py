"""Annotation files as arrays, with what MMDetection drops silently."""
import os.path as osp
from functools import cached_property
from math import isfinite
from mmap import ACCESS_READ, mmap
from typing import (Any, Generic, Iterable, Iterator, List, Optional, Sequence,
                    Tuple, TypeVar, Union)

import msgspec
import numpy as np
from mmdet.datasets import BaseDetDataset, CocoDataset
from mmengine.fileio import get_local_path, load
from msgspec import json

from ..utils import shown
from .class_names import reads_like

NOT_WANTED, NOT_IN_FILE = -1, -2  # labels of boxes of other categories
Id = Union[int, float, str]
Entry = TypeVar('Entry')


class Category(msgspec.Struct):
    """The fields of a category that are read."""
    id: Optional[Id]
    name: Any


class Image(msgspec.Struct, gc=False):
    """The fields of an image that are read."""
    id: Id
    file_name: str
    height: float
    width: float


class Box(msgspec.Struct, gc=False):
    """The fields of an annotation that are read; masks are not."""
    id: Id
    image_id: Optional[Id]
    category_id: Optional[Id]
    bbox: Tuple[float, float, float, float]  # x, y, width, height
    area: float
    iscrowd: Any = None
    ignore: Any = None


class CocoFile(msgspec.Struct, Generic[Entry]):
    """A file of COCO, whose images and boxes are decoded one by one."""
    categories: List[Category]
    images: List[Entry]
    annotations: List[Entry] = []


# A box, with the fields of Annotations
ROW = np.dtype([('ids', 'O'), ('image', 'i4'), ('labels', 'i4'),
                ('boxes', 'f8', 4), ('area', 'f8'), ('crowd', '?'),
                ('no_crowd_flag', '?')])


class Annotations:
    """One annotation file: N images, M boxes.

    Args:
        dataset (BaseDetDataset): Of MMDetection.
        images (Sequence[tuple]): N of (id, path, height, width).
        rows (Iterable[tuple]): M of the fields of ``ROW``.

    Attributes:
        file (str): Path of the annotation file.
        classes (Sequence[str]): Classes of the config.
        categories (list[Category], optional): Of the file, in its order;
            None where the format lists none.
        image_ids (list): N ids.
        paths (list[str]): N paths of images.
        sizes (np.ndarray): ``(N, 2)``, height and width as the file says.
        ids (np.ndarray): ``(M, )`` ids of boxes; for VOC, of their images.
        boxes (np.ndarray): ``(M, 4)``, (x1, y1, x2, y2) in pixels.
        image (np.ndarray): ``(M, )``, index of each box's image, or -1.
        labels (np.ndarray): ``(M, )``, from 0, ``NOT_WANTED`` for a category
            that the config leaves out, ``NOT_IN_FILE`` for one that the file
            does not list.
        area (np.ndarray): ``(M, )``, as the file says.
        crowd (np.ndarray): ``(M, )`` bool.
        no_crowd_flag (np.ndarray): ``(M, )`` bool, boxes without ``iscrowd``,
            which training does not need.
        incomplete (list[str]): Images and boxes without a needed field.
        filter_empty (bool): Whether images without boxes are left out.
        test_mode (bool): Whether nothing is left out.
        partial (bool): Whether ``indices`` choose some of the images.
        backend_args (dict, optional): How MMDetection reads the files.
    """

    def __init__(self, dataset, images: Sequence[tuple],
                 rows: Iterable[tuple]) -> None:
        rows = np.fromiter(rows, ROW)
        vars(self).update((name, rows[name].copy()) for name in ROW.names)
        self.image_ids = [image[0] for image in images]
        self.paths = [image[1] for image in images]
        self.sizes = np.array([i[2:] for i in images], float).reshape(-1, 2)
        self.file = str(dataset.ann_file)
        self.classes = dataset.metainfo.get('classes', ())
        self.filter_empty = bool((dataset.filter_cfg
                                  or {}).get('filter_empty_gt'))
        self.test_mode = dataset.test_mode
        self.partial = getattr(dataset, '_indices', None) is not None
        self.backend_args = dataset.backend_args
        self.categories, self.incomplete = None, ()

    @cached_property
    def wanted(self) -> np.ndarray:
        """Mask ``(M, )`` of the boxes of the config's classes."""
        return (self.labels >= 0) & (self.image >= 0)

    @cached_property
    def usable(self) -> np.ndarray:
        """Mask ``(M, )`` of what MMDetection keeps, without crowds."""
        return (self.wanted & ~self.crowd & ~(self.area <= 0)
                & (self.visible > 0).all(1) & (self.sides >= 1).all(1))

    @property
    def usable_per_image(self) -> np.ndarray:
        """Number ``(N, )`` of usable boxes."""
        return np.bincount(self.image[self.usable], minlength=len(self.paths))

    @property
    def sides(self) -> np.ndarray:
        """Width and height ``(M, 2)`` of the boxes."""
        return self.boxes[:, 2:] - self.boxes[:, :2]

    @property
    def visible(self) -> np.ndarray:
        """Width and height ``(M, 2)`` of the part inside the image."""
        return np.minimum(self.boxes[:, 2:], self.limits) - np.maximum(
            self.boxes[:, :2], 0)

    @property
    def limits(self) -> np.ndarray:
        """Width and height ``(M, 2)`` of each box's image."""
        none = [[0, 0]]  # at index -1
        return np.concatenate([self.sizes, none])[self.image][:, ::-1]

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
        dataset (BaseDetDataset): Of a ``CocoDataset`` the file is read; of
            other kinds, what MMDetection has made of it.

    Returns:
        Annotations: None for datasets of other projects.
    """
    if not isinstance(dataset, BaseDetDataset):
        return None
    return (_read_coco if reads_like(dataset, CocoDataset) else _read_parsed)(
        dataset)


def _map_file(file: str, backend_args: Optional[dict]) -> mmap:
    """The bytes of a file, which are mapped and not copied into memory."""
    with get_local_path(file, backend_args=backend_args) as path:
        with open(path, 'rb') as raw:
            return mmap(raw.fileno(), 0, access=ACCESS_READ)


def _read_coco(dataset) -> Annotations:
    file, backend_args = dataset.ann_file, dataset.backend_args
    try:
        content = json.decode(
            _map_file(file, backend_args), type=CocoFile[msgspec.Raw])
    except msgspec.DecodeError:  # strict JSON has no NaN
        content = msgspec.convert(
            load(file, backend_args=backend_args), CocoFile[Any])
    incomplete = []
    return _from_entries(dataset, content.categories,
                         _complete(content.images, Image, incomplete),
                         _complete(content.annotations, Box, incomplete),
                         incomplete)


def _complete(entries: list, kind: type, incomplete: List[str]) -> Iterator:
    """The entries with all fields; of each of the others, a message."""
    name = 'image' if kind is Image else 'annotation'
    decode = json.Decoder(kind).decode
    for number, entry in enumerate(entries, 1):
        if isinstance(entry, msgspec.Raw):
            try:
                yield decode(entry)
                continue
            except msgspec.ValidationError:  # has not seen the whole entry
                entry = json.decode(entry)
        try:
            item = msgspec.convert(entry, kind)
            numbers = item.bbox if kind is Box else (item.height, item.width)
            if not all(map(isfinite, numbers)):
                raise msgspec.ValidationError(f'not finite: {item}')
            yield item
        except msgspec.ValidationError as error:
            id_ = entry.get('id') if isinstance(entry, dict) else None
            where = f'number {number}' if id_ is None else shown(id_)
            incomplete.append(f'{name} {where}: {error}')


def _from_entries(dataset, categories: List[Category], images: Iterable[Image],
                  boxes: Iterable[Box], incomplete: List[str]) -> Annotations:
    prefix = dataset.data_prefix.get('img', '')
    images = [(image.id, osp.join(prefix,
                                  image.file_name), image.height, image.width)
              for image in images]
    position = {image[0]: i for i, image in enumerate(images)}
    label = {category.id: NOT_WANTED for category in categories}
    # MMDetection numbers classes in the order of the file.
    kept = [c.id for c in categories if c.name in dataset.metainfo['classes']]
    label.update((key, i) for i, key in enumerate(kept))
    rows = ((box.id, position.get(box.image_id, -1),
             label.get(box.category_id, NOT_IN_FILE), box.bbox, box.area,
             bool(box.iscrowd or box.ignore), box.iscrowd is None)
            for box in boxes)
    data = Annotations(dataset, images, rows)
    data.boxes[:, 2:] += data.boxes[:, :2]
    data.categories = categories
    data.incomplete = incomplete  # filled while the rows were read
    return data


def _read_parsed(dataset) -> Annotations:
    """What MMDetection has read; of VOC, it drops other classes only."""
    dataset.full_init()
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    images = [(info['img_id'], info['img_path'], info['height'], info['width'])
              for info in infos]
    rows = ((info['img_id'], i, instance['bbox_label'], instance['bbox'], 1,
             instance['ignore_flag'], False) for i, info in enumerate(infos)
            for instance in info['instances'])
    data = Annotations(dataset, images, rows)
    data.area = data.sides.prod(1)
    return data
