"""Make a release of a trained detector, and prove that it is the same.

Example:
    python -m mmdet_efficientdet release work_dirs/my_config --name my_detector

Writes one folder: the weights as a checkpoint of MMDetection and as
safetensors, settings, config and provenance as JSON, a model card, an entry
for a metafile, the curves of the training, and SHA256SUMS. Before that, it
evaluates the trained checkpoint with MMDetection, loads both files of the
release in new processes, and evaluates them on the same photographs. If an AP
differs by more than --max-difference, or a file has a path of this machine,
nothing is written. Publishing is copying the folder.
"""
import argparse
import re
from pathlib import Path


def parse_args(arguments=None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog='python -m mmdet_efficientdet release',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('work_dir', type=Path, help='the --work-dir of train.py')
    add('--name', help='of the release (default: that of the config)')
    add('--out',
        type=Path,
        default=Path('releases'),
        help='folder of the new folder (default: %(default)s)')
    add('--checkpoint',
        type=Path,
        help='file to release (default: the best of the validation, else the '
        'last)')
    add('--config', help='of the training (default: the one in WORK_DIR)')
    add('--half',
        action='store_true',
        help='store the weights in float16; the AP is that of the rounded '
        'ones')
    add('--data',
        type=Path,
        metavar='ANNOTATIONS',
        help="photographs for the AP, in COCO's format (default: the test "
        'data of the config)')
    add('--images',
        type=Path,
        metavar='FOLDER',
        help='folder of the photographs of --data')
    for option, what in (('--data-name', 'name and source of the data'),
                         ('--data-licence', 'licence of the data'),
                         ('--start-licence', 'licence of the start weights'),
                         ('--licence', 'licence of the released weights')):
        add(option,
            default='not stated',
            help=f'{what} (default: '
            '%(default)s)')
    add('--max-difference',
        type=float,
        metavar='POINTS',
        help='of the AP, of 100 (default: 0.1 plus 10 divided by the number '
        'of boxes)')
    add('--hub-dataset',
        nargs=2,
        metavar=('OWNER/NAME', 'TASK'),
        help='the data of the AP as a benchmark of Hugging Face, for its '
        'leaderboard: writes .eval_results')
    add('--limits',
        action='append',
        default=[],
        metavar='TEXT',
        help='a known limit, for the card; may be repeated')
    args = parser.parse_args(arguments)
    if args.name and not re.fullmatch(r'[\w][\w.-]*', args.name):
        parser.error(f'--name {args.name!r} must be letters, digits, "_", "-" '
                     'and "."')
    if bool(args.data) != bool(args.images):
        parser.error('give --data and --images, or neither')
    return args


if __name__ == '__main__':
    parse_args()  # answers --help before the libraries are imported

from release_parts.releasing import release


def main() -> None:
    """Writes the release and prints its folder."""
    try:
        print(release(parse_args()))
    except (ValueError, OSError) as error:
        raise SystemExit(f'{error}\nNothing was released.') from error


if __name__ == '__main__':
    main()
