"""Checks of annotation files and images; each returns findings."""
import os.path as osp
import sys
from typing import Iterable, List, NamedTuple, Sequence, Tuple

import mmcv
import numpy as np
from mmengine.fileio import get, load
from mmengine.utils import ProgressBar

from .hooks import check_class_names, shorten
from .raw_annotations import NOT_IN_FILE, Annotations

MIN_BOXES = 10  # of a class, below which it cannot be learned
MIN_FAULTS = 10  # below which a fault does not spoil a whole training
# Checks that matter only where the evaluation reads the file by itself
OF_EVALUATION = ('iscrowd', 'zero_id')


class Finding(NamedTuple):
    """One kind of fault.

    ``error`` is True for what will surely fail or train to nothing; other
    findings are warnings. ``name`` is the name of the check, ``count`` tells
    how often it was found.
    """
    error: bool
    name: str
    count: int
    text: str
    fix: str
    examples: Tuple[str, ...] = ()

    def __str__(self) -> str:
        level = 'ERROR' if self.error else 'WARNING'
        return '\n'.join([
            f'{level} {self.name}: {self.text}',
            *(f'    {example}' for example in self.examples),
            f'  fix: {self.fix}'
        ])


def verdict(findings: Sequence[Finding]) -> str:
    """The last line of a report."""
    errors = sum(finding.error for finding in findings)
    if errors:
        return (f'VERDICT: this training will fail (errors: {errors}, '
                f'warnings: {len(findings) - errors})')
    if findings:
        return f'VERDICT: it can train (warnings: {len(findings)})'
    return 'VERDICT: nothing was found'


def check_file(data: Annotations) -> List[Finding]:
    """Checks names, ids and fields of one annotation file."""
    found = []

    def add(error, name, faults, text, fix, show=str):
        if len(faults):
            found.append(
                Finding(error, name, len(faults),
                        f'{data.file}: {len(faults)} {text}', fix,
                        tuple(show(fault) for fault in faults[:3])))

    if data.names is not None:
        try:
            check_class_names(data.classes, data.names, data.file)
        except ValueError as error:
            found.append(
                Finding(
                    True, 'class_names', 1, str(error),
                    f'scale_config(..., classes=...) of {shorten(data.names)}')
            )
    unlisted = np.flatnonzero(data.labels == NOT_IN_FILE)
    # A few may be meant to be ignored.
    add(
        len(unlisted) > len(data.labels) / 2, 'category_id', unlisted,
        'boxes have a category_id that the file does not list, and are '
        'dropped', 'write the ids of "categories", which may begin at 0 or at '
        '1', data.example)
    add(True, 'fields', data.incomplete, 'entries lack a field',
        'write the field; area is width x height')
    if data.names is not None:  # files of VOC have no ids, but names
        # An image that is listed twice is read once.
        images = dict.fromkeys(zip(data.image_ids, data.paths))
        add(
            True, 'image_id', _repeated(f'id {id_}' for id_, _ in images),
            'images have the id of another one, so that their boxes are mixed '
            'up', 'number the images anew')
        add(
            False, 'same_image', _repeated(path for _, path in images),
            'images are listed again with another id, without the boxes of '
            'the first', 'give each image one id, and its boxes that id')
        add(
            True, 'annotation_id', _repeated(f'id {id_}' for id_ in data.ids),
            'annotations have the id of another one, which MMDetection '
            'refuses', 'number the annotations anew, from 1')
    add(False, 'no_image', np.flatnonzero(data.image < 0),
        'boxes are of an image that the file does not list',
        'list the images, or remove the boxes', data.example)
    if data.test_mode and data.names is not None:
        add(True, 'iscrowd', data.no_crowd_flag,
            'annotations have no iscrowd, without which evaluation stops',
            'write "iscrowd": 0')
        add(
            False, 'zero_id', [0] * data.ids.count(0),
            "annotation has the id 0, with which COCO's evaluation counts "
            'its box as not found', 'number the annotations from 1',
            'id {}'.format)
    return found


def _repeated(names: Iterable[str]) -> List[str]:
    seen = set()
    return [name for name in names if name in seen or seen.add(name)]


def check_boxes(data: Annotations, max_per_img: int = 100) -> List[Finding]:
    """Checks the boxes of one annotation file.

    Findings are warnings, since the other boxes can be learned from, but for
    boxes of another format.
    """
    found = []
    total = max(1, int(data.wanted.sum()))

    def add(name, mask, text, fix, least=0.0):
        index = np.flatnonzero(mask & data.wanted)
        if len(index) > least * total:
            found.append(
                Finding(False, name, len(index),
                        f'{data.file}: {len(index)} of {total} boxes {text}',
                        fix, tuple(data.example(i) for i in index[:3])))

    boxes, sides, limits = data.boxes, data.sides, data.limits
    over = np.maximum(-boxes[:, :2], boxes[:, 2:] - limits).max(
        1, initial=-np.inf)
    # Taken for (x1, y1, x2, y2), the third and fourth number are corners.
    as_corners = (sides > boxes[:, :2]).all(1) & (sides <= limits + 1).all(1)
    sound = (sides >= 1).all(1)
    reaching_out = int((over > 1)[data.wanted].sum())
    if (data.names is not None and reaching_out > max(total / 5, MIN_FAULTS)
            and as_corners[data.wanted].mean() > 0.99):
        found.append(
            Finding(
                True, 'box_format', reaching_out,
                f'{data.file}: the boxes seem to be (x1, y1, x2, y2); COCO '
                'has (x1, y1, width, height)', 'subtract x1 and y1 from the '
                'last two numbers',
                tuple(data.example(i) for i in np.flatnonzero(over > 1)[:3])))
        return found
    add('inverted', (sides < 0).any(1), 'have a negative side',
        'order the corners: x1 < x2, y1 < y2')
    add('empty', (sides >= 0).all(1) & ~sound,
        'are thinner than 1 pixel, and dropped', 'remove or correct them')
    add('area', sound & (data.area <= 0),
        'have no area in the file, and are dropped',
        'write area = width x height')
    inside = np.minimum(boxes[:, 2:], limits) - np.maximum(boxes[:, :2], 0)
    huge = sound & (inside >= 0.95 * limits).all(1)
    add(
        'outside', sound & ~huge & (over > 1), 'reach out of their image',
        'clip them; if they are many, compare sizes, order of coordinates, '
        'and whether the first two are a corner, not the centre')
    # Close-ups are common in photographs of things.
    add('huge', huge, 'cover all of their image',
        'correct them, if these are no close-ups', 0.02)
    rows = np.column_stack([data.image, data.labels, boxes])
    rows = rows[sound & data.wanted]
    order = np.lexsort(rows.T) if len(rows) else []
    same = np.zeros(len(rows), bool)
    same[order[1:]] = (rows[order[1:]] == rows[order[:-1]]).all(1)
    twice = np.zeros(len(boxes), bool)
    twice[np.flatnonzero(sound & data.wanted)[same]] = True
    add('duplicate', twice, 'stand in the file already, with the same class',
        'remove them')
    per_image = np.bincount(data.image[data.usable], minlength=len(data.paths))
    many = np.flatnonzero(per_image > max_per_img)
    if len(many):
        found.append(
            Finding(
                False, 'max_per_img', len(many),
                f'{data.file}: {len(many)} images have more than {max_per_img}'
                ' boxes, the most that are detected',
                f'model.test_cfg.max_per_img={per_image.max()}; AP of COCO '
                'counts the best 100 nevertheless',
                tuple(f'{osp.basename(data.paths[i])}: {per_image[i]} boxes'
                      for i in many[:3])))
    return found


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


def check_images(data: Annotations, progress: bool = False) -> List[Finding]:
    """Reads all images that are not left out; this is the slow part."""
    lists = dict(missing=[], unreadable=[], image_size=[])
    needed = np.ones(len(data.paths), bool)
    if data.filter_empty and not data.test_mode:
        needed = np.bincount(
            data.image[data.wanted], minlength=len(data.paths)) > 0
    bar = None
    if progress and needed.any():
        bar = ProgressBar(int(needed.sum()), file=sys.stderr)
    for i in np.flatnonzero(needed):
        path, size = data.paths[i], data.sizes[i]
        try:
            image = mmcv.imfrombytes(get(path, data.backend_args))
        except FileNotFoundError:
            lists['missing'].append(path)
        except Exception:  # every library has its own for what is no image
            lists['unreadable'].append(path)
        else:
            if image is None:
                lists['unreadable'].append(path)
            elif image.shape[:2] != tuple(size):
                height, width = image.shape[:2]
                lists['image_size'].append(
                    f'{path}: {width}x{height}, the file says '
                    f'{size[1]:g}x{size[0]:g}')
        if bar:
            bar.update()
    if bar:
        print(file=sys.stderr)
    # Of COCO's files, indices may leave these very images out.
    fatal = data.names is None or not data.partial
    words = dict(
        missing=(fatal, 'are missing', 'correct data_root or data_prefix.img'),
        unreadable=(fatal, 'cannot be read', 'replace or leave them out'),
        image_size=(len(lists['image_size']) > max(needed.sum() / 2,
                                                   MIN_FAULTS),
                    'are of another size than the file says',
                    'correct width and height, and boxes; a camera may have '
                    'turned the image by its EXIF tag'))
    return [
        Finding(
            words[name][0], name, len(paths),
            f'{data.file}: {len(paths)} of {needed.sum()} images '
            f'{words[name][1]}', words[name][2], tuple(paths[:3]))
        for name, paths in lists.items() if paths
    ]
