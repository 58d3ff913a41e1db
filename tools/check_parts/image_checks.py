"""Reads all images of an annotation file, for check_dataset.py."""
import sys
from typing import List

import mmcv
import numpy as np
from mmengine.fileio import get
from mmengine.utils import track_iter_progress

from mmdet_efficientdet.datasets.annotation_checks import MIN_FAULTS
from mmdet_efficientdet.datasets.annotations import Annotations
from mmdet_efficientdet.datasets.findings import Finding, find


def check_images(data: Annotations, progress: bool = False) -> List[Finding]:
    """Reads all images that are not left out; this is the slow part."""
    needed = list(range(len(data.paths)))
    if data.filter_empty and not data.test_mode:
        needed = np.unique(data.image[data.wanted]).tolist()
    lists = dict(missing=[], unreadable=[], image_size=[])
    for i in (track_iter_progress(needed, file=sys.stderr)
              if progress and needed else needed):
        path, (height, width) = data.paths[i], data.sizes[i]
        try:
            image = mmcv.imfrombytes(get(path, data.backend_args))
        except FileNotFoundError:
            lists['missing'].append(path)
            continue
        except Exception:  # every library raises its own
            image = None
        if image is None:
            lists['unreadable'].append(path)
        elif image.shape[:2] != (height, width):
            lists['image_size'].append(
                f'{path}: {image.shape[1]}x{image.shape[0]}, the file says '
                f'{width:g}x{height:g}')
    # Of COCO's files, indices may leave out these very images.
    fatal = dict.fromkeys(lists, data.categories is None or not data.partial)
    fatal['image_size'] = len(lists['image_size']) > max(
        len(needed) / 2, MIN_FAULTS)
    values = dict(file=data.file, total=len(needed))
    return [
        finding for name, faults in lists.items()
        for finding in find(name, faults, error=fatal[name], **values)
    ]
