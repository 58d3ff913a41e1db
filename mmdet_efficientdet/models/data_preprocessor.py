"""The preprocessor for rectangular inputs."""
import numpy as np
import torch
from mmdet.models import DetDataPreprocessor

from ..registry import MODELS


@MODELS.register_module()
class RectDataPreprocessor(DetDataPreprocessor):
    """MMDetection's, which can also pad to a rectangle.

    Images that ``ResizeCrop`` has fitted into (height, width) are padded to
    the whole of it, as in the official code. So the network's input depends
    neither on an image's shape nor on the other images of the batch.

    Args:
        pad_size_divisor (int | tuple[int]): One divisor of both sides, or
            that of (height, width). Defaults to 1.
        kwargs: Further arguments of MMDetection's ``DetDataPreprocessor``.
    """

    def __init__(self, *args, pad_size_divisor=1, **kwargs) -> None:
        # mmengine divides the shape (3, height, width) by it.
        sides = np.broadcast_to(pad_size_divisor, 2).tolist()
        divisor = torch.tensor([1, *sides], device='cpu')
        super().__init__(*args, pad_size_divisor=divisor, **kwargs)

    def forward(self, data: dict, training: bool = False) -> dict:
        """Normalizes and pads the images, in a list or in one tensor."""
        data = dict(data, inputs=list(data['inputs']))
        return super().forward(data, training)

    def _get_pad_shape(self, data: dict) -> list:
        step = self.pad_size_divisor.numpy()
        shapes = [-(-np.array(x.shape) // step) * step for x in data['inputs']]
        return [tuple(shape[1:].tolist()) for shape in shapes]
