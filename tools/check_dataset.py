"""Check the data and the recipe of a config before you train with it.

Example:
    python -m mmdet_efficientdet check_dataset my_config.py --samples sheet.jpg

Reads the annotations, decodes all images, and compares the settings of the
config with the data. Every finding is an ERROR or a WARNING and says how to
fix it. For an EfficientDet it also prints how well the anchors fit the boxes
at the network's input size, and proposes anchors that fit noticeably better.
The last line is the verdict; the exit status is 1 if the training will fail.
"""
import argparse
import os
import sys
from typing import List, Optional, Sequence

from mmengine.config import Config, DictAction


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog='python -m mmdet_efficientdet check_dataset',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config that you want to train with')
    parser.add_argument(
        '--gpus',
        type=int,
        default=1,
        help='number of GPUs that will train (default: %(default)s)')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='give it if you will call train.py with --auto-scale-lr')
    parser.add_argument(
        '--no-images',
        action='store_true',
        help='do not decode the images, which takes most of the time')
    parser.add_argument(
        '--samples',
        metavar='PICTURE',
        help='also draw 16 training samples with their boxes into this file, '
        'such as sheet.jpg, unless there are errors')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='settings of the config to replace, as for train.py')
    return parser


if __name__ == '__main__':
    # Answers --help before the libraries are imported
    make_parser().parse_args()

import cv2
import mmcv
import numpy as np
import torch
from check_parts.anchor_advice import advise, recall_and_iou
from check_parts.image_checks import check_images
from mmdet.registry import DATASETS, MODELS
from mmdet.visualization import DetLocalVisualizer
from mmengine.dataset import pseudo_collate

from mmdet_efficientdet.datasets.anchor_fit import InputBoxes, best_iou
from mmdet_efficientdet.datasets.findings import verdict
from mmdet_efficientdet.engine.preflight import (check_training,
                                                 in_plain_words, input_boxes,
                                                 read_all)
from mmdet_efficientdet.models import AnchorGenerator, EfficientDetHead
from mmdet_efficientdet.utils import (read_config, register_all_modules,
                                      write_file)

CELL = 480  # pixels of a sample in the picture, with the white gap
GAP = 8
BANDS = (0, 16, 32, 64, 128, 256, 1e9)  # square root of the area, in pixels


def network_input(data_preprocessor: torch.nn.Module, settings: dict,
                  item: dict) -> tuple:
    """A sample as the network gets it, made visible.

    Args:
        data_preprocessor (nn.Module): Normalises and pads the image.
        settings (dict): Its config.
        item (dict): One sample of a dataset.

    Returns:
        tuple: The RGB image ``(H, W, 3)`` in 8 bits, whose padding has the
        colour that is zero to the network, and the sample with its boxes.
    """
    data = data_preprocessor(pseudo_collate([item]), training=True)
    image = data['inputs'][0].permute(1, 2, 0).numpy()
    image = image * settings.get('std', 1) + settings.get('mean', 0)
    if not settings.get('bgr_to_rgb'):
        image = image[..., ::-1]
    return image.round().clip(0, 255).astype(np.uint8), data['data_samples'][0]


def draw_samples(cfg: Config,
                 data_preprocessor: torch.nn.Module,
                 path: str,
                 number: int = 16) -> None:
    """Writes a grid of samples as the network is trained on them."""
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    visualizer = DetLocalVisualizer(line_width=2)
    visualizer.dataset_meta = dataset.metainfo
    settings = cfg.model.data_preprocessor
    cells = []
    # Evenly spread, since neighbours in a file are often alike.
    count = min(number, len(dataset))
    for index in np.linspace(0, len(dataset) - 1, count).astype(int):
        image, sample = network_input(data_preprocessor, settings,
                                      dataset[int(index)])
        # Drawn after the image is resized, lines and names stay readable.
        image, scale = mmcv.imrescale(
            image, (CELL - GAP, CELL - GAP), return_scale=True)
        sample.gt_instances.bboxes *= scale
        visualizer.add_datasample('sample', image, sample, draw_pred=False)
        cells.append(
            mmcv.impad(
                visualizer.get_image(),
                shape=(CELL, CELL),
                pad_val=(255, 255, 255)))
    columns = int(np.ceil(np.sqrt(len(cells))))
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)
    grid = np.concatenate([
        np.concatenate(cells[i:i + columns], 1)
        for i in range(0, len(cells), columns)
    ])
    extension = os.path.splitext(path)[1]
    write_file(path, cv2.imencode(extension, grid[..., ::-1])[1].tobytes())
    print(f'{count} samples, as the network sees them: {path}')


def recall_table(data: InputBoxes, *ious: np.ndarray) -> List[str]:
    """Returns lines of recall and mean best IoU by size of the boxes.

    Args:
        data (InputBoxes): The boxes.
        ious (np.ndarray): ``(M, )`` of the current anchors and, optionally,
            of the proposed ones.
    """
    side = np.sqrt((data.boxes[:, 2:] - data.boxes[:, :2]).prod(1))
    titles = ('recall now', 'mean IoU', 'proposed', 'mean IoU')
    lines = [
        'side in px      boxes' + ''.join(f'{title:>12}'
                                          for title in titles[:2 * len(ious)])
    ]
    for low, high in [*zip(BANDS, BANDS[1:]), (0, np.inf)]:
        band = (side >= low) & (side < high)
        name = 'all' if high == np.inf else f'>= {low}' if high == BANDS[
            -1] else f'{low} to {high}'
        if band.any():
            numbers = ''.join(f'{number:12.3f}' for iou in ious
                              for number in recall_and_iou(iou[band]))
            lines.append(f'{name:12}{band.sum():9}{numbers}')
    return lines


def snippet(generator: AnchorGenerator) -> str:
    """Returns the lines for a config."""
    return (
        f'model = dict(\n    bbox_head=dict(\n        anchor_generator=dict'
        f'(\n            octave_base_scale={generator.octave_base_scale},'
        f'\n            scales_per_octave={generator.scales_per_octave},'
        f'\n            aspect_pairs={list(generator.aspect_pairs)})))')


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
    parser = make_parser()
    args = parser.parse_args(arguments)
    register_all_modules()
    try:
        cfg = read_config(args.config, args.cfg_options)
    except ValueError as error:
        parser.error(str(error))
    if args.auto_scale_lr:
        if not cfg.get('auto_scale_lr'):
            parser.error('--auto-scale-lr needs auto_scale_lr=dict('
                         'base_batch_size=...) in the config')
        cfg.auto_scale_lr.enable = True
    model = MODELS.build(cfg.model)
    datasets = [
        loader.dataset
        for loader in (cfg.train_dataloader, cfg.get('val_dataloader'))
        if loader
    ]
    try:
        with in_plain_words(*datasets):
            train, val, *_ = [*map(read_all, datasets), []]
    except ValueError as error:
        print(error)
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
    failed = any(finding.error for finding in findings)
    if '://' in (cfg.get('load_from') or ''):
        print(f'\nThe training loads {cfg.load_from}, which is downloaded if '
              'it is not there yet')
    # Of classes with wrong names, other boxes would be counted.
    if not failed and isinstance(
            getattr(model, 'bbox_head', None), EfficientDetHead):
        print_anchors(cfg, model.bbox_head, train)
    if args.samples and not failed:
        draw_samples(cfg, model.data_preprocessor, args.samples)
    print(f'\n{verdict(findings)}')
    return int(failed)


if __name__ == '__main__':
    sys.exit(main())
