"""The data transform of google/automl ``efficientdet/dataloader.py``."""
from typing import List, Optional, Tuple, Union

import cv2
import numpy as np
from mmcv.transforms import BaseTransform

from ..deploy.pictures import scaled_size
from ..registry import TRANSFORMS
from ..scaling import dicts

# MMDetection's that take float32 for 0-1, or do not take it, or contain such.
UINT8 = ('Albu', 'AutoAugment', 'AutoContrast', 'Corrupt', 'Equalize',
         'Posterize', 'RandAugment', 'YOLOXHSVRandomAug')


@TRANSFORMS.register_module()
class ResizeCrop(BaseTransform):
    """Resizes to fit, or by a random factor, and crops at random.

    The image keeps its aspect ratio and is resized to fit ``ratio *
    image_size``. The new size is computed in float32 and truncated. The
    interpolation is bilinear, in float32 and without antialiasing, and so is
    the result. Transforms behind this one that expect uint8 misread it; in
    place of MMDetection's ``Resize`` use ``to_float32=False``. The image is
    then cropped to at most ``image_size`` at a random offset. It is not
    padded, which the preprocessor does. Boxes are clipped to ``[0, side - 1]``
    and removed if no area is left.

    The ``scale_factor`` (w, h) is that of the truncated size. Boxes are
    multiplied by it, and predicted boxes divided. The official code divides
    by one scale for both axes, which moves boxes of long images.

    Random numbers come from ``numpy.random``, which ``SeedTransforms`` seeds.

    Required keys: img, gt_bboxes, gt_bboxes_labels, gt_ignore_flags (the
    last three optionally). Modified: the same, img_shape. Added:
    scale_factor, keep_ratio.

    Args:
        image_size (int | tuple[int]): Side of the square crop, or (height,
            width), in pixels.
        ratio_range (tuple[float]): Range of the factor. Defaults to (1, 1),
            which keeps the whole image, as in testing. The official scale
            jitter in training is (0.1, 2.0).
        half_pixel_centers (bool): Whether pixel ``i`` of the result samples
            the original at ``(i + 0.5) * in / out - 0.5``, as OpenCV, PyTorch
            and the current official code do. If False, it samples at ``i *
            in / out``, as TensorFlow 1's ``resize_images`` did, which the
            official code used until July 2020. The image content is then
            shifted by ``0.5 * (1 - out / in)`` pixels to the lower right.
            Defaults to True.
        to_float32 (bool): Whether the image is float32 afterwards, as in the
            official code. If False, it is rounded to the type that it had.
            Defaults to True.

    Raises:
        ValueError: If an argument is out of range, or the pipeline loads
            masks.
    """

    def __init__(
        self,
        image_size: Union[int, Tuple[int, int]],
        ratio_range: Tuple[float, float] = (1.0, 1.0),
        half_pixel_centers: bool = True,
        to_float32: bool = True,
    ) -> None:
        pair = isinstance(image_size, (list, tuple))
        sides = tuple(image_size) if pair else (image_size, ) * 2
        if len(sides) != 2 or any(not isinstance(n, int) or n < 1
                                  for n in sides):
            raise ValueError(f'image_size={image_size!r} must be a positive '
                             'int or a pair (height, width) of them')
        if len(ratio_range) != 2 or not 0 < ratio_range[0] <= ratio_range[1]:
            raise ValueError(f'ratio_range={ratio_range} must be a pair '
                             '(low, high) with 0 < low <= high')
        self.image_size = sides
        self.ratio_range = tuple(ratio_range)
        self.half_pixel_centers = half_pixel_centers
        self.to_float32 = to_float32

    def transform(self, results: dict) -> Optional[dict]:
        """Resizes and crops the image and its boxes."""
        if {'gt_masks', 'gt_seg_map'} & results.keys():
            raise ValueError('ResizeCrop cannot crop masks; load annotations '
                             'with_mask=False, with_seg=False, or use Resize '
                             'of mmdet')
        ratio = np.random.uniform(*self.ratio_range)
        shape = results['img'].shape[:2]
        scaled = scaled_size(shape, self.image_size, ratio)[1]
        # Both numbers are always drawn, even if the offset can only be 0.
        offset = [
            int(max(0, n - side) * np.random.uniform())
            for n, side in zip(scaled, self.image_size)
        ]
        dtype = results['img'].dtype
        crop = tuple(
            slice(start, min(start + side, n))
            for start, side, n in zip(offset, self.image_size, scaled))
        resize = resize_part if self.half_pixel_centers else resize_from_corner
        image = resize(results['img'], scaled, crop)
        if not self.to_float32 and np.issubdtype(dtype, np.integer):
            image = image.round().astype(dtype)
        results['img'] = image
        results['img_shape'] = image.shape[:2]
        results['scale_factor'] = (scaled[1] / shape[1], scaled[0] / shape[0])
        results['keep_ratio'] = True
        if 'gt_bboxes' in results:
            self._transform_boxes(results, offset)
        return results

    def _transform_boxes(self, results: dict, offset: list) -> None:
        boxes = results['gt_bboxes']
        boxes.rescale_(results['scale_factor'])
        boxes.translate_((-offset[1], -offset[0]))
        boxes.clip_([side - 1 for side in self.image_size])
        keep = (boxes.areas > 0).numpy()
        results['gt_bboxes'] = boxes[keep]
        for key in ('gt_bboxes_labels', 'gt_ignore_flags'):
            if key in results:
                results[key] = results[key][keep]

    def __repr__(self) -> str:
        return (f'{type(self).__name__}(image_size={self.image_size}, '
                f'ratio_range={self.ratio_range}, '
                f'half_pixel_centers={self.half_pixel_centers}, '
                f'to_float32={self.to_float32})')


def misreading(dataset: dict) -> List[str]:
    """Names of transforms that would misread the float32 of a ResizeCrop.

    Args:
        dataset (dict): Config of a dataset, perhaps of a wrapper.
    """
    names = []
    for part in dicts(dataset):
        behind = False
        for transform in part.get('pipeline', []):
            for node in dicts(transform):  # a type is a name or a class
                kind = str(node.get('type')).rstrip("'>").rpartition('.')[2]
                names += [kind] * (behind and kind in UINT8)
                if kind == 'ResizeCrop':
                    behind = node.get('to_float32', True)
    return names


def resize_part(image: np.ndarray, size: Tuple[int, int],
                part: Tuple[slice, slice]) -> np.ndarray:
    """Resizes bilinearly in float32 and returns a part of the result.

    OpenCV resizes the image only up to the last pixel that the part samples.
    Its pixels are those of the whole resized image, but for the last bits if
    OpenCV uses Intel's IPP.

    Args:
        image (np.ndarray): ``(H, W, ...)``.
        size (tuple[int]): New height and width.
        part (tuple[slice]): Rows and columns of the result, not empty.
    """
    if image.shape[:2] == size:
        return image[part].astype(np.float32)
    factors = [new / old for old, new in zip(image.shape, size)]
    cut = image[tuple(
        slice(int((kept.stop - 0.5) / factor - 0.5) + 3)
        for kept, factor in zip(part, factors))]
    if any(round(n * f) != n for n, f in zip(cut.shape, factors)):
        image = cut  # else OpenCV would copy it
    source = np.empty(image.shape, np.float32)
    rows = slice(None)
    if factors[0] < 0.25:  # some rows are left out and may have any value
        rows = (np.arange(part[0].stop) + 0.5) / factors[0] - 0.501
        rows = (rows.astype(int)[:, None] + range(3)).clip(max=len(image) - 1)
    source[rows] = image[rows]
    resized = cv2.resize(source, None, fx=factors[1], fy=factors[0])
    return resized[part]


def resize_from_corner(image: np.ndarray, size: Tuple[int, int],
                       part: Tuple[slice, slice]) -> np.ndarray:
    """Resizes bilinearly, with pixel positions at corners, not at centres.

    This is TensorFlow's ``resize_bilinear`` with ``half_pixel_centers=False``
    and ``align_corners=False``. OpenCV and PyTorch have no equivalent. The
    arguments are those of :func:`resize_part`.
    """
    image = image.astype(np.float32)
    for axis, (old, new, kept) in enumerate(zip(image.shape, size, part)):
        place = np.arange(new, dtype=np.float32)[kept] * np.float32(old / new)
        low = place.astype(int)
        weight = (place - low).astype(np.float32)
        weight = weight.reshape(-1, *[1] * (image.ndim - axis - 1))
        first = image.take(low, axis)
        second = image.take(np.minimum(low + 1, old - 1), axis)
        image = first + (second - first) * weight
    return image
