"""Convert published weights of an EfficientDet to a checkpoint of ours.

SRC may be a checkpoint of google/automl (its prefix, its folder or the packed
folder), a Keras .h5, or a .pth of effdet, of Yet-Another-EfficientDet-Pytorch,
of mmdet's projects/EfficientDet or of ours; its format is found out. Of an
ImageNet EfficientNet alone (timm, efficientnet_pytorch, MMPretrain,
TensorFlow) DST becomes a file for model.backbone.init_cfg.
"""
import argparse
import os

from mmengine.config import Config

from mmdet_efficientdet.weights.class_transfer import transfer_file
from mmdet_efficientdet.weights.convert import convert_file, save
from mmdet_efficientdet.weights.published import fetch, find, find_by_file
from mmdet_efficientdet.weights.schemes import config_of, log_differences
from mmdet_efficientdet.weights.sources import PART


def read_config(path):
    try:
        return Config.fromfile(path)
    except (OSError, SyntaxError, KeyError) as error:
        raise ValueError(f'{path} cannot be read as a config: '
                         f'{error}') from error


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', help='published weights, in any known format')
    parser.add_argument('dst', help='the checkpoint to write')
    parser.add_argument(
        '--config',
        help='config of the size; needless for a published file, whose own '
        'conventions are taken')
    outputs = parser.add_mutually_exclusive_group()
    outputs.add_argument(
        '--num-classes',
        type=int,
        default=80,
        choices=(80, 90),
        help='90 keeps the slots of COCO ids that no object has')
    outputs.add_argument(
        '--classes',
        nargs='+',
        metavar='NAME',
        help='classes of your own: what was learned is kept for those of '
        'equal names, others start anew')
    parser.add_argument(
        '--raw',
        action='store_true',
        help='take raw weights, even where there are moving averages')
    args = parser.parse_args()
    try:
        src, dst = (os.path.realpath(name) for name in (args.src, args.dst))
        # A TensorFlow checkpoint is a prefix of several files, or a folder.
        prefix = PART.sub('', src)
        parts = (f'{prefix}.index', f'{prefix}.data-', src + os.sep)
        if dst == src or dst.startswith(parts):
            raise ValueError('DST is SRC itself or a part of it; give another '
                             'name')
        path, entry = args.src, find_by_file(args.src)
        if '://' in path:
            entry, pin = find(path)
            path = str(fetch(entry, pin))
        if args.config:
            config = read_config(args.config)
            if entry:
                log_differences(entry)
        elif entry:
            config = config_of(entry)
        else:
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
        *source['receipt'], f'sha256 of the source: {source["sha256"]}',
        args.dst
    ]))


if __name__ == '__main__':
    main()
