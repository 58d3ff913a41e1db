"""Evaluate published weights or a release on photographs in COCO's format.

Example:
    python -m mmdet_efficientdet evaluate effdet://tf_efficientdet_d0 \\
        data/coco

Prints the AP beside the published one. Input range, anchors, image size and
resizing are those of the published file. FOLDER has the photographs in
val2017/ and the boxes in annotations/instances_val2017.json, as COCO has;
--data and --images name others. The first argument is a name of published
weights, a release (folder, address or name), or a checkpoint with its
--config.
"""
import argparse
import json
from pathlib import Path


def parse_args(arguments=None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog='python -m mmdet_efficientdet evaluate',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('name', help='published weights, a release, or a checkpoint')
    add('folder', nargs='?', type=Path, help='folder with val2017')
    add('--data',
        type=Path,
        metavar='ANNOTATIONS',
        help='annotations (default: those of val2017 in FOLDER)')
    add('--images',
        type=Path,
        metavar='FOLDER',
        help='folder of the photographs (default: val2017 in FOLDER)')
    add('--config', help='config of a checkpoint')
    add('--device', help='of a release (default: the GPU, if there is one)')
    add('--out', type=Path, metavar='FILE.json', help='numbers to write')
    args = parser.parse_args(arguments)
    if args.folder:
        args.data = args.data or \
            args.folder / 'annotations' / 'instances_val2017.json'
        args.images = args.images or args.folder / 'val2017'
    if not args.data or not args.images:
        parser.error('give FOLDER, or --data ANNOTATIONS --images FOLDER')
    return args


if __name__ == '__main__':
    parse_args()  # answers --help before the libraries are imported

from mmengine.registry import init_default_scope
from release_parts.scores import score_detector, score_in_host

from mmdet_efficientdet import load_detector
from mmdet_efficientdet.utils import read_config, write_file
from mmdet_efficientdet.weights.published import find
from mmdet_efficientdet.weights.schemes import config_of


def evaluate(args: argparse.Namespace) -> dict:
    """The AP, and what was published.

    Returns:
        dict: ``AP`` and ``published`` in points of 100; the latter is None if
        nothing was published.

    Raises:
        ValueError: If something is missing or does not fit.
    """
    init_default_scope('mmdet')
    if args.config:
        config = read_config(args.config)
        ap = score_in_host(config, args.name, args.data, args.images)
        return dict(AP=ap, published=None)
    if args.name.startswith(('effdet://', 'automl://')):
        entry = find(args.name)
        ap = score_in_host(config_of(entry), args.name, args.data, args.images)
        return dict(AP=ap, published=entry.ap)
    if args.name.endswith('.pth'):
        raise ValueError(f'the checkpoint {args.name} needs its --config')
    detector = load_detector(args.name, args.device)
    published = detector.settings.provenance  # may hold anything
    for key in ('results', 'AP'):
        published = published.get(key) if isinstance(published, dict) else None
    if type(published) is not float:
        published = None
    found = score_detector(detector, args.data, args.images)
    return dict(found, published=published)


def main() -> None:
    """Evaluates and prints."""
    args = parse_args()
    try:
        found = evaluate(args)
        if args.out:
            write_file(args.out, json.dumps(found, indent=1).encode())
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    text = f'AP {found["AP"]:.2f}'
    if isinstance(found['published'], (int, float)):
        text += (f', published {found["published"]:.2f}, difference '
                 f'{found["AP"] - found["published"]:+.2f}')
    print(f'{text}  ({args.name} on {args.data})')


if __name__ == '__main__':
    main()
