"""Writes ONNX files of a plain network, with or without suppression."""
import json
from typing import Optional, Tuple

import torch
from torch import Tensor, nn

from mmdet_efficientdet.deploy.network import PlainNetwork
from mmdet_efficientdet.deploy.postprocess import (NMS_PRE, decode, select,
                                                   suppress)
from mmdet_efficientdet.deploy.settings import DetectorSettings
from mmdet_efficientdet.models.anchors import AnchorBoxCoder
from mmdet_efficientdet.scaling import MAX_PER_IMG
from mmdet_efficientdet.utils import import_package

from .heads import Heads, freeze

OPSET = 17


class Suppression(torch.autograd.Function):
    """ONNX's ``NonMaxSuppression``, which PyTorch does not have."""

    @staticmethod
    def forward(ctx, boxes, scores, number, iou_threshold, min_score):
        """Any indices (image, class, box); only the exporter calls it."""
        return torch.zeros(1, 3, dtype=torch.long)

    @staticmethod
    def symbolic(g, boxes, scores, number, iou_threshold, min_score):
        """The operator."""
        return g.op('NonMaxSuppression', boxes, scores, number, iou_threshold,
                    min_score)


class RawHeads(nn.Module):
    """Deltas and logits of uint8 images.

    Args:
        heads (nn.Module): Frozen heads.
    """

    def __init__(self, heads: nn.Module) -> None:
        super().__init__()
        self.heads = heads
        self.eval()  # an exporter copies the mode of the outermost module

    def forward(self, images: Tensor) -> Tuple[Tensor, Tensor]:
        """Deltas ``(N, A, 4)`` and logits ``(N, A, K)``."""
        return self.heads(images.float())


class Detections(RawHeads):
    """Heads, selection, decoding and suppression.

    Args:
        heads (nn.Module): Frozen heads.
        anchors (Tensor): ``(A, 4)``.
        config (dict): The ``test_cfg`` of the detector's head.
        soft (bool): Whether suppression is that of ``config``, as one
            ``Loop``; else ``NonMaxSuppression`` with an IoU of 0.5.
        candidates (int): Pairs of anchor and class before suppression.
    """

    def __init__(self, heads: nn.Module, anchors: Tensor, config: dict,
                 soft: bool, candidates: int) -> None:
        super().__init__(heads)
        self.register_buffer('anchors', anchors)
        self.nms = dict(config.get('nms', {}))
        self.limit = config.get('max_per_img', MAX_PER_IMG)
        self.candidates = candidates
        self.script = torch.jit.script(suppress) if soft else None

    def forward(self, images: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Boxes ``(N, M, 4)``, scores and labels ``(N, M)``, best first.

        Args:
            images (Tensor): ``(N, H, W, 3)`` uint8, RGB.
        """
        deltas, logits = super().forward(images)
        num_classes = logits.shape[2]
        logits, index, labels = select(logits, self.candidates)
        boxes = decode(deltas, self.anchors, index, AnchorBoxCoder())
        scores = logits.sigmoid()
        if self.script is not None:
            return self.script(boxes, scores, labels, self.limit, **self.nms)
        classes = torch.arange(num_classes)
        by_class = scores[:, None] * (labels[:, None]
                                      == classes[:, None]).float()
        kept = Suppression.apply(boxes, by_class, torch.tensor([self.limit]),
                                 torch.tensor([0.5]), torch.tensor([0.0]))
        image, _, box = kept.unbind(1)
        place = image * scores.shape[1] + box
        mask = torch.zeros_like(scores).flatten().scatter(
            0, place, torch.ones_like(place, dtype=scores.dtype))
        mask = mask.reshape(-1, scores.shape[1])
        scores, index = (scores * mask).topk(
            min(self.limit, self.candidates), 1)
        boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4))
        return boxes, scores, labels.gather(1, index)


def write(network,
          settings: DetectorSettings,
          path: str,
          nms: str,
          anchors: Tensor,
          config: dict,
          candidates: Optional[int] = None,
          dynamic: bool = False) -> None:
    """Writes a file for uint8 images ``(N, H, W, 3)``.

    Args:
        network (PlainNetwork): The network.
        settings (DetectorSettings): Written into the metadata, too.
        path (str): The file.
        nms (str): 'none', 'hard' or 'soft'.
        anchors (Tensor): ``(A, 4)``.
        config (dict): The ``test_cfg`` of the detector's head.
        candidates (int, optional): See :class:`Detections`. Defaults to
            ``nms_pre`` of ``config``, and to all pairs if that is below 1.
        dynamic (bool): Whether the file takes all multiples of the network's
            ``divisor`` as height and width, instead of the size of
            ``settings``. Only for ``nms`` 'none'. Defaults to False.

    Raises:
        ValueError: If the package onnx is missing.
        RuntimeError: If PyTorch's exporter fails.
    """
    onnx = import_package('onnx', 'an export to ONNX or OpenVINO')
    size = settings.image_size
    if dynamic:
        size = [network.divisor] * 2
        even = PlainNetwork(**network.settings, even=True)
        even.load_state_dict(network.state_dict())
        heads = Heads(even, settings)
    else:
        heads = freeze(Heads(network, settings), size)
    images = torch.zeros(2, *size, 3, dtype=torch.uint8)
    if nms == 'none':
        module, names = RawHeads(heads), ['deltas', 'logits']
    else:
        number = candidates or config.get('nms_pre', NMS_PRE)
        pairs = len(anchors) * len(settings.classes)
        number = min(number, pairs) if number > 0 else pairs
        module = Detections(heads, anchors, config, nms == 'soft', number)
        names = ['boxes', 'scores', 'labels']
    axes = {name: {0: 'batch'} for name in ('images', *names)}
    facts = dict(vars(settings))
    if dynamic:
        axes['images'].update({1: 'height', 2: 'width'})
        for name in names:
            axes[name][1] = 'anchors'
        facts['size_divisor'] = network.divisor
    torch.onnx.export(
        module, (images, ),
        path,
        dynamo=False,
        opset_version=OPSET,
        input_names=['images'],
        output_names=names,
        dynamic_axes=axes)
    model = onnx.load(path)
    for key, value in facts.items():
        entry = model.metadata_props.add()
        entry.key = key
        entry.value = json.dumps(value, ensure_ascii=False)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise RuntimeError(str(error)) from error
    onnx.save(model, path)
