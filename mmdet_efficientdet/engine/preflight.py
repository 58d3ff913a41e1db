"""What makes a training fail, found in config and data before it starts."""
import json
from typing import List, Optional, Sequence

import numpy as np
from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS, TRANSFORMS
from mmengine.config import Config
from mmengine.dist import broadcast_object_list, get_rank
from mmengine.fileio import get_text
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from torch import nn

from ..datasets.anchor_fit import InputBoxes, Recall, best_iou, to_input
from ..datasets.annotation_checks import (OF_EVALUATION, Finding, check_boxes,
                                          check_file, verdict)
from ..datasets.annotations import Annotations, read_annotations
from ..datasets.class_names import (check_class_count, check_class_names,
                                    innermost, reads_like)
from ..datasets.split_checks import (check_class_order, check_evaluated,
                                     check_overlap, check_training_set,
                                     check_validation_set)
from ..models import EfficientDetHead
from ..registry import HOOKS
from ..utils import shorten
from ..weights.conventions import differing_options
from .recipe_checks import check_last_batch, check_recipe

MIN_RECALL = 0.3
MAX_SAMPLE = 1000  # images whose boxes are compared with the anchors


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


@HOOKS.register_module()
class ClassCheckHook(Hook):
    """Stops before the first step if head, names and annotations disagree.

    Left alone, such a run trains to the end with an AP of zero, or with
    classes that have changed places.
    """

    def before_train(self, runner) -> None:
        """Checks the training and the validation data."""
        dataset = runner.train_dataloader.dataset
        self._check(runner, dataset)
        _check_objects(runner, dataset)
        if runner.val_loop is not None:
            self._check(runner, runner.val_dataloader.dataset)

    def before_test(self, runner) -> None:
        """Checks the test data."""
        self._check(runner, runner.test_dataloader.dataset)

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Warns where weights were made for other settings."""
        meta, model = checkpoint.get('meta') or {}, runner.cfg.get('model', {})
        if not str(model.get('type')).endswith('EfficientDet'):
            return
        options = differing_options(meta, model)
        if options:
            runner.logger.warning(
                'The checkpoint was made with other settings than this '
                'config has. To take its own, add\n  --cfg-options '
                f'{" ".join(options)}')

    def _check(self, runner, dataset) -> None:
        model = runner.model
        while is_model_wrapper(model) or not hasattr(model, 'bbox_head'):
            if not hasattr(model, 'module'):
                return
            model = model.module
        classes = dataset.metainfo.get('classes')
        if classes is None:
            return
        check_class_count(
            getattr(model.bbox_head, 'num_classes', len(classes)), classes)
        for part in innermost(dataset):
            if not (hasattr(part, 'cat_ids')
                    and reads_like(part, CocoDataset)):
                continue
            if tuple(classes) == part.METAINFO.get('classes'):
                if len(part.cat_ids) == len(classes):
                    continue  # COCO itself; its file is slow to read
            text = get_text(part.ann_file, backend_args=part.backend_args)
            categories = json.loads(text)['categories']
            check_class_names(classes, [c['name'] for c in categories],
                              part.ann_file)


def _check_objects(runner, dataset) -> None:
    """Where no file lists the classes, the objects have to tell them."""
    classes = dataset.metainfo.get('classes')
    # One part may well hold nothing but negatives: all count together.
    parts = [
        part for part in innermost(dataset) if len(part)
        and not hasattr(part, 'cat_ids') and hasattr(part, 'get_data_info')
    ]
    if not classes or not parts:
        return
    seen = {
        instance['bbox_label']
        for part in parts
        for index in range(len(part))
        for instance in part.get_data_info(index).get('instances', [])
    }
    unseen = [name for i, name in enumerate(classes) if i not in seen]
    files = ', '.join(str(part.ann_file) for part in parts)
    message = (f'{files} has no object of the classes {shorten(unseen)}. '
               'Write names as they are in the annotations')
    if not seen:
        raise ValueError(message)
    if unseen:
        runner.logger.warning(message)
