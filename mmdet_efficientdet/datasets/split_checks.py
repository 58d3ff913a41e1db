"""Checks of the training and the validation data together."""
import os.path as osp
from typing import Any, List, Sequence

import numpy as np

from ..utils import shorten
from .annotations import Annotations, CocoFile, decode_file
from .findings import Finding, find

MIN_BOXES = 10  # of a class, below which it cannot be learned


def check_training_set(parts: Sequence[Annotations]) -> List[Finding]:
    """Checks what is left to train on, in all files together."""
    if not parts:
        return []
    classes, files = parts[0].classes, ', '.join(part.file for part in parts)
    counts = sum(
        np.bincount(part.labels[part.usable], minlength=len(classes))
        for part in parts)
    if not counts.sum():
        return [Finding('no_boxes', file=files)]
    few = [(name, n) for name, n in zip(classes, counts) if n < MIN_BOXES]
    found = find(
        'few_boxes',
        few,
        lambda item: f'{item[0]!r}: {item[1]} boxes',
        file=files,
        least=MIN_BOXES)
    for part in parts:
        if part.filter_empty and not part.test_mode:
            found += find(
                'filtered',
                np.flatnonzero(part.usable_per_image == 0),
                lambda i, part=part: osp.basename(part.paths[i]),
                file=part.file,
                total=len(part.paths))
    return found


def check_validation_set(parts: Sequence[Annotations]) -> List[Finding]:
    """Checks that there is something to detect."""
    if not parts or any(part.usable.any() for part in parts):
        return []
    files = ', '.join(part.file for part in parts)
    return [Finding('no_validation_boxes', file=files)]


def check_class_order(train: Sequence[Annotations],
                      val: Sequence[Annotations]) -> List[Finding]:
    """Checks that a label means the same in training and validation."""
    if not train or not val:
        return []
    first, second = list(train[0].classes), list(val[0].classes)
    if first == second or sorted(first) != sorted(second):
        return []
    return [Finding('class_order', train=shorten(first), val=shorten(second))]


def check_evaluated(file: str, val: Sequence[Annotations]) -> List[Finding]:
    """Checks that an evaluation reads the file of the validation set."""
    val = [part for part in val if part.categories is not None]
    if not val or any(
            osp.abspath(part.file) == osp.abspath(file) for part in val):
        return []
    values = dict(file=file, right=val[0].file)
    try:
        images = decode_file(file, CocoFile[Any], val[0].backend_args).images
        names = {i['id']: osp.basename(i['file_name']) for i in images}
    except (OSError, ValueError, TypeError, KeyError) as error:
        problem = f'cannot be read: {type(error).__name__}: {error}'
        return [Finding('evaluator', error=True, problem=problem, **values)]
    pairs = [(id_, osp.basename(path)) for part in val
             for id_, path in zip(part.image_ids, part.paths)]
    other = [
        f'id {id_}: {name}' for id_, name in pairs if names.get(id_) != name
    ]
    problem = (f'does not have {len(other)} of {len(pairs)} images of the '
               'validation')
    fatal = len(other) == len(pairs) or any(i not in names for i, _ in pairs)
    return find('evaluator', other, error=fatal, problem=problem, **values)


def check_overlap(train: Sequence[Annotations],
                  val: Sequence[Annotations]) -> List[Finding]:
    """Checks that no image is for training and for validation."""
    partly = {}  # by path, whether indices chose it from each of its files
    for part in train:
        for path in map(osp.normpath, part.paths):
            partly[path] = partly.get(path, True) and part.partial
    shared = [
        path for part in val for path in map(osp.normpath, part.paths)
        # Indices may choose images of one file for each of the two.
        if path in partly and not (part.partial and partly[path])
    ]
    total = sum(len(part.paths) for part in val)
    return find('overlap', shared, total=total)
