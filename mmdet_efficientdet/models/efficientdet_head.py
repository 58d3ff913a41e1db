"""The head of EfficientDet: class net, box net, loss and post-processing.

It behaves as google/automl ``efficientdet/tf2/efficientdet_keras.py`` (nets),
``det_model_fn.py`` (loss), ``tf2/postprocess.py`` and ``nms_np.py``.
"""
import math
from functools import partial
from typing import List, Optional, Sequence, Tuple

import torch
from mmcv.cnn import build_activation_layer
from mmdet.models.dense_heads import AnchorHead
from mmdet.utils import reduce_mean
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from ..deploy.postprocess import detect, join
from ..registry import MODELS
from .anchors import AnchorGenerator, anchor_targets, background_weights
from .layers import (BN_CFG, SWISH_CFG, ConvInitMixin, SeparableConv2d,
                     build_norm, recompute)
from .settings import check_head

PARTS = dict(
    anchor_generator=dict(type='mmdet_efficientdet.AnchorGenerator'),
    bbox_coder=dict(type='mmdet_efficientdet.AnchorBoxCoder'),
    loss_cls=dict(
        type='mmdet_efficientdet.FocalLoss',
        use_sigmoid=True,
        gamma=1.5,
        alpha=0.25),
    # 50 * Huber(delta) / 4 is 12.5 * delta * SmoothL1(beta=delta), delta = 0.1
    loss_bbox=dict(type='mmdet.SmoothL1Loss', beta=0.1, loss_weight=1.25))


@MODELS.register_module()
class EfficientDetHead(ConvInitMixin, AnchorHead):
    """Two nets of separable convolutions that all levels share.

    Each level has its own norm after every convolution. There are no residual
    connections. Convolutions and norms are kept in separate lists, so a
    checkpoint contains each tensor once.

    Args:
        num_classes (int): Number of classes, without background.
        in_channels (int): Width of the features and of both nets.
        stacked_convs (int): Convolutions before the predictor. Defaults to 3.
        num_levels (int): Number of pyramid levels. Defaults to 5.
        norm_cfg (dict, optional): Defaults to batch norm with TensorFlow's
            constants; None for no norm.
        act_cfg (dict): Defaults to SiLU (swish).
        sync_num_pos (bool): Divides both losses by the mean number of
            positive anchors over all ranks plus 1, as most heads of
            MMDetection do. Defaults to False: each rank divides by the number
            of its own batch plus 1, as in the official recipe on TPUs.
        ignore_iof_thr (float, optional): Background anchors of which a larger
            share lies in one ignored region (``iscrowd``, ``difficult``)
            cost nothing, such as 0.5, MMDetection's value for crowds.
            Defaults to None: such regions are background, as in the official
            code.
        with_cp (bool): Recomputes each net, level by level, in the backward
            pass to save memory. Defaults to False.
        identity_init (bool): Starts the pointwise convolutions before the
            predictors as the identity, with which short trainings learn
            faster. ``init_cfg`` takes its place. Defaults to False, the
            official start.
        train_cfg (dict, optional): Must be empty.
        test_cfg (dict, optional): ``nms_pre`` (5000), the number of pairs of
            anchor and class to select from an image. ``nms``, arguments of
            :func:`suppress`, such as ``dict(type='soft_nms', sigma=0.5)`` or
            ``dict(type='nms', iou_threshold=0.5)``. ``max_per_img`` (100),
            the number of boxes to keep, -1 for all. ``score_thr`` (0), below
            which boxes are dropped. ``clip_boxes`` (True), whether the final
            boxes are clipped to the image; the official ones are not, but
            have the same scores, classes and order. ``min_bbox_size`` (-1),
            in pixels: boxes with a side that is not larger are dropped; 0
            drops those beyond the image.
        init_cfg (dict, optional): Defaults to the official initialisers.
        parts: ``anchor_generator``, by default that of D0. ``bbox_coder``, by
            default without clamps. ``loss_cls``, summed over all anchors and
            classes, then divided by the number of positive anchors of the
            batch plus 1. ``loss_bbox``, summed over the targets that are not
            zero and divided by the same number; the default equals the
            official ``50 * Huber(0.1) / 4``. ``reg_decoded_bbox=True``: it
            compares boxes instead of coded deltas.

    Raises:
        ValueError: If a setting is unknown, or a part cannot be used.
    """

    prior_probability = 0.01  # initial score of each class

    def __init__(self,
                 num_classes: int,
                 in_channels: int,
                 stacked_convs: int = 3,
                 num_levels: int = 5,
                 norm_cfg: Optional[dict] = BN_CFG,
                 act_cfg: dict = SWISH_CFG,
                 sync_num_pos: bool = False,
                 ignore_iof_thr: Optional[float] = None,
                 with_cp: bool = False,
                 identity_init: bool = False,
                 train_cfg: Optional[dict] = None,
                 test_cfg: Optional[dict] = None,
                 init_cfg: Optional[dict] = None,
                 **parts) -> None:
        parts = {**PARTS, **parts}
        check_head(train_cfg, test_cfg or {}, parts)
        self.stacked_convs = stacked_convs
        self.num_levels = num_levels
        self.norm_cfg = norm_cfg
        self.act_cfg = act_cfg
        self.sync_num_pos = sync_num_pos
        self.ignore_iof_thr = ignore_iof_thr
        self.with_cp = with_cp
        self.identity_init = identity_init
        super().__init__(
            num_classes,
            in_channels,
            in_channels,
            test_cfg=test_cfg,
            init_cfg=init_cfg,
            **parts)

    def _init_layers(self) -> None:
        """Builds both nets."""
        width = self.feat_channels

        def convs() -> nn.ModuleList:
            return nn.ModuleList(
                SeparableConv2d(width, width)
                for _ in range(self.stacked_convs))

        def norms() -> nn.ModuleList:
            return nn.ModuleList(
                nn.ModuleList(
                    build_norm(self.norm_cfg, width)
                    for _ in range(self.num_levels))
                for _ in range(self.stacked_convs))

        self.act = build_activation_layer(self.act_cfg)
        self.cls_convs, self.reg_convs = convs(), convs()
        self.cls_norms, self.reg_norms = norms(), norms()
        num_priors = self.num_base_priors
        self.conv_cls = SeparableConv2d(width,
                                        num_priors * self.cls_out_channels)
        self.conv_reg = SeparableConv2d(width, num_priors * 4)

    def init_kernel(self, conv: nn.Conv2d) -> None:
        """Draws from variance scaling: scale 1, fan-in, truncated normal.

        The fan-in of a depthwise kernel is counted over all channels, as
        TensorFlow does.
        """
        fan_in = math.prod(conv.kernel_size) * conv.in_channels
        # Truncation at two deviations leaves 0.8796 of one.
        std = 1 / math.sqrt(fan_in) / .87962566
        nn.init.trunc_normal_(conv.weight, std=std, a=-2 * std, b=2 * std)

    def hidden_convs(self) -> List[nn.Module]:
        """Those before both predictors."""
        return [*self.cls_convs, *self.reg_convs]

    def init_weights(self) -> None:
        """Follows ``init_cfg``, or also sets the prior of the classes."""
        super().init_weights()
        if not self.init_cfg:
            odds = (1 - self.prior_probability) / self.prior_probability
            nn.init.constant_(self.conv_cls.pointwise.bias, -math.log(odds))

    def forward(self,
                feats: Sequence[Tensor]) -> Tuple[List[Tensor], List[Tensor]]:
        """Predicts class scores and boxes on every level.

        Args:
            feats (Sequence[Tensor]): One ``(N, C, H_i, W_i)`` for each level.

        Returns:
            tuple[list]: ``cls_scores``, logits ``(N, A * K, H_i, W_i)``, and
            ``bbox_preds``, deltas ``(N, A * 4, H_i, W_i)`` as (dx, dy, dw,
            dh) of each anchor.

        Raises:
            ValueError: If the number of levels is not ``num_levels``.
        """
        if len(feats) != self.num_levels:
            raise ValueError(
                f'the head got {len(feats)} levels but was built with '
                f'num_levels={self.num_levels}; set num_levels of the head '
                'to num_outs of the neck')
        nets = ((self.cls_convs, self.cls_norms, self.conv_cls),
                (self.reg_convs, self.reg_norms, self.conv_reg))
        return tuple(self._run_net(feats, *net) for net in nets)

    def _run_net(self, feats: Sequence[Tensor], convs: nn.ModuleList,
                 norms: nn.ModuleList, predictor: nn.Module) -> List[Tensor]:
        """Runs one of the two nets on every level."""

        def run(x: Tensor, level: int) -> Tensor:
            for conv, level_norms in zip(convs, norms):
                x = self.act(level_norms[level](conv(x)))
            return predictor(x)

        if self.with_cp and self.training:
            run = partial(recompute, run, norms=norms)
        return [run(x, level) for level, x in enumerate(feats)]

    def _anchors(self, maps: List[Tensor], img_metas: List[dict]) -> Tensor:
        """The anchors ``(A, 4)`` of all levels."""
        return torch.cat(
            self.prior_generator.grid_priors([x.shape[-2:] for x in maps],
                                             img_metas[0]['batch_input_shape'],
                                             maps[0].device))

    def _flatten(self, maps: List[Tensor], width: int) -> Tensor:
        """Joins level maps ``(N, A * width, H, W)`` to ``(N, *, width)``."""
        # Losses and decoding need at least single precision.
        dtype = torch.promote_types(maps[0].dtype, torch.float32)
        return join(maps, width).to(dtype)

    def loss_by_feat(self,
                     cls_scores: List[Tensor],
                     bbox_preds: List[Tensor],
                     batch_gt_instances: List[InstanceData],
                     batch_img_metas: List[dict],
                     batch_gt_instances_ignore: Optional[list] = None) -> dict:
        """The two losses of a batch.

        Args:
            cls_scores, bbox_preds (list[Tensor]): See :meth:`forward`.
            batch_gt_instances (list): ``bboxes`` and ``labels`` of each image.
            batch_img_metas (list[dict]): With ``batch_input_shape``.
            batch_gt_instances_ignore (list, optional): ``bboxes`` of the
                ignored regions of each image; see ``ignore_iof_thr``.

        Returns:
            dict: Scalars ``loss_cls`` and ``loss_bbox``.
        """
        bboxes, labels = zip(*((gt.bboxes, gt.labels)
                               for gt in batch_gt_instances))
        anchors = self._anchors(cls_scores, batch_img_metas)
        # A subclass may place its anchors anywhere.
        regular = type(self.prior_generator) is AnchorGenerator
        sizes = [x.shape[-2:] for x in cls_scores] if regular else None
        labels, deltas, num_positive = anchor_targets(anchors, bboxes, labels,
                                                      self.num_classes,
                                                      self.bbox_coder, sizes)
        if self.sync_num_pos:
            num_positive = reduce_mean(num_positive.float())
        avg_factor = num_positive + 1.0
        cls_scores = self._flatten(cls_scores, self.cls_out_channels)
        weight = None
        if self.ignore_iof_thr is not None:
            weight = background_weights(anchors, labels == self.num_classes,
                                        batch_gt_instances_ignore or (),
                                        self.ignore_iof_thr).flatten()
        loss_cls = self.loss_cls(
            cls_scores.flatten(0, 1),
            labels.flatten(),
            weight,
            avg_factor=avg_factor)
        # The official code masks by value and not by anchor: a coordinate
        # whose target is exactly 0 costs nothing.
        preds, weight = self._flatten(bbox_preds, 4), deltas != 0
        if self.reg_decoded_bbox:
            weight = (labels < self.num_classes)[..., None].expand_as(deltas)
            # Not equal to the target, where some losses have 0 / 0
            preds = preds.masked_fill(~weight, 1)
            preds, deltas = (
                self.bbox_coder.decode(anchors, x) for x in (preds, deltas))
        loss_bbox = self.loss_bbox(
            preds.flatten(0, 1),
            deltas.flatten(0, 1),
            weight=weight.flatten(0, 1).float(),
            avg_factor=avg_factor)
        return dict(loss_cls=loss_cls, loss_bbox=loss_bbox)

    def predict_by_feat(self,
                        cls_scores: List[Tensor],
                        bbox_preds: List[Tensor],
                        score_factors: Optional[list] = None,
                        batch_img_metas: Optional[List[dict]] = None,
                        cfg: Optional[dict] = None,
                        rescale: bool = False,
                        with_nms: bool = True) -> List[InstanceData]:
        """Turns predictions into boxes.

        Args:
            cls_scores, bbox_preds (list[Tensor]): See :meth:`forward`.
            score_factors (None): Not used.
            batch_img_metas (list[dict]): With ``batch_input_shape``. The
                ``scale_factor`` (w, h), for ``rescale``, defaults to 1. Boxes
                are clipped to ``ori_shape``, or to ``img_shape`` without
                ``rescale``, if it is there.
            cfg (dict, optional): Used instead of ``test_cfg``.
            rescale (bool): Whether to map boxes to the original image.
            with_nms (bool): Whether to suppress boxes; else all selected ones
                are returned.

        Returns:
            list[InstanceData]: ``bboxes`` ``(n, 4)``, xyxy in pixels,
            ``scores`` and ``labels`` ``(n, )``, best first.
        """
        cfg = cfg or self.test_cfg or {}
        bboxes, scores, labels = detect(
            self._flatten(cls_scores, self.cls_out_channels),
            self._flatten(bbox_preds, 4),
            self._anchors(cls_scores, batch_img_metas), self.bbox_coder, cfg,
            with_nms)
        results = []
        for i, img_meta in enumerate(batch_img_metas):
            result = InstanceData(
                bboxes=bboxes[i], scores=scores[i], labels=labels[i])
            keep = result.scores > cfg.get('score_thr', 0.0)
            if rescale:
                result.bboxes = result.bboxes / result.bboxes.new_tensor(
                    img_meta.get('scale_factor', (1.0, 1.0))).repeat(2)
            shape = img_meta.get('ori_shape' if rescale else 'img_shape')
            if shape and cfg.get('clip_boxes', True):
                result.bboxes = clip_boxes_to_image(result.bboxes, shape[:2])
            least = cfg.get('min_bbox_size', -1)
            if least >= 0:
                sides = result.bboxes[:, 2:] - result.bboxes[:, :2]
                keep &= (sides > least).all(1)
            results.append(result[keep])
        return results
