"""Checks of annotation files and images; each returns findings."""
import os.path as osp
import sys
from typing import Iterable, List, NamedTuple, Sequence, Tuple

import mmcv
import numpy as np
from mmengine.fileio import get
from mmengine.utils import ProgressBar

from ..utils import shorten
from .annotations import NOT_IN_FILE, Annotations
from .class_names import check_class_names

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
