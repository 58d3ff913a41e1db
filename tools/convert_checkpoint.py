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

from mmdet_efficientdet.conversion.convert import convert_file, save


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', help='published weights, in any known format')
    parser.add_argument('dst', help='the checkpoint to write')
    parser.add_argument('--config', required=True, help='config of the size')
    parser.add_argument(
        '--num-classes',
        type=int,
        default=80,
        choices=(80, 90),
        help='90 keeps the slots of COCO ids that no object has')
    parser.add_argument(
        '--raw',
        action='store_true',
        help='take raw weights, even where there are moving averages')
    args = parser.parse_args()
    try:
        if os.path.realpath(args.src) == os.path.realpath(args.dst):
            raise ValueError('DST is SRC itself; give another name')
        checkpoint = convert_file(
            args.src,
            Config.fromfile(args.config),
            args.num_classes,
            averages=not args.raw)
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
