"""Checks of annotation files, alone and together; each returns findings."""
import os.path as osp
from functools import partial
from typing import Iterable, List, Sequence

import numpy as np

from ..scaling import MAX_PER_IMG
from ..utils import shorten
from .annotations import NOT_IN_FILE, Annotations
from .findings import Finding, find

MIN_BOXES = 10  # of a class, below which it cannot be learned
MIN_FAULTS = 10  # below which a fault does not spoil a whole training
NAMES = ('class_names', 'category_names', 'category_ids')
# Checks that matter only where the evaluation reads the file by itself
OF_EVALUATION = ('iscrowd', 'zero_id', 'text_id')


def _check_categories(data: Annotations) -> List[Finding]:
    """Checks that the categories of a file are the classes of a config."""
    classes, categories, file = data.classes, data.categories, data.file
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
    found += _check_categories(data)
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
        boxes = boxes[:len(boxes) if len(boxes) > least else 0]
        return find(name, boxes, data.example, file=data.file, total=total)

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
    index, same = np.flatnonzero(mask), mask.copy()
    rows = np.column_stack([data.image, data.labels, data.boxes])[index]
    same[index[np.unique(rows, axis=0, return_index=True)[1]]] = False
    return same


def check_splits(train: Sequence[Annotations],
                 val: Sequence[Annotations]) -> List[Finding]:
    """Checks what is left to train on and to detect, in all files together."""
    first, second = ([*parts[0].classes] if parts else []
                     for parts in (train, val))
    found, values = [], dict(train=shorten(first), val=shorten(second))
    # A label has to mean the same in both.
    if first != second and sorted(first) == sorted(second):
        found.append(Finding('class_order', **values))
    if val and not any(part.usable.any() for part in val):
        found.append(Finding('no_validation_boxes', file=_files(val)))
    if train:
        labels = [part.labels[part.usable] for part in train]
        counts = np.bincount(np.concatenate(labels), minlength=len(first))
        if not counts.sum():
            names = dict(file=_files(train), classes=values['train'])
            return [*found, Finding('no_boxes', **names)]
        few = [(name, n) for name, n in zip(first, counts) if n < MIN_BOXES]
        found += find(
            'few_boxes',
            few,
            lambda row: '{!r}: {} boxes'.format(*row),
            file=_files(train),
            least=MIN_BOXES)
    partly = {}  # by path, whether indices chose it from each of its files
    for part in train:
        if part.filter_empty and not part.test_mode:
            empty = np.flatnonzero(part.usable_per_image == 0)
            found += find(
                'filtered', [part.paths[i] for i in empty],
                osp.basename,
                file=part.file,
                total=len(part.paths))
        for path in map(osp.normpath, part.paths):
            partly[path] = partly.get(path, True) and part.partial
    shared = [
        path for part in val for path in map(osp.normpath, part.paths)
        # Indices may choose images of one file for each of the two.
        if path in partly and not (part.partial and partly[path])
    ]
    total = sum(len(part.paths) for part in val)
    return found + find('overlap', shared, total=total)


def _files(parts: Sequence[Annotations]) -> str:
    return ', '.join(part.file for part in parts)


def check_evaluated(images: dict, val: Sequence[Annotations]) -> List[Finding]:
    """Checks that an evaluation has the images of the validation set.

    Args:
        images (dict): The file's entries by id, as pycocotools has them.
        val (Sequence[Annotations]): Files of the validation.
    """
    names = {id_: osp.basename(i['file_name']) for id_, i in images.items()}
    pairs = [(id_, osp.basename(path)) for part in val
             if part.categories is not None
             for id_, path in zip(part.image_ids, part.paths)]
    other = [
        f'id {id_}: {name}' for id_, name in pairs if names.get(id_) != name
    ]
    fatal = len(other) == len(pairs) or any(i not in names for i, _ in pairs)
    return find(
        'evaluator',
        other,
        error=fatal,
        total=len(pairs),
        right=val[0].file if val else '')
