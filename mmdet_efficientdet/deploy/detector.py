"""Boxes in pictures by a released detector, without MMDetection and MMCV."""
import math
import os
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .anchors import AnchorGenerator, decode_boxes
from .network import PlainNetwork, load_plain
from .pictures import (SUFFIXES, enlarged_size, is_video, read_picture,
                       read_video, resize, scaled_size, to_rgb)
from .postprocess import detect, join
from .releases import CONFIG, WEIGHTS, find_release
from .settings import DetectorSettings

THRESHOLD = 0.3  # lowest score of a box, unless another is given
MAX_PIXELS = 1 << 26  # of an input; more would exhaust the memory
_PICTURE = (str, os.PathLike, np.ndarray, Image.Image)
Picture = Union[_PICTURE]


@dataclass
class Detections:
    """What was found in a picture, the best box first.

    Args:
        boxes (np.ndarray): ``(n, 4)`` float32, (x1, y1, x2, y2) in pixels of
            the picture, within it.
        scores (np.ndarray): ``(n, )`` float32, of 0 to 1.
        labels (np.ndarray): ``(n, )`` int64, positions in
            ``Detector.classes``.
        names (list[str]): Class name of each box.
        path (str): Of the picture; '' if it was not read from a file.
        error (str): Why a picture among several could not be read, or ''.
        frame (int): Of a video, from 0; else None.
    """
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), 'f4'))
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0, 'f4'))
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, 'i8'))
    names: List[str] = field(default_factory=list)
    path: str = ''
    error: str = ''
    frame: Optional[int] = None


class Detector:
    """Finds boxes in pictures. ``classes`` lists the class names.

    Args:
        network (PlainNetwork): Of any precision; it is used in float32.
        settings (DetectorSettings): Of its input and boxes.
        device (str | torch.device, optional): Defaults to the GPU, if there
            is one, else the CPU.

    Raises:
        ValueError: If network and settings do not fit each other.
    """

    def __init__(self,
                 network: PlainNetwork,
                 settings: DetectorSettings,
                 device: Optional[str] = None) -> None:
        device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
        self.device = torch.device(device)
        self.network = network.float().to(self.device)
        self.settings, self.classes = settings, settings.classes
        self.mean, self.std = (
            torch.tensor(x, device=self.device).view(1, 3, 1, 1)
            for x in (settings.mean, settings.std))
        try:
            self.generator = AnchorGenerator(**settings.anchors)
            self.least = float(settings.test_cfg.get('score_thr', 0))
            wanted = len(self.classes), *self.generator.num_base_priors
            given = itemgetter('num_classes', 'num_anchors')(network.settings)
            if given != wanted:
                raise ValueError(f'classes, and anchors for a cell: {given} '
                                 f'of the network, {wanted} of the settings')
            found = self._predict(
                torch.zeros(1, 3, 128, 128, device=self.device))
            if not all(x.isfinite().all() for x in found):
                raise ValueError('boxes and scores are not finite')
        except (ArithmeticError, LookupError, RuntimeError, TypeError,
                ValueError) as error:
            raise ValueError('network and settings of the detector do not '
                             f'fit: {error}') from error

    def __call__(
            self,
            pictures: Union[Picture, Sequence[Picture]],
            threshold: float = THRESHOLD
    ) -> Union[Detections, List[Detections]]:
        """Finds boxes in one or several pictures.

        Args:
            pictures: A file, an array uint8 ``(H, W, 3)``, RGB, or ``(H,
                W)``, or a picture of Pillow; a list of such; a folder; or a
                video file, also in a list.
            threshold (float): The lowest score of a box. Defaults to 0.3.

        Returns:
            Detections | list[Detections]: A list for a list, a video, or a
            folder, whose pictures are sorted by name. A picture of a list or
            folder that cannot be read has an ``error`` there.

        Raises:
            ValueError: If a single picture cannot be read, or a folder has
                none.
        """
        if os.path.isdir(_path(pictures)):
            pictures = pictures_in(pictures)
        if is_video(_path(pictures)):
            return list(self._frames(pictures, threshold))
        if isinstance(pictures, _PICTURE):
            return self._detect(pictures, threshold)
        return list(self.each(pictures, threshold))

    def each(self,
             pictures: Sequence[Picture],
             threshold: float = THRESHOLD) -> Iterator[Detections]:
        """As a call with a list, one by one; a video frame by frame."""
        for picture in pictures:
            try:
                if is_video(_path(picture)):
                    yield from self._frames(picture, threshold)
                else:
                    yield self._detect(picture, threshold)
            except (OSError, ValueError) as error:
                yield Detections(path=_path(picture), error=str(error))

    def _frames(self, path: str, threshold: float) -> Iterator[Detections]:
        for number, frame in enumerate(read_video(path)):
            found = self._detect(frame, threshold)
            yield replace(found, path=_path(path), frame=number)

    @torch.no_grad()
    def _detect(self, picture: Picture, threshold: float) -> Detections:
        path = _path(picture)
        picture = read_picture(path) if path else to_rgb(picture)
        shape = picture.shape[:2]
        size, padded = self._sizes(shape)
        if math.prod(padded) > MAX_PIXELS:
            raise ValueError(
                f'{path or "the picture"} of {shape[1]}x{shape[0]} pixels '
                f'would be an input of {padded[1]}x{padded[0]}; the limit is '
                f'{MAX_PIXELS:,} pixels. Cut it into parts')
        pixels = resize(picture, size, self.device)
        if self.settings.resize == 'factor':
            pixels = pixels.round()  # as MMDetection's Resize does
        pixels = (pixels - self.mean) / self.std
        boxes, scores, labels = self._predict(
            F.pad(pixels, (0, padded[1] - size[1], 0, padded[0] - size[0])))
        ratio = [size[i] / shape[i] for i in (1, 0)] * 2
        boxes = boxes / boxes.new_tensor(ratio)
        boxes = boxes.minimum(boxes.new_tensor(shape[::-1] * 2)).clamp(min=0)
        keep = (scores > self.least) & (scores >= threshold)
        boxes, scores, labels = (
            x[keep].cpu().numpy() for x in (boxes, scores, labels))
        names = [self.classes[i] for i in labels]
        return Detections(boxes, scores, labels, names, path)

    def _sizes(self, shape: Sequence[int]) -> Tuple[tuple, tuple]:
        """Height and width after resizing, and after padding."""
        side = tuple(self.settings.image_size)
        if self.settings.resize == 'pad':
            return scaled_size(shape, side)[1], side
        if self.settings.resize == 'stretch':
            return side, side
        size = enlarged_size(shape, self.settings.factor)
        return size, tuple(-(-n // m) * m for n, m in zip(size, side))

    @torch.no_grad()
    def _predict(self, images: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Boxes ``(n, 4)`` in pixels of the input, scores and labels."""
        maps = self.network(images)
        anchors = self.generator.grid_priors([x.shape[-2:] for x in maps[0]],
                                             images.shape[-2:], self.device)
        found = detect(
            join(maps[0], len(self.classes)), join(maps[1], 4),
            torch.cat(anchors), SimpleNamespace(decode=decode_boxes),
            self.settings.test_cfg)
        return tuple(x[0] for x in found)


def _path(picture: Picture) -> str:
    named = isinstance(picture, (str, os.PathLike))
    return os.fspath(picture) if named else ''


def pictures_in(folder: str) -> List[str]:
    """The pictures of a folder, without those of its subfolders.

    Raises:
        ValueError: If there are none.
    """
    found = sorted(
        str(path) for path in Path(folder).iterdir()
        if path.suffix.lower() in SUFFIXES or is_video(path))
    if not found:
        raise ValueError(f'the folder {folder} has no pictures '
                         f'({", ".join(SUFFIXES)})')
    return found


def load_detector(source: str, device: Optional[str] = None) -> Detector:
    """Loads a released detector. Its files are data; none is executed.

    Args:
        source (str): A folder, a name, or an address; see
            :func:`find_release`.
        device (str | torch.device, optional): See :class:`Detector`.

    Raises:
        ValueError: If it is not found, damaged, or no release.
    """
    folder = find_release(source)
    settings = DetectorSettings.load(folder / CONFIG)
    return Detector(load_plain(folder / WEIGHTS), settings, device)
