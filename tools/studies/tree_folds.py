"""Folds by place of the trees of prepare_trees.py, for compare_necks.py."""
import json
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))
import prepare_trees  # noqa: E402

# The areas (picture, x0, y0, x1, y1) in px that each fold is tested on: thirds
# of one photograph, and the two others.
FOLDS = ((('crop2', 0, 0, 2299, 824), ), (('crop2', 0, 824, 2299, 1648), ),
         (('crop2', 0, 1648, 2299, 2472), ), (('crop', 0, 0, 1249, 1035),
                                              ('osbs', 0, 0, 400, 400)))
TILE = 600  # px, the longest side of a test tile


def read_photographs(data):
    """Puts the photographs together again from the windows.

    Args:
        data (Path): What prepare_trees.py has made.

    Returns:
        dict: Of each picture its pixels (h, w, 3) BGR and the boxes (n, 4) of
        all trees, each once, xyxy in px.
    """
    sides = {}
    for source, *_, x1, y1 in sum(FOLDS, ()):
        sides[source] = np.maximum(sides.get(source, 0), (y1, x1))
    pixels = {s: np.zeros((*side, 3), np.uint8) for s, side in sides.items()}
    trees = {source: set() for source in sides}
    for name in ('train', 'test', 'osbs'):
        coco = json.loads((data / f'{name}.json').read_text())
        areas = {area[0]: area[1:] for area in prepare_trees.SETS[name][1]}
        for image in coco['images']:
            source, x, y, _ = image['file_name'].rsplit('_', 3)
            x, y, w, h = int(x[1:]), int(
                y[1:]), image['width'], image['height']
            pixels[source][y:y + h, x:x + w] = cv2.imread(
                str(data / 'images' / image['file_name']))
            window = np.array([x, y, x + w, y + h])
            boxes = np.array([
                a['bbox'] for a in coco['annotations']
                if a['image_id'] == image['id']
            ]).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            boxes += np.tile(window[:2], 2)
            # A box at an inner side of a window is whole in another window.
            cut = ((boxes == window) & (window != areas[source])).any(1)
            trees[source].update(map(tuple, boxes[~cut].tolist()))
    return {s: (pixels[s], np.array(sorted(trees[s]))) for s in sides}


def tiles(area):
    """Cuts an area into equal tiles of at most TILE px, by rows."""
    source, x0, y0, x1, y1 = area
    xs, ys = (np.linspace(low, high,
                          -(-(high - low) // TILE) + 1).astype(int).tolist()
              for low, high in ((x0, x1), (y0, y1)))
    return [(source, x0, y0, x1, y1) for y0, y1 in zip(ys, ys[1:])
            for x0, x1 in zip(xs, xs[1:])]


def write_folds(data, out):
    """Writes ``train_N.json``, ``test_N.json`` and images to ``out``.

    A tree on a cut belongs to the side with its centre, as in
    prepare_trees.py.
    """
    settings = json.loads((data / 'receipt.json').read_text())['settings']
    photographs = read_photographs(data)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        new = Path(folder, 'new')
        (new / 'images').mkdir(parents=True)
        for fold, areas in enumerate(FOLDS):
            others = sum((a for a in FOLDS if a is not areas), ())
            prepare_trees.SETS.update({
                f'train_{fold}': (True, others),
                f'test_{fold}': (False, sum(map(tiles, areas), []))
            })
            for name in (f'train_{fold}', f'test_{fold}'):
                prepare_trees.write_set(new, name, photographs,
                                        settings['window'], settings['stride'])
        new.rename(out)
