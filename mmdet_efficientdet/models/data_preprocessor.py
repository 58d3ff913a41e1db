"""The preprocessor for rectangular inputs."""
from typing import List, Tuple, Union

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

    def __init__(self,
                 *args,
                 pad_size_divisor: Union[int, Tuple[int, int]] = 1,
                 **kwargs) -> None:
        pair = isinstance(pad_size_divisor, (list, tuple))
        sides = pad_size_divisor if pair else (pad_size_divisor, ) * 2
        # mmengine divides the shape (3, height, width) by it.
        divisor = torch.tensor([1, *sides], device='cpu')
        super().__init__(*args, pad_size_divisor=divisor, **kwargs)

    def forward(self, data: dict, training: bool = False) -> dict:
        """Normalizes and pads the images, in a list or in one tensor."""
        return super().forward(
            dict(data, inputs=list(data['inputs'])), training)

    def _get_pad_shape(self, data: dict) -> List[Tuple[int, int]]:
        sides = self.pad_size_divisor[1:].tolist()
        return [
            tuple(-(-n // side) * side for n, side in zip(x.shape[1:], sides))
            for x in data['inputs']
        ]
