"""Find what would make a training fail, before it starts.

Checks the data sets and the recipe of a config, reads all images, compares
the boxes with the anchors at the network's input size, and proposes anchors
where others would fit noticeably better. Exit status 1 if the training will
surely fail.
"""
import argparse
import os
import sys
from typing import Optional, Sequence

import cv2
import mmcv
import numpy as np
from mmdet.registry import DATASETS, MODELS
from mmdet.structures.bbox import get_box_tensor
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config, DictAction

from mmdet_efficientdet.datasets.anchor_fit import (advise, best_iou,
                                                    recall_table, snippet)
from mmdet_efficientdet.datasets.annotation_checks import check_images
from mmdet_efficientdet.datasets.findings import Finding, verdict
from mmdet_efficientdet.engine.preflight import (check_training, input_boxes,
                                                 read_all)
from mmdet_efficientdet.models import EfficientDetHead
from mmdet_efficientdet.utils import register_all_modules, write_file

CELL = 320  # pixels of a sample in the picture


def draw_samples(cfg: Config, path: str, number: int = 16) -> None:
    """Writes a grid of samples as the network is trained on them."""
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = dataset.metainfo
    cells = []
    # Evenly spread, since neighbours in a file are often alike.
    count = min(number, len(dataset))
    for index in np.linspace(0, len(dataset) - 1, count).astype(int):
        item = dataset[int(index)]
        image = item['inputs'].permute(1, 2, 0).numpy()[..., ::-1]
        image = image.clip(0, 255).astype(np.uint8)
        sample = item['data_samples']
        sample.gt_instances.bboxes = get_box_tensor(sample.gt_instances.bboxes)
        visualizer.add_datasample('sample', image, sample, draw_pred=False)
        image = mmcv.imrescale(visualizer.get_image(), (CELL, CELL))
        cells.append(mmcv.impad(image, shape=(CELL, CELL), pad_val=255))
    columns = int(np.ceil(np.sqrt(len(cells))))
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)
    grid = np.concatenate([
        np.concatenate(cells[i:i + columns], 1)
        for i in range(0, len(cells), columns)
    ])
    extension = os.path.splitext(path)[1]
    write_file(path, cv2.imencode(extension, grid[..., ::-1])[1].tobytes())
    print(f'{count} samples, as the network sees them: {path}')


def print_anchors(cfg: Config, head: EfficientDetHead, train: list) -> None:
    """Prints the recall of the anchors, and better ones if there are any."""
    data = input_boxes(cfg, train)
    if not len(data.boxes):
        return
    now = best_iou(head.prior_generator, data, head.num_levels)
    proposal = advise(head.prior_generator, data, head.num_levels)
    ious = [now]
    if proposal:
        ious.append(best_iou(proposal, data, head.num_levels))
    print('\nAnchors: boxes with an anchor of IoU >= 0.5, and the mean IoU of '
          'the best, at the\nsize of the input in testing')
    print('\n'.join(recall_table(data, *ious)))
    if proposal:
        print(f'Proposal:\n{snippet(proposal)}\nPretrained heads expect the '
              'anchors that they were trained with; with these they\nhave to '
              'learn boxes anew.')
    else:
        print('Proposal: keep these anchors')


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Prints the report; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config')
    parser.add_argument(
        '--gpus', type=int, default=1, help='that will train; default 1')
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='as you call train.py')
    parser.add_argument(
        '--no-images', action='store_true', help='skip reading the images')
    parser.add_argument('--samples', help='picture to draw, such as sheet.jpg')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    args = parser.parse_args(arguments)
    register_all_modules()
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options or {})
    if args.auto_scale_lr:
        if not cfg.get('auto_scale_lr'):
            parser.error('--auto-scale-lr needs auto_scale_lr=dict('
                         'base_batch_size=...) in the config')
        cfg.auto_scale_lr.enable = True
    model = MODELS.build(cfg.model)
    try:
        train = read_all(cfg.train_dataloader.dataset)
        val = cfg.get('val_dataloader')
        val = read_all(val.dataset) if val else []
    except (OSError, KeyError, TypeError, ValueError) as error:
        finding = Finding(
            'annotation_file', problem=f'{type(error).__name__}: {error}')
        print(f'{finding}\n\n{verdict([finding])}')
        return 1
    for key, parts in (('train', train), ('val', val)):
        if not parts and cfg.get(f'{key}_dataloader'):
            print(f'The data of {key}_dataloader is of a format that is not '
                  'known here, and not checked')
    findings = check_training(cfg, model, train, val, args.gpus)
    if not args.no_images:
        parts = {(part.file, part.partial): part for part in (*train, *val)}
        for part in parts.values():
            print(f'reading the images of {part.file}')
            findings += check_images(part, progress=True)
    for finding in findings:
        print(f'\n{finding}')
    if isinstance(getattr(model, 'bbox_head', None), EfficientDetHead):
        print_anchors(cfg, model.bbox_head, train)
    failed = any(finding.error for finding in findings)
    if args.samples and not failed:
        draw_samples(cfg, args.samples)
    print(f'\n{verdict(findings)}')
    return int(failed)


if __name__ == '__main__':
    sys.exit(main())
