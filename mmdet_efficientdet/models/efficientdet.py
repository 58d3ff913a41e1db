"""EfficientDet (arXiv 1911.09070)."""
from typing import Tuple

from mmdet.models.detectors import SingleStageDetector
from torch import Tensor

from ..registry import MODELS
from ..scaling import MIN_SIDE
from .layers import NormEvalMixin, size_of
from .loss_guard import check_finite
from .plain_predict import PlainPredictMixin
from .strict_loading import StrictLoading

# The only layer whose weights depend on the classes.
CLASS_PREDICTOR = 'bbox_head.conv_cls.pointwise'


@MODELS.register_module()
class EfficientDet(PlainPredictMixin, StrictLoading, NormEvalMixin,
                   SingleStageDetector):
    """EfficientNet, BiFPN and the shared heads.

    Loading a checkpoint that does not fit raises an error, also in
    MMDetection's tools, which otherwise only log missing keys.

    Args:
        backbone, neck, bbox_head (dict): Configs of the three parts.
        with_cp (bool): Gradient checkpointing: recomputes backbone, neck and
            head in the backward pass to save memory. Defaults to False, which
            leaves it to the ``with_cp`` of each part.
        norm_eval (bool): Keeps all batch norms in evaluation mode while
            training, to fine-tune a trained detector with small batches.
            Scales and offsets are still learned. Defaults to False.
        max_loss (float): Training stops if a loss is not below it. A sound
            training starts with a few units, and with up to 64,000 for D7x
            and 1203 classes if no image of a batch has objects. Defaults to
            1e5.
        fast_predict (bool): Predicts with the folded network, see
            :class:`PlainPredictMixin`. Defaults to True.
        kwargs: Further arguments of MMDetection's ``SingleStageDetector``.
    """

    def __init__(self,
                 backbone: dict,
                 neck: dict,
                 bbox_head: dict,
                 with_cp: bool = False,
                 norm_eval: bool = False,
                 max_loss: float = 1e5,
                 fast_predict: bool = True,
                 **kwargs) -> None:
        parts = (backbone, neck, bbox_head)
        if with_cp:
            parts = [dict(part, with_cp=True) for part in parts]
        super().__init__(*parts, **kwargs)
        self.norm_eval = norm_eval
        self.max_loss = max_loss
        self.fast_predict = fast_predict

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
        """Returns the losses.

        Raises:
            NonFiniteLossError: If a loss is not finite and below ``max_loss``.
        """
        _note_shape(batch_inputs, batch_data_samples)
        losses = super().loss(batch_inputs, batch_data_samples)
        check_finite(losses, self, batch_inputs, batch_data_samples,
                     self.max_loss)
        return losses

    def predict(self,
                batch_inputs: Tensor,
                batch_data_samples: list,
                rescale: bool = True) -> list:
        """Adds ``pred_instances`` to the samples and returns them.

        The arguments are those of MMDetection's ``SingleStageDetector``.
        """
        _note_shape(batch_inputs, batch_data_samples)
        network = self.current_plain_network()
        if network is None or min(batch_inputs.shape[-2:]) < MIN_SIDE:
            return super().predict(batch_inputs, batch_data_samples, rescale)
        results = self.bbox_head.predict_by_feat(
            *network(batch_inputs),
            batch_img_metas=[x.metainfo for x in batch_data_samples],
            rescale=rescale)
        return self.add_pred_to_datasample(batch_data_samples, results)

    def explain_mismatch(self, shapes: dict) -> str:
        """Returns what to do if only the number of classes differs.

        Args:
            shapes (dict): Key to (checkpoint's shape, model's shape).
        """
        given, own = shapes.get(f'{CLASS_PREDICTOR}.bias', ((), ()))
        if not given or any(CLASS_PREDICTOR not in k for k in shapes):
            return ''
        num_priors = self.bbox_head.num_base_priors
        return (f'The checkpoint predicts {given[0] / num_priors:g} classes, '
                f'this model {own[0] / num_priors:g}. Use a checkpoint of '
                'the same classes, or convert this one to your classes: set '
                'transfer_classes=True beside load_from in the training '
                'config, or run tools/convert_checkpoint.py --classes. ')


def _note_shape(batch_inputs: Tensor, batch_data_samples: list) -> None:
    """Tells the head the input's size, also without the preprocessor."""
    for sample in batch_data_samples:
        sample.set_metainfo(dict(batch_input_shape=size_of(batch_inputs)))
