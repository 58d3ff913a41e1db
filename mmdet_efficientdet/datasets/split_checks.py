"""Checks of the training and the validation data together."""
import os.path as osp
from typing import List, Sequence

import numpy as np
from mmengine.fileio import load

from ..utils import shorten
from .annotation_checks import Finding
from .annotations import Annotations

MIN_BOXES = 10  # of a class, below which it cannot be learned


def check_training_set(parts: Sequence[Annotations]) -> List[Finding]:
    """Checks what is left to learn from, of all files together."""
    if not parts:
        return []
    classes, files = parts[0].classes, ', '.join(part.file for part in parts)
    counts = sum(
        np.bincount(part.labels[part.usable], minlength=len(classes))
        for part in parts)
    if not counts.sum():
        return [
            Finding(True, 'no_boxes', 1,
                    f'{files}: no box is left to learn from',
                    'compare classes, ids, sizes and boxes of the file')
        ]
    found = []
    few = [(name, n) for name, n in zip(classes, counts) if n < MIN_BOXES]
    if few:
        found.append(
            Finding(
                False, 'few_boxes', len(few),
                f'{files}: {len(few)} classes have fewer than {MIN_BOXES} '
                'boxes', 'annotate more, or leave these classes out',
                tuple(f'{name!r}: {n} boxes' for name, n in few[:3])))
    for part in parts:
        empty = np.bincount(
            part.image[part.usable], minlength=len(part.paths)) == 0
        if part.filter_empty and not part.test_mode and empty.any():
            index = np.flatnonzero(empty)
            found.append(
                Finding(
                    False, 'filtered', len(index),
                    f'{part.file}: {len(index)} of {len(part.paths)} images '
                    'without boxes are left out', 'filter_cfg=dict('
                    'filter_empty_gt=False) learns background from them',
                    tuple(osp.basename(part.paths[i]) for i in index[:3])))
    return found


def check_validation_set(parts: Sequence[Annotations]) -> List[Finding]:
    """Checks that there is something to find."""
    if not parts or any(part.usable.any() for part in parts):
        return []
    return [
        Finding(
            False, 'no_validation_boxes', 1,
            f'{", ".join(part.file for part in parts)}: no box is left to be '
            'found, so that AP will be -1',
            'compare classes, ids, sizes and boxes of the file')
    ]


def check_class_order(train: Sequence[Annotations],
                      val: Sequence[Annotations]) -> List[Finding]:
    """Checks that a label means the same in training and validation."""
    if not train or not val:
        return []
    first, second = list(train[0].classes), list(val[0].classes)
    if first == second or sorted(first) != sorted(second):
        return []
    return [
        Finding(
            True, 'class_order', 1,
            f'{shorten(first)} in training are {shorten(second)} in '
            'validation', 'give both data sets the same metainfo.classes, as '
            'scale_config(..., classes=...) does')
    ]


def check_evaluated(file: str, val: Sequence[Annotations]) -> List[Finding]:
    """Checks that an evaluation reads the file of the validation set."""
    val = [part for part in val if part.names is not None]
    if not val or any(
            osp.abspath(part.file) == osp.abspath(file) for part in val):
        return []
    fix = f'val_evaluator.ann_file={val[0].file!r}'
    try:
        images = load(file, backend_args=val[0].backend_args)['images']
        names = {i['id']: osp.basename(i['file_name']) for i in images}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [
            Finding(
                True, 'evaluator', 1, f'{file}, which val_evaluator reads: '
                f'{type(error).__name__}: {error}', fix)
        ]
    pairs = [(id_, osp.basename(path)) for part in val
             for id_, path in zip(part.image_ids, part.paths)]
    other = [
        f'id {id_}: {name}' for id_, name in pairs if names.get(id_) != name
    ]
    if not other:
        return []
    missing = any(id_ not in names for id_, _ in pairs)
    return [
        Finding(
            missing or len(other) == len(pairs), 'evaluator', len(other),
            f'{len(other)} of {len(pairs)} images of the validation are not '
            f'those of {file}, which val_evaluator reads', fix,
            tuple(other[:3]))
    ]


def check_overlap(train: Sequence[Annotations],
                  val: Sequence[Annotations]) -> List[Finding]:
    """Checks that no image is for training and for validation."""
    seen, shared, number = {}, [], 0
    for part in train:
        for path in part.paths:
            path = osp.normpath(path)
            seen[path] = seen.get(path, True) and part.partial
    for part in val:
        number += len(part.paths)
        for path in map(osp.normpath, part.paths):
            # Of one file, indices may choose images for each of the two.
            if path in seen and not (part.partial and seen[path]):
                shared.append(path)
    if not shared:
        return []
    return [
        Finding(
            False, 'overlap', len(shared),
            f'{len(shared)} of {number} images of the validation are '
            'trained on, so that AP says nothing', 'split the data by images',
            tuple(shared[:3]))
    ]
