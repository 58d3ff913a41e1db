"""What makes a training fail, found in config and data before it starts."""
from typing import List, Optional, Sequence, Tuple

import numpy as np
from mmdet.registry import DATASETS, TRANSFORMS
from mmengine.config import Config
from mmengine.dist import broadcast_object_list, get_rank
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .anchor_advisor import InputBoxes, Recall, best_iou, to_input
from .dataset_checks import (OF_EVALUATION, Finding, check_boxes,
                             check_class_order, check_evaluated, check_file,
                             check_overlap, check_training_set,
                             check_validation_set, verdict)
from .hooks import check_class_count, innermost
from .models import EfficientDetHead
from .raw_annotations import Annotations, read_annotations
from .registry import HOOKS

MIN_GROUP = 8  # images whose statistics a batch norm takes
MIN_RECALL = 0.3
MAX_SAMPLE = 1000  # images whose boxes are compared with the anchors


def check_recipe(cfg: Config, model: nn.Module,
                 num_gpus: int) -> List[Finding]:
    """Checks learning rate and batch norms for the real batch."""
    found = []
    batch = cfg.train_dataloader.get('batch_size', 1)
    optim = cfg.get('optim_wrapper', {})
    steps = optim.get('accumulative_counts', 1)
    scaling = cfg.get('auto_scale_lr') or {}
    base, real = scaling.get('base_batch_size'), num_gpus * batch * steps
    lr = optim.get('optimizer', {}).get('lr')
    if (lr and base and not scaling.get('enable')
            and not 0.5 < base / real < 2):
        found.append(
            Finding(
                False, 'learning_rate', 1,
                f'lr={lr:g} is for batches of {base}, but they are {real} '
                f'({num_gpus} GPUs x {batch} images x {steps} steps)',
                f'--auto-scale-lr, or lr={lr * real / base:.3g}; if it was '
                f'chosen for {real}, auto_scale_lr.base_batch_size={real}'))
    norms, sharing = _training_norms(cfg, model, num_gpus)
    group = batch * sharing
    if norms and group < MIN_GROUP:
        found.append(
            Finding(
                False, 'batch_norm', len(norms),
                f'{len(norms)} batch norms take their statistics from '
                f'{group} images', f'batches of {MIN_GROUP} or more, or '
                "norm_cfg=dict(type='GN', num_groups=8), or norm_eval=True of "
                'the model', tuple(norms[:3])))
    return found


def _training_norms(cfg: Config, model: nn.Module,
                    num_gpus: int) -> Tuple[List[str], int]:
    """Batch norms that take statistics, and over how many GPUs."""
    norms = {
        name: module
        for name, module in model.train().named_modules()
        if isinstance(module, _BatchNorm) and module.training
    }
    sync = cfg.get('sync_bn') or any(
        isinstance(norm, nn.SyncBatchNorm) for norm in norms.values())
    return list(norms), num_gpus if sync else 1


def check_last_batch(cfg: Config, model: nn.Module, num_gpus: int,
                     dataset) -> List[Finding]:
    """Checks that no batch norm gets one pixel of one image.

    torch raises there, at the end of the first epoch. The coarsest level has
    one pixel if the input is no larger than its stride.

    Args:
        cfg, model, num_gpus: See :func:`check_training`.
        dataset (Dataset | dict): Of the training. Built only if it matters.
    """
    loader = cfg.train_dataloader
    side = _input_side(cfg)
    norms, sharing = _training_norms(cfg, model, num_gpus)
    norms = [name for name in norms if not name.startswith('backbone.')]
    if not norms or not side or side > 2**(model.bbox_head.num_levels + 2):
        return []
    sampler = loader.get('sampler') or {}
    batches = loader.get('batch_sampler') or {}
    batch = last = batches.get('batch_size', loader.get('batch_size', 1))
    whole = (
        loader.get('drop_last') or batches.get('drop_last')
        or loader.get('num_batch_per_epoch') or sampler.get('infinite')
        or 'Infinite' in str(sampler.get('type')))
    if not whole and batch > 1:
        if isinstance(dataset, dict):
            dataset = DATASETS.build(dataset)
        images = -(-len(dataset) // num_gpus)
        if cfg.train_cfg.get('max_iters', images) >= images / batch:
            last = images % batch or batch
    if last * sharing > 1:
        return []
    return [
        Finding(
            True, 'last_batch', 1,
            f'the last of the batches, of up to {batch} images, has one '
            f'image, and at {side} pixels the coarsest level has one pixel, '
            'of which batch norms cannot take statistics',
            'train_dataloader.drop_last=True, or another batch_size')
    ]


def _input_side(cfg: Config) -> int:
    """The longer side of the largest input, or 0 where it is not known."""
    sides = []
    for part in innermost(cfg.train_dataloader.dataset):
        kinds = ('Resize', 'Crop', 'Pad', 'Mosaic', 'MixUp', 'Affine',
                 'Expand', 'Rotate')
        changing = [
            transform for transform in part.get('pipeline', []) if any(
                kind in str(transform.type) for kind in kinds)
        ]
        if not changing:
            return 0
        last, size = changing[-1], None
        if str(last.type).endswith('ResizeCrop'):
            size = last.image_size
        elif last.type == 'Resize' and not last.get('keep_ratio'):
            size = last.get('scale')
        if not size:
            return 0
        sides.append(np.max(size))
    divisor = cfg.model.data_preprocessor.get('pad_size_divisor', 1)
    return int(-(-max(sides) // divisor) * divisor)


def input_boxes(cfg: Config, parts: Sequence[Annotations]) -> InputBoxes:
    """Usable boxes of up to 1000 images, at the network's input size."""
    dataset = (cfg.get('test_dataloader') or cfg.train_dataloader).dataset
    transforms = [
        TRANSFORMS.build(transform)
        for transform in innermost(dataset)[0].get('pipeline', [])
    ]
    boxes, sizes = [np.zeros((0, 4))], [np.zeros((0, 2))]
    for part in parts:
        drawn = np.random.default_rng(0).permutation(len(part.paths))
        chosen = np.zeros(len(part.paths) + 1, bool)  # the last is for -1
        chosen[drawn[:MAX_SAMPLE // len(parts)]] = True
        usable = part.usable & chosen[part.image]
        boxes.append(part.boxes[usable])
        sizes.append(part.sizes[part.image[usable]])
    divisor = cfg.model.data_preprocessor.get('pad_size_divisor', 1)
    return to_input(
        np.concatenate(boxes), np.concatenate(sizes), transforms, divisor)


def check_anchors(head: nn.Module, data: InputBoxes) -> List[Finding]:
    """Checks that boxes have anchors that overlap them by half."""
    if not len(data.boxes):
        return []
    recall = Recall.of(best_iou(head.prior_generator, data, head.num_levels))
    if recall.recall >= MIN_RECALL:
        return []
    count = round((1 - recall.recall) * len(data.boxes))
    return [
        Finding(
            False, 'anchors', count,
            f'{count} of {len(data.boxes)} boxes, at the size of the input, '
            'have no anchor of IoU 0.5; each gets only its best one',
            'larger inputs, or the anchors that tools/check_dataset.py '
            'proposes')
    ]


def check_training(cfg: Config,
                   model: nn.Module,
                   train: Sequence[Annotations],
                   val: Sequence[Annotations],
                   num_gpus: int,
                   dataset=None) -> List[Finding]:
    """All that needs no image.

    Args:
        cfg (Config): As train.py has it.
        model (nn.Module): Built from it; put into training mode.
        train, val (Sequence[Annotations]): Files of both data sets.
        num_gpus (int): Number of processes.
        dataset (Dataset, optional): Of the training, if it has been built.
    """
    found = check_recipe(cfg, model, num_gpus)
    head = getattr(model, 'bbox_head', None)
    max_per_img = (cfg.model.get('test_cfg') or {}).get('max_per_img', 100)
    evaluated = _evaluated_files(cfg)
    for part in (*train, *val):
        try:
            check_class_count(
                getattr(head, 'num_classes', len(part.classes)), part.classes)
        except ValueError as error:
            found.append(
                Finding(True, 'num_classes', 1, str(error),
                        f'num_classes={len(part.classes)}'))
            continue
        found += [
            finding for finding in check_file(part)
            if finding.name not in OF_EVALUATION or evaluated
        ] + check_boxes(part, max_per_img)
    if not any(finding.error for finding in found):
        found += check_training_set(train) + check_validation_set(val)
        if isinstance(head, EfficientDetHead):
            if dataset is None and train:  # a format that is known
                dataset = cfg.train_dataloader.dataset
            if dataset is not None:
                found += check_last_batch(cfg, model, num_gpus, dataset)
            found += check_anchors(head, input_boxes(cfg, train))
    found += check_class_order(train, val) + check_overlap(train, val)
    for file in evaluated:
        found += check_evaluated(file, val)
    return list(dict.fromkeys(found))  # a file may stand in both


def _evaluated_files(cfg: Config) -> List[str]:
    """The files of COCO that the evaluation reads by itself."""
    evaluators = cfg.get('val_evaluator') or []
    if isinstance(evaluators, dict):
        evaluators = [evaluators]
    return [
        evaluator['ann_file'] for evaluator in evaluators
        if evaluator.get('ann_file')
        and str(getattr(evaluator['type'], '__name__',
                        evaluator['type'])).endswith('CocoMetric')
    ]


def read_all(dataset) -> List[Annotations]:
    """The files of a data set of MMDetection, or of its config."""
    parts = [
        DATASETS.build(dict(part, lazy_init=True))
        if isinstance(part, dict) else part for part in innermost(dataset)
    ]
    files = [read_annotations(part) for part in parts]
    return [file for file in files if file is not None]


@HOOKS.register_module()
class PreflightHook(Hook):
    """Stops before the first step what will fail, and logs warnings.

    The first process looks at the config and the annotation files, and all
    share its verdict. Images are not read; ``tools/check_dataset.py`` does.

    Args:
        enabled (bool): mmengine does not take None for a hook of ours, so it
            is turned off by ``--cfg-options
            default_hooks.preflight.enabled=False``. Defaults to True.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def before_train(self, runner) -> None:
        """Checks config, training data and validation data.

        Raises:
            ValueError: In all processes, if the training will fail.
        """
        if not self.enabled:
            return
        message: List[Optional[str]] = [None]
        if get_rank() == 0:
            try:
                message[0] = self._errors(runner)
            except Exception as error:  # others wait for the verdict
                runner.logger.warning('The pre-flight could not check this '
                                      f'training: {error!r}')
        broadcast_object_list(message)
        if message[0]:
            raise ValueError(message[0])

    def _errors(self, runner) -> str:
        model = runner.model
        if is_model_wrapper(model):
            model = model.module
        val = runner.val_dataloader if runner.val_loop is not None else None
        dataset = runner.train_dataloader.dataset
        found = check_training(
            runner.cfg, model, read_all(dataset),
            read_all(val.dataset) if val is not None else [],
            runner.world_size, dataset)
        for finding in found:
            if not finding.error:
                runner.logger.warning(
                    f'pre-flight, {finding.name}: {finding.text}. Fix: '
                    f'{finding.fix}')
        errors = [str(finding) for finding in found if finding.error]
        return '\n'.join([*errors, verdict(found)]) if errors else ''
