"""Export a trained detector to a runtime, and prove that it is the same.

Example:
    python -m mmdet_efficientdet export my_config.py epoch_300.pth --to onnx
    python -m mmdet_efficientdet export my_config.py epoch_300.pth \\
        --to mediapipe --precision int8 --resize stretch

Writes the file only if its outputs agree with PyTorch on photographs: the
heads within a tolerance, and the AP on the test data of the config, or on
--data, within 0.1 points of 100 for floats. Beside it are a receipt for
programs (.receipt.json) and one for people (.receipt.txt).
"""
import argparse
import os
from pathlib import Path
from typing import Annotated, Callable, List, Literal, Optional

import msgspec
from export_parts import support


class Settings(msgspec.Struct):
    """What --verify takes from a receipt, which is not trusted."""
    format: str
    precision: str
    resize: Literal['pad', 'stretch']
    nms: Literal['none', 'hard', 'soft']
    candidates: Optional[int]
    image_size: Annotated[List[int], msgspec.Meta(min_length=2, max_length=2)]
    checkpoint: str
    classes: List[str]
    data: Optional[str]
    data_images: Optional[str]
    limit: int


def parse_args(arguments=None) -> argparse.Namespace:
    """Reads the command line."""
    formats = '\n'.join(f'  {name:12}{what}, {" or ".join(precisions)}'
                        for name, (precisions, what) in
                        support.FORMATS.items())  # yapf: disable
    parser = argparse.ArgumentParser(
        prog='python -m mmdet_efficientdet export',
        description=__doc__,
        epilog=f'formats:\n{formats}\n\n{support.table()}',
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('config', help='config of the detector')
    add('checkpoint',
        nargs='?',
        help='file, or name of published weights (default with --verify: '
        'that of the receipt)')
    add('--to', metavar='FORMAT', help='format of the file, see below')
    add('--precision', help='fp32, fp16 or int8 (default: see below)')
    add('--out',
        type=Path,
        help='file to write (default: beside the checkpoint, with its name)')
    add('--force', action='store_true', help='replace files that exist')
    add('--verify',
        type=Path,
        metavar='ARTEFACT',
        help='make the receipt of an exported file again')
    add('--python',
        help='interpreter of an environment with the exporter and the '
        'runtime (default: this one, or .venv-deploy/bin/python)')
    add_content(add)
    add_comparison(add)
    args = parser.parse_args(arguments)
    if not args.verify and not (args.to and args.checkpoint):
        parser.error('give CONFIG CHECKPOINT --to FORMAT, or CONFIG --verify '
                     'ARTEFACT')
    return args


def add_content(add: Callable) -> None:
    """Adds the options of what is in the file."""
    add('--nms',
        choices=('none', 'hard', 'soft'),
        default='none',
        help="of onnx: raw heads, boxes by ONNX's NonMaxSuppression, or by "
        'the suppression of the config as a Loop (default: %(default)s)')
    add('--candidates',
        type=int,
        help='of --nms: pairs of anchor and class before suppression '
        '(default: nms_pre of the config); TensorRT takes up to 3840')
    add('--dynamic',
        action='store_true',
        help='of onnx: any height and width that are multiples of 128, or of '
        '256 for six levels')
    add('--pt2', action='store_true', help='of torch: write a .pt2, too')
    add('--size',
        type=int,
        nargs=2,
        metavar=('HEIGHT', 'WIDTH'),
        help='of the input (default: that of the config)')
    add('--resize',
        choices=('pad', 'stretch'),
        help='how images are fitted to the input (default: stretch for '
        'mediapipe, frigate and coral, which do so; else pad)')
    add('--classes',
        nargs='+',
        metavar='NAME',
        help='names for the labels (default: those of the checkpoint)')
    add('--calibration',
        type=Path,
        metavar='FOLDER',
        help='images for int8 (default: the training data of the config)')
    add('--calibration-images',
        type=int,
        default=200,
        help='their number, chosen by --seed (default: %(default)s)')
    add('--seed',
        type=int,
        default=0,
        help='which images are chosen for calibration (default: %(default)s)')


def add_comparison(add: Callable) -> None:
    """Adds the options of the comparison with PyTorch."""
    add('--data',
        type=Path,
        metavar='ANNOTATIONS',
        help="photographs for the AP, in COCO's format (default: the test "
        'data of the config)')
    add('--images',
        type=Path,
        metavar='FOLDER',
        help='folder of the photographs of --data')
    add('--limit',
        type=int,
        help='number of photographs at most (default: 500)')
    add('--max-ap-loss',
        type=float,
        metavar='POINTS',
        help='AP that may be lost, of 100 (default: see docs/deploy.md)')


def settle(args: argparse.Namespace) -> None:
    """Fills in defaults and refuses what needs no library to be refused."""
    if args.verify:
        recall(args)
    if args.to in support.FORMATS:
        args.precision = args.precision or support.FORMATS[args.to][0][0]
    cells = [support.cell(size, args.to, args.precision or '')
             for size in support.SIZES]  # yapf: disable
    if all(x.state == 'blocked' for x in cells):
        support.check(support.CUSTOM, args.to, args.precision)
    if args.to != 'onnx' and args.nms != 'none':
        raise ValueError(f'--nms {args.nms} is for --to onnx; --to {args.to} '
                         'has a fixed output, see --help')
    if args.dynamic and (args.to, args.nms) != ('onnx', 'none'):
        raise ValueError('--dynamic is for --to onnx --nms none, because '
                         'suppression needs the anchors of one size')
    if args.candidates is not None and args.candidates < 1:
        raise ValueError(f'--candidates {args.candidates} must be at least 1')
    args.limit = 500 if args.limit is None else args.limit
    if args.limit < 1:
        raise ValueError(f'--limit {args.limit} must be at least 1')
    stretches = args.to in ('mediapipe', 'frigate', 'coral')
    args.resize = args.resize or ('stretch' if stretches else 'pad')
    suffixes = support.SUFFIXES[args.to]
    suffix = suffixes[0]
    if args.out is None:
        stem = Path(args.checkpoint.rpartition('/')[2]).stem
        name = f'{stem}_{args.to}_{args.precision}{suffix}'
        folder = '' if '://' in args.checkpoint else args.checkpoint
        args.out = args.verify or Path(folder).parent / name
    if args.out.suffix != suffix:
        raise ValueError(f'--to {args.to} writes a file {suffix}, but --out '
                         f'is {args.out}; give --out '
                         f'{args.out.with_suffix(suffix)}')
    if not args.out.parent.is_dir():
        raise ValueError(f'the folder {args.out.parent} of --out does not '
                         'exist; make it, or give another --out')
    suffixes += ('.receipt.json', '.receipt.txt') + ('.pt2', ) * args.pt2
    for path in map(args.out.with_suffix, suffixes):
        if path.exists() and not (args.force or args.verify):
            raise ValueError(f'{path} exists; give another --out, or --force')


def recall(args: argparse.Namespace) -> None:
    """Takes the settings of an export from its receipt."""
    receipt = args.verify.with_suffix('.receipt.json')
    if not args.verify.is_file() or not receipt.is_file():
        raise ValueError(f'--verify needs {args.verify} and its receipt '
                         f'{receipt}')
    try:
        known = msgspec.json.decode(receipt.read_bytes(), type=Settings)
    except msgspec.MsgspecError as error:
        raise ValueError(f'{receipt} is no receipt of an export: {error}. '
                         'Export again with --force') from error
    args.to, args.precision = known.format, known.precision
    args.resize, args.nms = known.resize, known.nms
    args.candidates, args.size = known.candidates, known.image_size
    args.checkpoint = args.checkpoint or known.checkpoint
    args.classes = args.classes or known.classes
    args.limit = known.limit if args.limit is None else args.limit
    if args.data is None and known.data is not None:
        args.data = Path(known.data)
        args.images = args.images or Path(known.data_images or '')


if __name__ == '__main__':
    args = parse_args()
    try:  # before the libraries are imported
        settle(args)
    except ValueError as error:
        raise SystemExit(f'{error}\nNothing was written.') from error

from export_parts.exporting import export


def main() -> None:
    """Exports or verifies, and prints the receipt."""
    try:
        print(export(args), end='')
    except (ValueError, OSError) as error:
        raise SystemExit(f'{error}\nNothing was written.') from error
    print(os.path.relpath(args.out))


if __name__ == '__main__':
    main()
