"""What makes a training fail, found in config and data before it starts."""
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Callable, Iterator, List, Optional, Sequence

import numpy as np
from mmdet.registry import DATASETS, TRANSFORMS
from mmengine.config import Config
from mmengine.dist import broadcast_object_list, get_rank
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from torch import nn

from ..datasets.anchor_fit import InputBoxes, check_anchors, to_input
from ..datasets.annotation_checks import (NAMES, OF_EVALUATION, check_boxes,
                                          check_file)
from ..datasets.annotations import Annotations, read_annotations
from ..datasets.class_names import check_class_count, innermost
from ..datasets.findings import Finding, find, verdict
from ..datasets.split_checks import (check_class_order, check_evaluated,
                                     check_overlap, check_training_set,
                                     check_validation_set)
from ..datasets.transforms import misreading
from ..models import EfficientDetHead
from ..registry import HOOKS
from ..scaling import MAX_PER_IMG
from ..utils import shorten
from ..weights.conventions import differing_options
from .recipe_checks import check_last_batch, check_recipe

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
    found += find('misread', misreading(cfg.train_dataloader.dataset))
    head = getattr(model, 'bbox_head', None)
    limit = (cfg.model.get('test_cfg') or {}).get('max_per_img', MAX_PER_IMG)
    limit = limit if limit >= 0 else np.inf
    evaluated = _evaluated_files(cfg)
    hidden = () if evaluated else OF_EVALUATION
    if getattr(head, 'ignore_iof_thr', None) is not None:
        hidden = (*hidden, 'ignored')
    for part in (*train, *val):
        found += check_head(model, part.classes) or [
            finding for finding in check_file(part) + check_boxes(part, limit)
            if finding.name not in hidden
        ]
    if not any(finding.error for finding in found):
        found += check_training_set(train) + check_validation_set(val)
    if (isinstance(head, EfficientDetHead)
            and not any(finding.error for finding in found)):
        if dataset is None and train:  # a format that can be read
            dataset = cfg.train_dataloader.dataset
        if dataset is not None:
            found += check_last_batch(cfg, model, num_gpus, dataset)
        found += check_anchors(head, input_boxes(cfg, train))
    found += check_class_order(train, val) + check_overlap(train, val)
    for file in evaluated:
        found += check_evaluated(file, val)
    # One file may be for training and for validation.
    return list({str(finding): finding for finding in found}.values())


def check_head(model: nn.Module, classes: Optional[Sequence]) -> List[Finding]:
    """Checks that the head of a detector has one output for each class."""
    if classes is None:
        return []
    head = getattr(model, 'bbox_head', None)
    number = len(classes)
    try:
        check_class_count(getattr(head, 'num_classes', number), classes)
    except ValueError as error:
        return [Finding('num_classes', problem=error, number=number)]
    return []


def check_objects(dataset) -> List[Finding]:
    """Checks that there are objects of each class, if no file lists them."""
    classes = dataset.metainfo.get('classes')
    # Some parts may have no objects at all: all are counted together.
    parts = [
        part for part in innermost(dataset) if not hasattr(part, 'cat_ids')
        and hasattr(part, 'get_data_info') and len(part)
    ]
    if not classes or not parts:
        return []
    seen = {
        instance['bbox_label']
        for part in parts
        for index in range(len(part))
        for instance in part.get_data_info(index).get('instances', [])
    }
    unseen = [name for i, name in enumerate(classes) if i not in seen]
    values = dict(
        file=', '.join(str(part.ann_file) for part in parts),
        names=shorten(unseen))
    return find('no_objects', unseen, lambda _: '', not seen, **values)


def _evaluated_files(cfg: Config, key: str = 'val_evaluator') -> List[str]:
    """The files of COCO that the evaluation reads by itself."""
    evaluators = cfg.get(key) or []
    if isinstance(evaluators, dict):
        evaluators = [evaluators]
    return [
        part['ann_file'] for part in evaluators if part.get('ann_file')
        # a name, or a class
        and str(part['type']).rstrip("'>").endswith('CocoMetric')
    ]


def read_all(dataset) -> List[Annotations]:
    """Reads the files of a data set of MMDetection, or of its config."""
    parts = [
        DATASETS.build(dict(part, lazy_init=True))
        if isinstance(part, dict) else part for part in innermost(dataset)
    ]
    files = [read_annotations(part) for part in parts]
    return [file for file in files if file is not None]


@contextmanager
def in_plain_words(*datasets: dict) -> Iterator[None]:
    """Says what is wrong with the files of data sets if something fails.

    Args:
        datasets (dict): Their configs.

    Raises:
        ValueError: With all findings; other errors are left as they are.
    """
    try:
        yield
    except Exception as error:  # every parser raises its own
        found = []
        with suppress(Exception):  # the config is wrong
            for part in chain(*map(innermost, datasets)):
                found += _check_readable(part)
        if not found:
            raise
        raise ValueError('\n'.join([*map(str, found),
                                    verdict(found, 'run')])) from error


def _check_readable(dataset: dict) -> List[Finding]:
    """What stops MMDetection from reading a data set."""
    dataset, files = DATASETS.build(dict(dataset, lazy_init=True)), []
    try:
        files = read_all(dataset)
        found = [*chain(*map(check_file, files))]
        if not any(finding.error for finding in found):
            dataset.full_init()
    except Exception as error:
        problem = f'{dataset.ann_file}: {type(error).__name__}: {error}'
        found = [fault for fault in check_training_set(files) if fault.error
                 ] or [Finding('annotation_file', problem=problem)]
    return [f for f in found if f.error and f.name not in OF_EVALUATION]


@HOOKS.register_module(name=['PreflightHook', 'ClassCheckHook'])
class PreflightHook(Hook):
    """Stops before the first step what will fail, and logs warnings.

    The first process checks the config and the annotation files, and all
    processes raise its errors. Images are not read, which
    ``tools/check_dataset.py`` does. A config may have the hook more than
    once; only the first one works.

    Args:
        enabled (bool): Whether to check all; otherwise only the classes of
            the config are compared with those of head and data. Set it by
            ``--cfg-options default_hooks.preflight.enabled=False``. Defaults
            to True.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def before_train(self, runner) -> None:
        """Checks config, training data and validation data.

        Raises:
            ValueError: In all processes, if the training will fail.
        """
        self._stop_all(runner, self._check_training, 'training')

    def before_test(self, runner) -> None:
        """Checks the classes and files of the test data.

        Raises:
            ValueError: In all processes, if the test will fail.
        """
        self._stop_all(runner, self._check_test, 'test')

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Warns where weights were trained with other settings."""
        meta, model = checkpoint.get('meta') or {}, runner.cfg.get('model', {})
        if (self is not _hooks(runner)[0]
                or not str(model.get('type')).endswith('EfficientDet')):
            return
        options = differing_options(meta, model)
        if options:
            runner.logger.warning(
                'The weights of the checkpoint were trained with other '
                'settings than those of the config. To use the settings of '
                f'the checkpoint, add\n  --cfg-options {" ".join(options)}')

    def _stop_all(self, runner, check: Callable, run: str) -> None:
        """Checks in the first process, and raises errors in all of them."""
        if self is not _hooks(runner)[0]:
            return
        found, warn = [], runner.logger.warning
        if get_rank() == 0:
            try:
                for finding in check(runner):
                    found.append(finding)
                    if not finding.error:
                        warn(f'pre-flight, {finding.name}: {finding.text}. '
                             f'Fix: {finding.fix}')
            except Exception as error:  # the other processes are waiting
                warn(f'The pre-flight could not check this {run}: '
                     f'{type(error).__name__}: {error}')
        # Training and validation data may have the same error.
        errors = dict.fromkeys(str(f) for f in found if f.error)
        message = ['\n'.join([*errors, verdict(found, run)] if errors else [])]
        broadcast_object_list(message)
        if message[0]:
            raise ValueError(message[0])

    def _check_training(self, runner) -> Iterator[Finding]:
        model = _unwrapped(runner.model)
        datasets = [runner.train_dataloader.dataset]
        if runner.val_loop is not None:
            datasets.append(runner.val_dataloader.dataset)
        found = check_objects(datasets[0])
        for dataset in datasets:
            found += check_head(model, dataset.metainfo.get('classes'))
        yield from found
        if not all(hook.enabled for hook in _hooks(runner)):
            for dataset in datasets:
                yield from self._check_files(runner, dataset)
        elif not any(finding.error for finding in found):
            train, val, *_ = [*map(read_all, datasets), []]
            yield from check_training(runner.cfg, model, train, val,
                                      runner.world_size, datasets[0])

    def _check_test(self, runner) -> Iterator[Finding]:
        dataset = runner.test_dataloader.dataset
        yield from check_head(
            _unwrapped(runner.model), dataset.metainfo.get('classes'))
        yield from self._check_files(runner, dataset)

    @staticmethod
    def _check_files(runner, dataset) -> Iterator[Finding]:
        """What makes a test fail, or only the classes if that is wanted."""
        enabled = all(hook.enabled for hook in _hooks(runner))
        evaluated = _evaluated_files(runner.cfg, 'test_evaluator')
        hidden = () if evaluated else OF_EVALUATION
        for data in read_all(dataset):
            for finding in check_file(data):
                if finding.error and (finding.name in NAMES or enabled
                                      and finding.name not in hidden):
                    yield finding


def _hooks(runner) -> List[PreflightHook]:
    return [hook for hook in runner.hooks if isinstance(hook, PreflightHook)]


def _unwrapped(model: nn.Module) -> nn.Module:
    while hasattr(model, 'module') and (is_model_wrapper(model)
                                        or not hasattr(model, 'bbox_head')):
        model = model.module
    return model
