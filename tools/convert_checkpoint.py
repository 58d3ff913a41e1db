"""Convert published weights of an EfficientDet to a checkpoint of ours.

SRC may be a checkpoint of google/automl (its prefix, its folder or the packed
folder), a Keras .h5, or a .pth of effdet, of Yet-Another-EfficientDet-Pytorch
or of what mmdet's projects/EfficientDet converted; its format is found out.
"""
import argparse
from pathlib import Path

import torch
from mmdet.datasets import CocoDataset
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from mmdet_efficientdet.conversion.convert import (UNUSED_IDS, convert, save,
                                                   select_coco_classes)
from mmdet_efficientdet.conversion.sources import open_source
from mmdet_efficientdet.scaling import SCALING, scale_config

BIAS = 'bbox_head.conv_cls.pointwise.bias'


def build(cfg):
    """The model without memory for its weights."""
    with torch.device('meta'):
        return MODELS.build(cfg.model)


def convert_for(tensors, model, averages):
    """Our state dict for a model, and the receipt."""
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    return convert(tensors, shapes, model.backbone.arch,
                   model.bbox_head.num_levels, averages)


def fitting_sizes(tensors, cfg):
    """The sizes that the weights do fit."""
    sizes = []
    for size in SCALING:
        other = cfg.copy()
        scale_config(other, size)
        try:
            convert_for(tensors, build(other), averages=False)
        except ValueError:
            continue
        sizes.append(size)
    return sizes


def class_names(num_classes):
    """Names of COCO's classes, or of all its 90 ids."""
    names = list(CocoDataset.METAINFO['classes'])
    if num_classes == 80:
        return names
    return [
        f'unused {i}' if i in UNUSED_IDS else names.pop(0)
        for i in range(1, 91)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
    register_all_modules()
    cfg = Config.fromfile(args.config)
    cfg.model.backbone.init_cfg = None
    cfg.model.bbox_head.num_classes = args.num_classes
    model = build(cfg)
    try:
        with open_source(args.src) as (tensors, digest):
            try:
                state_dict, receipt = convert_for(tensors, model, not args.raw)
            except ValueError as error:
                sizes = fitting_sizes(tensors, cfg)
                hint = f'\nThe weights are of {" or ".join(sizes)}; give ' \
                    'the config of that size' if sizes else ''
                raise ValueError(f'{error}{hint}') from error
        anchors = model.bbox_head.prior_generator
        given = len(state_dict[BIAS]) // anchors.num_base_priors[0]
        if given == 90 and args.num_classes == 80:
            state_dict = select_coco_classes(state_dict)
            receipt.append('classes: 80 of 90 slots, bit for bit')
        elif given != args.num_classes:
            raise ValueError(
                f'{args.src} predicts {given} classes; only heads of COCO '
                'with 80 or 90 can be converted, to 90 only from 90')
        save(
            dict(
                meta=dict(
                    cfg=cfg.pretty_text,
                    dataset_meta=dict(classes=class_names(args.num_classes)),
                    source=dict(
                        file=Path(args.src).name,
                        sha256=digest,
                        receipt=receipt),
                    aspect_pairs=[list(p) for p in anchors.aspect_pairs],
                    mean=list(cfg.model.data_preprocessor.mean),
                    std=list(cfg.model.data_preprocessor.std)),
                state_dict=state_dict), args.dst)
    except ValueError as error:
        raise SystemExit(f'{error}\nNothing was written.') from error
    print('\n'.join([*receipt, f'sha256 of the source: {digest}', args.dst]))


if __name__ == '__main__':
    main()
