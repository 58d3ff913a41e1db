"""One export: build, compare, and only then write."""
import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Dict, Optional

import numpy as np

from mmdet_efficientdet import plain_network
from mmdet_efficientdet.utils import read_config, write_file
from mmdet_efficientdet.weights.sources import sha256_of

from . import receipt as receipts
from . import support
from .build import build, find_python, open_runtime
from .detector import anchors_of, check_model, input_settings, load, size_of
from .evaluation import Photographs, calibration_images, dataset_of
from .heads import Heads


def export(args: argparse.Namespace) -> str:
    """Exports or verifies; returns the receipt as text.

    Args:
        args (Namespace): Of tools/export.py, with defaults filled in.

    Raises:
        ValueError: If the export is refused; nothing is written then.
    """
    config = read_config(args.config)
    check_model(config)
    size = size_of(config)
    cell = support.check(size, args.to, args.precision)
    python = find_python(args.to, args.python)
    detector, names, digest = load(config, args.checkpoint, args.classes)
    settings = input_settings(config, names, args.resize, args.size)
    photographs = _photographs(args, config, settings)
    network = plain_network(detector)
    odd = [x for x in settings.image_size if x % network.divisor]
    if args.dynamic and odd:
        raise ValueError(
            f'--dynamic is for sides that are multiples of {network.divisor}, '
            f'but the size of the comparison has {odd}; give --size HEIGHT '
            'WIDTH')
    test_cfg = dict(detector.test_cfg or {})
    anchors = anchors_of(detector, network, settings.image_size)
    parts = network, settings, anchors, test_cfg
    with tempfile.TemporaryDirectory(
            prefix='.export', dir=args.out.parent) as folder:
        folder = Path(folder)
        if args.verify:
            files = {
                suffix: args.out.with_suffix(suffix)
                for suffix in (*support.SUFFIXES[args.to], '.pt2')
                if args.out.with_suffix(suffix).is_file()
            }
        else:
            images = _calibration(args, config, settings)
            files = build(folder, args.to, args.precision, python, parts,
                          args.nms, args.candidates, images, args.pt2,
                          args.dynamic)
        measured = _compare(args, folder, files, python, parts, photographs,
                            cell)
        found = dict(
            file=args.out.name,
            format=args.to,
            precision=args.precision,
            state=cell.state,
            size=size,
            nms=args.nms,
            candidates=args.candidates,
            dynamic=args.dynamic,
            image_size=list(settings.image_size),
            num_classes=len(names),
            classes=names,
            data=args.data and str(args.data),
            data_images=args.images and str(args.images),
            limit=args.limit,
            checkpoint=str(args.checkpoint),
            checkpoint_sha256=digest,
            bytes=sum(file.stat().st_size for file in files.values()),
            sha256=sha256_of(files[args.out.suffix]),
            **measured,
            versions=receipts.versions(python))
        _keep(args, folder, files, found)
    return receipts.text(found)


def _photographs(args, config, settings) -> Photographs:
    if args.data and not args.images:
        raise ValueError('--data needs --images FOLDER')
    annotations, folder = (args.data, args.images) if args.data else \
        dataset_of(config, 'test_dataloader')
    return Photographs(annotations, folder, settings.classes, args.limit)


def _calibration(args, config, settings) -> Optional[np.ndarray]:
    """Images of the training set, if they are needed."""
    if args.precision != 'int8':
        return None
    folder = args.calibration
    if folder is None:
        annotations, folder = dataset_of(config, 'train_dataloader')
        paths = [
            path for _, path in Photographs(annotations, folder,
                                            settings.classes, 10**9).items
        ]
    elif not folder.is_dir():
        raise ValueError(f'--calibration {folder} is no folder')
    else:
        paths = [
            path for path in folder.iterdir()
            if path.suffix.lower() in ('.jpg', '.jpeg', '.png', '.bmp')
        ]
    return calibration_images(folder, paths, settings, args.calibration_images,
                              args.seed)


def _compare(args, folder: Path, files: Dict[str,
                                             Path], python: str, parts: tuple,
             photographs: Photographs, cell: support.Cell) -> dict:
    """Compares, and raises if the export is not good enough."""
    network, settings, anchors, test_cfg = parts
    heads = Heads(network, settings)
    tail = 'one_class' if args.to in ('frigate', 'coral') else \
        'hard' if args.nms == 'hard' else 'soft'
    config = dict(test_cfg)
    if tail == 'one_class':
        config.update(max_per_img=100, nms_pre=0)
    if args.candidates:
        config.update(nms_pre=args.candidates)

    def measure(kind: str, file: Path, tail: str, config: dict) -> dict:
        run = open_runtime(kind, file, python, folder / 'log.txt')
        try:
            return receipts.compare(heads, run, settings, photographs, anchors,
                                    config, tail)
        finally:
            run.close()

    file = files[args.out.suffix]
    measured = measure(args.to, file, tail, config)
    with_heads = folder / 'heads.tflite'
    if with_heads.exists():
        measured['heads'] = measure(args.to, with_heads, tail, config)['heads']
    receipts.judge(measured, args.precision, cell, args.max_ap_loss)
    beside = {}
    if args.to in ('mediapipe', 'frigate', 'coral'):
        beside['by MediaPipe, which suppresses across classes'] = measure(
            'ObjectDetector', file, 'one_class', config)['ap_artefact']
    if settings.resize == 'stretch':
        padded = replace(settings, resize='pad')
        beside['in PyTorch with resize pad'] = receipts.ap_of(
            heads, padded, photographs, anchors, test_cfg)
    return dict(measured, beside=beside)


def _keep(args, folder: Path, files: Dict[str, Path], found: dict) -> None:
    """Renames the files, once all are written, the receipt last."""
    moved = {} if args.verify else dict(files)
    for suffix, text in (('.receipt.txt', receipts.text(found)),
                         ('.receipt.json', receipts.dumps(found))):
        moved[suffix] = folder / suffix[1:]
        write_file(moved[suffix], text.encode())
    for suffix, file in moved.items():
        os.replace(file, args.out.with_suffix(suffix))
