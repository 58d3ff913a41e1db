"""Checks of annotation files and images; each returns findings."""
import os.path as osp
import sys
from functools import partial
from typing import Iterable, List, Sequence

import mmcv
import numpy as np
from mmengine.fileio import get
from mmengine.utils import track_iter_progress

from ..scaling import MAX_PER_IMG
from ..utils import shorten
from .annotations import NOT_IN_FILE, Annotations, Category
from .findings import Finding, find

MIN_FAULTS = 10  # below which a fault does not spoil a whole training
NAMES = ('class_names', 'category_names', 'category_ids')
# Checks that matter only where the evaluation reads the file by itself
OF_EVALUATION = ('iscrowd', 'zero_id', 'text_id')


def check_categories(classes: Sequence[str], categories: Sequence[Category],
                     file: str) -> List[Finding]:
    """Checks that the categories of a file are the classes of a config."""
    wanted = [c for c in categories if c.name in classes]
    used = {c.id for c in wanted}  # of the others, nothing is read

    def show(name: str) -> str:
        return f'{name!r}: ids {[c.id for c in wanted if c.name == name]}'

    names = _repeated(c.name for c in wanted)
    ids = _repeated(c.id for c in categories if c.id in used)
    values = dict(
        classes=shorten(classes), names=shorten([c.name for c in categories]))
    # MMDetection numbers classes in the order of the file.
    other = not names and list(classes) != [c.name for c in wanted]
    return [
        *find('category_names', names, show, file=file),
        *find('category_ids', ids, 'id {!r}'.format, file=file),
        *find('class_names', ('', ) * other, file=file, **values)
    ]


def check_file(data: Annotations) -> List[Finding]:
    """Checks the names, ids and fields of one annotation file."""
    find_here = partial(find, file=data.file)
    unlisted = np.flatnonzero(data.labels == NOT_IN_FILE)
    found = [
        # A few boxes may be meant to be ignored.
        *find_here('category_id', unlisted, data.example,
                   len(unlisted) > len(data.labels) / 2),
        *find_here('fields', data.incomplete),
        *find_here('no_images', ('', ) * (not data.paths)),
        *find_here('no_image', np.flatnonzero(data.image < 0), data.example)
    ]
    if data.categories is None:  # files of VOC have names, but no ids
        return found
    found += check_categories(data.classes, data.categories, data.file)
    # MMDetection reads an image once that is listed twice.
    images = dict.fromkeys(zip(data.image_ids, data.paths))
    show_id = 'id {}'.format
    found += find_here('image_id', _repeated(i for i, _ in images), show_id)
    found += find_here('same_image', _repeated(path for _, path in images))
    found += find_here('annotation_id', _repeated(data.ids), show_id)
    if data.test_mode:
        unflagged = data.no_crowd_flag & (data.labels >= 0)
        found += find_here('iscrowd', data.ids[unflagged])
        found += find_here('zero_id', data.ids[data.ids == 0], show_id)
        texts = [i for i in data.ids if isinstance(i, str) and not i.isdigit()]
        found += find_here('text_id', texts, 'id {!r}'.format)
    return found


def _repeated(values: Iterable) -> list:
    seen = set()
    return [value for value in values if value in seen or seen.add(value)]


def check_boxes(data: Annotations,
                max_per_img: int = MAX_PER_IMG) -> List[Finding]:
    """Checks the boxes of one annotation file.

    All findings are warnings, because the other boxes can be trained on,
    except for boxes in another format.
    """
    wanted, sides, limits = data.wanted, data.sides, data.limits
    total = max(1, int(wanted.sum()))

    def find_boxes(name: str, mask: np.ndarray, least: float = 0) -> list:
        boxes = np.flatnonzero(mask & wanted)
        return find(
            name,
            boxes if len(boxes) > least else (),
            data.example,
            file=data.file,
            total=total)

    beyond = np.maximum(-data.boxes[:, :2], data.boxes[:, 2:] - limits)
    outside = (beyond > 1).any(1)
    # The third and fourth number, if they are taken for a corner
    corners = (sides > data.boxes[:, :2]).all(1) & (sides <= limits + 1).all(1)
    if data.categories is not None and corners[wanted].sum() > 0.99 * total:
        found = find_boxes('box_format', outside, max(total / 5, MIN_FAULTS))
        if found:
            return found
    sound = (sides >= 1).all(1)
    huge = sound & (data.visible >= 0.95 * limits).all(1)
    per_image = data.usable_per_image
    return [
        *find_boxes('inverted', (sides < 0).any(1)),
        *find_boxes('empty', (sides >= 0).all(1) & ~sound),
        *find_boxes('area', sound & (data.area <= 0)),
        *find_boxes('outside', sound & ~huge & outside),
        *find_boxes('ignored', data.crowd & (not data.test_mode)),
        # Close-ups are common in photographs of products.
        *find_boxes('huge', huge, 0.02 * total),
        *find_boxes('duplicate', _duplicates(data, sound & wanted)),
        *find(
            'max_per_img',
            np.flatnonzero(per_image > max_per_img),
            lambda i: f'{osp.basename(data.paths[i])}: {per_image[i]} boxes',
            file=data.file,
            limit=max_per_img,
            most=per_image.max(initial=0))
    ]


def _duplicates(data: Annotations, mask: np.ndarray) -> np.ndarray:
    """Mask ``(M, )`` of boxes that repeat an earlier one of the mask."""
    index = np.flatnonzero(mask)
    rows = np.column_stack([data.image, data.labels, data.boxes])[index]
    order = np.lexsort(rows.T)  # keeps the order of equal rows
    rows, same = rows[order], np.zeros(len(mask), bool)
    same[index[order[1:]]] = (rows[1:] == rows[:-1]).all(1)
    return same


def check_images(data: Annotations, progress: bool = False) -> List[Finding]:
    """Reads all images that are not left out; this is the slow part."""
    needed = list(range(len(data.paths)))
    if data.filter_empty and not data.test_mode:
        needed = np.unique(data.image[data.wanted]).tolist()
    lists = dict(missing=[], unreadable=[], image_size=[])
    for i in (track_iter_progress(needed, file=sys.stderr)
              if progress and needed else needed):
        path, (height, width) = data.paths[i], data.sizes[i]
        try:
            image = mmcv.imfrombytes(get(path, data.backend_args))
        except FileNotFoundError:
            lists['missing'].append(path)
            continue
        except Exception:  # every library raises its own
            image = None
        if image is None:
            lists['unreadable'].append(path)
        elif image.shape[:2] != (height, width):
            lists['image_size'].append(
                f'{path}: {image.shape[1]}x{image.shape[0]}, the file says '
                f'{width:g}x{height:g}')
    # Of COCO's files, indices may leave out these very images.
    fatal = dict.fromkeys(lists, data.categories is None or not data.partial)
    fatal['image_size'] = len(lists['image_size']) > max(
        len(needed) / 2, MIN_FAULTS)
    values = dict(file=data.file, total=len(needed))
    return [
        finding for name, faults in lists.items()
        for finding in find(name, faults, error=fatal[name], **values)
    ]
