"""Find objects in pictures and videos, draw them, and write them as JSON.

Example:
    python -m mmdet_efficientdet detect street.jpg --model trees --out found

Takes pictures, folders of pictures, and videos (with PyAV). Needs PyTorch, but
neither MMDetection nor MMCV. For each picture, --out gets a copy with the
boxes; detections.json there has the boxes of all, also of each frame of a
video. Files that cannot be read are left out and listed at the end; the exit
status is 1 then.
"""
import argparse
import json
import sys
from pathlib import Path


def parse_args(arguments=None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog='python -m mmdet_efficientdet detect',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('pictures', nargs='+', help='files, or folders of them')
    add('--model',
        required=True,
        help='a release: name, folder, https://ADDRESS or hf://OWNER/NAME')
    add('--out',
        type=Path,
        default=Path('detections'),
        help='folder to write to (default: %(default)s)')
    add('--threshold',
        type=float,
        default=0.3,
        help='lowest score of a box, 0 to 1 (default: %(default)s)')
    add('--device', help='such as cpu (default: the GPU, if there is one)')
    args = parser.parse_args(arguments)
    if not 0 <= args.threshold <= 1:
        parser.error(f'--threshold {args.threshold} must be from 0 to 1')
    return args


if __name__ == '__main__':
    parse_args()  # answers --help before the libraries are imported

from PIL import Image, ImageDraw
from torch.hub import tqdm  # a plain one if tqdm is not installed

from mmdet_efficientdet import Detections, load_detector
from mmdet_efficientdet.deploy.detector import pictures_in
from mmdet_efficientdet.deploy.pictures import is_video, read_picture

COLOURS = ('#ffd24d', '#4da6ff', '#ff6b6b', '#4dff88', '#e07bff', '#4dffff')


def draw(found: Detections) -> Image.Image:
    """The picture with boxes, names and scores."""
    picture = Image.fromarray(read_picture(found.path))
    pen = ImageDraw.Draw(picture)
    width = max(2, max(picture.size) // 400)
    for box, score, label, name in zip(found.boxes.tolist(), found.scores,
                                       found.labels, found.names):
        colour = COLOURS[label % len(COLOURS)]
        pen.rectangle(box, outline=colour, width=width)
        text, place = f'{name} {score:.2f}', (box[0] + width, box[1])
        pen.rectangle(pen.textbbox(place, text), fill=colour)
        pen.text(place, text, fill='black')
    return picture


def as_json(found: Detections) -> dict:
    """What was found in a picture, as plain data."""
    place = dict(path=found.path)
    if found.frame is not None:
        place['frame'] = found.frame
    if found.error:
        return dict(place, error=found.error)
    return dict(
        place,
        boxes=[[round(x, 2) for x in box] for box in found.boxes.tolist()],
        scores=[round(x, 4) for x in found.scores.tolist()],
        labels=found.labels.tolist(),
        names=found.names)


def free_name(folder: Path, path: str, taken: set) -> Path:
    """A name for the drawn picture; those of one name get a number."""
    path, number = Path(path), 1
    name = f'{path.stem}.jpg'
    while name in taken:
        number += 1
        name = f'{path.stem}_{number}.jpg'
    taken.add(name)
    return folder / name


def main() -> int:
    """Detects, draws and writes; returns the exit status."""
    args = parse_args()
    try:
        paths = []
        for path in args.pictures:
            paths += pictures_in(path) if Path(path).is_dir() else [path]
        detector = load_detector(args.model, args.device)
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(str(error)) from error
    results, out = [], args.out.resolve()
    taken = {  # a drawn picture replaces none of those that are given
        path.name
        for path in map(Path, paths)
        if path.resolve().parent == out or path.absolute().parent == out
    }
    try:
        total = None if any(map(is_video, paths)) else len(paths)
        with tqdm(total=total, unit='picture', disable=None) as bar:
            for found in detector.each(paths, args.threshold):
                if not found.error and found.frame is None:
                    draw(found).save(
                        free_name(args.out, found.path, taken), quality=90)
                results.append(found)
                bar.update(1)
        text = json.dumps([*map(as_json, results)],
                          indent=1,
                          ensure_ascii=False)
        (args.out / 'detections.json').write_text(
            text + '\n', encoding='utf-8')
    except OSError as error:
        raise SystemExit(f'{args.out} cannot be written: {error}. '
                         f'{len(results)} of {len(paths)} pictures are '
                         'done; detections.json is missing') from error
    bad = [found.error for found in results if found.error]
    print(f'{sum(len(x.boxes) for x in results)} boxes in '
          f'{len(results) - len(bad)} pictures: {args.out}')
    for error in bad:
        print(error, file=sys.stderr)
    return int(bool(bad))


if __name__ == '__main__':
    sys.exit(main())
