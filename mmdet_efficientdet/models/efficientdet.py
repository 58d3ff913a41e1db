"""EfficientDet (arXiv 1911.09070)."""
from typing import Tuple

from mmdet.models.detectors import SingleStageDetector
from torch import Tensor

from ..registry import MODELS
from ..scaling import MIN_SIDE
from .layers import freeze_statistics
from .loss_guard import check_finite
from .strict_loading import StrictLoading

# All that depends on the classes; what stands before it serves them together.
CLASS_PREDICTOR = 'bbox_head.conv_cls.pointwise'


@MODELS.register_module()
class EfficientDet(StrictLoading, SingleStageDetector):
    """EfficientNet, BiFPN and the shared heads.

    A checkpoint that does not fit raises when it is loaded, also by the stock
    tools, which by themselves would only log what is missing.

    Args:
        backbone, neck, bbox_head (dict): Configs of the three parts.
        with_cp (bool): Gradient checkpointing: backbone, neck and head are
            recomputed in the backward pass to save memory. Defaults to False:
            each part has its own switch.
        norm_eval (bool): Keeps all batch norms in evaluation mode while
            training, for small batches on top of a trained detector. Their
            scales and offsets are still learned. Defaults to False.
        kwargs: See the host's ``SingleStageDetector``.
    """

    def __init__(self,
                 backbone: dict,
                 neck: dict,
                 bbox_head: dict,
                 with_cp: bool = False,
                 norm_eval: bool = False,
                 **kwargs) -> None:
        if with_cp:
            backbone, neck, bbox_head = (
                dict(part, with_cp=True)
                for part in (backbone, neck, bbox_head))
        super().__init__(backbone, neck, bbox_head, **kwargs)
        self.norm_eval = norm_eval

    def train(self, mode: bool = True) -> 'EfficientDet':
        """Switches the mode, except for norms that stay in evaluation."""
        super().train(mode)
        if mode and self.norm_eval:
            freeze_statistics(self)
        return self

    def extract_feat(self, batch_inputs: Tensor) -> Tuple[Tensor, ...]:
        """Returns the neck's features of images ``(N, 3, H, W)``.

        Raises:
            ValueError: If a side is below ``MIN_SIDE`` pixels.
        """
        height, width = batch_inputs.shape[-2:]
        if min(height, width) < MIN_SIDE:
            raise ValueError(
                f'input of {height}x{width} pixels is too small: both sides '
                f'must be at least {MIN_SIDE}. Pad the images '
                '(data_preprocessor.pad_size_divisor) or enlarge image_size')
        return super().extract_feat(batch_inputs)

    def loss(self, batch_inputs: Tensor, batch_data_samples: list) -> dict:
        """Returns the losses, all of them finite.

        Raises:
            NonFiniteLossError: If one is not, with the images of the batch.
        """
        losses = super().loss(batch_inputs, batch_data_samples)
        check_finite(losses, self, batch_inputs, batch_data_samples)
        return losses

    def explain_mismatch(self, shapes: dict) -> str:
        """Says it plainly when only the number of classes differs.

        Args:
            shapes (dict): Key to (checkpoint's shape, model's shape).
        """
        given, own = shapes.get(f'{CLASS_PREDICTOR}.bias', ((), ()))
        if not given or any(CLASS_PREDICTOR not in k for k in shapes):
            return ''
        num_priors = self.bbox_head.num_base_priors
        return (f'The checkpoint predicts {given[0] / num_priors:g} classes, '
                f'this model {own[0] / num_priors:g}. Use a checkpoint of '
                'the same classes, or turn this one into one for yours: '
                'transfer_classes=True beside load_from in the config of a '
                'training, or tools/convert_checkpoint.py --classes. ')
