"""Convert the published weights of an EfficientDet for this package.

Example:
    python -m mmdet_efficientdet convert_checkpoint \\
        effdet://tf_efficientdet_d0 cats.pth --classes cat dog

SRC is the name of published weights, such as effdet://tf_efficientdet_d0, or
a file whose format is recognised: a checkpoint of google/automl (its prefix,
its folder or the packed folder), a Keras .h5, or a .pth of effdet, of
Yet-Another-EfficientDet-Pytorch, of MMDetection's projects/EfficientDet or of
this package. If SRC is an EfficientNet trained on ImageNet (timm,
efficientnet_pytorch, MMPretrain, TensorFlow), DST is a file for
model.backbone.init_cfg.

Writes DST, and prints what was converted and the checksum of the source.
"""
import argparse
import os
from pathlib import Path
from typing import Optional


def parse_args():
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog='python -m mmdet_efficientdet convert_checkpoint',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'src',
        metavar='SRC',
        help='published weights: a name, or a file in any known format')
    parser.add_argument('dst', metavar='DST', help='checkpoint to write')
    parser.add_argument(
        '--config',
        help='config of the size of SRC (default: the one of the published '
        'weights; other files need it)')
    outputs = parser.add_mutually_exclusive_group()
    outputs.add_argument(
        '--num-classes',
        type=int,
        default=80,
        choices=(80, 90),
        help='class outputs to keep: 80, or 90 with those of the COCO ids '
        'that no object has (default: %(default)s)')
    outputs.add_argument(
        '--classes',
        nargs='+',
        metavar='NAME',
        help='names of your own classes: a class that SRC knows by the same '
        'name keeps its weights, all others start anew')
    parser.add_argument(
        '--raw',
        action='store_true',
        help='take the raw weights even if SRC has EMA weights')
    return parser.parse_args()


if __name__ == '__main__':
    parse_args()  # answers --help before the libraries are imported

from mmdet_efficientdet.utils import printable, read_config
from mmdet_efficientdet.weights.class_transfer import transfer_file
from mmdet_efficientdet.weights.convert import convert_file, save
from mmdet_efficientdet.weights.published import (PublishedFile, fetch, find,
                                                  find_problem, manifest)
from mmdet_efficientdet.weights.schemes import config_of, log_differences
from mmdet_efficientdet.weights.sources import PART


def find_named(path: Path) -> Optional[PublishedFile]:
    """The published file that a local one claims by its name to be, if any.

    Prints that it cannot be checked if no hash is published.

    Raises:
        ValueError: If it is not the published file.
    """
    entry = next((x for x in manifest().values()
                  if path.absolute().as_posix().endswith(f'/{x.file}')), None)
    problem = find_problem(path, entry) if entry and path.is_file() else ''
    if problem:
        raise ValueError(
            f'{path} has the name of {entry.path}, but is not that file: '
            f'{problem}. If you mean another file, rename it')
    if entry and not entry.known_hash:
        print(f'No hash of {entry.file} is published, so that {path} is not '
              'verified to be that file')
    return entry


def main():
    """Converts, writes and prints the receipt."""
    args = parse_args()
    try:
        src, dst = (os.path.realpath(name) for name in (args.src, args.dst))
        # A TensorFlow checkpoint is a prefix of several files, or a folder.
        prefix = PART.sub('', src)
        parts = (f'{prefix}.index', f'{prefix}.data-', src + os.sep)
        if dst == src or dst.startswith(parts):
            raise ValueError('DST is SRC itself or a part of it; give another '
                             'name')
        config = read_config(args.config) if args.config else None
        path = args.src
        if '://' in path:
            entry = find(path)
            path = str(fetch(entry))
        elif os.path.exists(src) or os.path.exists(parts[0]):
            entry = find_named(Path(path))
        else:
            raise ValueError(f'{path} does not exist')
        if config and entry:
            log_differences(entry)
        elif entry:
            config = config_of(entry)
        elif not config:
            raise ValueError('give the config of the size, --config '
                             'configs/efficientdet/efficientdet_<size>_...')
        averages = not args.raw
        if args.classes:
            checkpoint = transfer_file(path, config, args.classes, averages)
        else:
            checkpoint = convert_file(path, config, args.num_classes, averages)
        save(checkpoint, args.dst)
    except ValueError as error:
        raise SystemExit(f'{error}\nNothing was written.') from error
    source = checkpoint['meta']['source']
    print('\n'.join([
        *map(printable, source['receipt']),
        f'sha256 of the source: {printable(source["sha256"])}', args.dst
    ]))


if __name__ == '__main__':
    main()
