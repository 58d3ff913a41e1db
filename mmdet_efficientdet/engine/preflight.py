"""What makes a training fail, found in config and data before it starts."""
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Callable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
from mmdet.registry import DATASETS, TRANSFORMS
from mmengine.config import Config
from mmengine.dist import broadcast_object_list, get_rank
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from ..datasets.anchor_fit import InputBoxes, check_anchors, to_input
from ..datasets.annotation_checks import (NAMES, OF_EVALUATION, check_boxes,
                                          check_evaluated, check_file,
                                          check_splits)
from ..datasets.annotations import Annotations, read_annotations
from ..datasets.class_names import check_class_count
from ..datasets.findings import Finding, find, verdict
from ..datasets.transforms import misreading
from ..models import EfficientDetHead
from ..registry import HOOKS
from ..scaling import MAX_PER_IMG, dicts, innermost
from ..weights.conventions import differing_options
from .recipe_checks import (RESIZING, check_length, check_parity, check_recipe,
                            train_input)

LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')
EVALUATORS = ('val_evaluator', 'test_evaluator')
MAX_SAMPLE = 1000  # images whose boxes are compared with the anchors


def input_boxes(cfg: Config, parts: Sequence[Annotations]) -> InputBoxes:
    """Usable boxes of up to 1000 images, at the network's input size."""
    dataset = (cfg.get('test_dataloader') or cfg.train_dataloader).dataset
    transforms = [
        TRANSFORMS.build(transform)
        for transform in innermost(dataset)[0].get('pipeline', []) if any(
            kind in str(transform['type']) for kind in RESIZING)
    ]
    boxes, sizes, labels = [np.zeros((0, 4))], [np.zeros((0, 2))], [[]]
    for part in parts:
        drawn = np.random.default_rng(0).permutation(len(part.paths))
        chosen = np.zeros(len(part.paths) + 1, bool)  # the last is for -1
        chosen[drawn[:MAX_SAMPLE // len(parts)]] = True
        usable = part.usable & chosen[part.image]
        boxes.append(part.boxes[usable])
        sizes.append(part.sizes[part.image[usable]])
        labels.append(part.labels[usable])
    divisor = cfg.model.data_preprocessor.get('pad_size_divisor', 1)
    return to_input(*map(np.concatenate, (boxes, sizes, labels)), transforms,
                    divisor)


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
        dataset (Dataset, optional): Of the training, as the runner has built
            it. Defaults to None: all data sets are built, to see whether that
            fails.
    """
    built, unbuilt = _build(cfg, EVALUATORS)
    metrics = getattr(built.get('val_evaluator'), 'metrics', [])
    files = [*filter(None, (getattr(m, '_coco_api', None) for m in metrics))]
    head = getattr(model, 'bbox_head', None)
    limit = (cfg.model.get('test_cfg') or {}).get('max_per_img', MAX_PER_IMG)
    limit = limit if limit >= 0 else np.inf
    shown = _shown(files, head)
    found = check_recipe(cfg, model, num_gpus)
    found += find('misread', misreading(cfg.train_dataloader.dataset))
    for part in (*train, *val):
        found += check_head(model, part.classes) or filter(
            shown,
            check_file(part) + check_boxes(part, limit))
    if not _fails(found):
        found += check_splits(train, val)
    if not _fails(found):
        if dataset is None:
            built, faults = _build(cfg, LOADERS)
            dataset, unbuilt = built.get(LOADERS[0]), unbuilt + faults
        found += unbuilt
        if dataset is not None:
            found += check_length(cfg, model, num_gpus, len(dataset))
        if isinstance(head, EfficientDetHead) and train:
            data, size = input_boxes(cfg, train), train_input(cfg)
            found += check_anchors(head, data, train[0].classes)
            found += check_parity(size, data.inputs, head.num_levels)
    for file in files:
        found += check_evaluated(file.imgs, val)
    # One file may be for training and for validation.
    return list({str(finding): finding for finding in found}.values())


def _build(cfg: Config, keys: Sequence[str]) -> Tuple[dict, List[Finding]]:
    """Builds data sets and evaluators as the runner does."""
    built, found = {}, []
    for number, key in enumerate(keys):
        part = cfg.get(key)
        if part and part not in [cfg.get(other) for other in keys[:number]]:
            try:
                built[key] = (
                    DATASETS.build(part.dataset)
                    if key in LOADERS else Runner.build_evaluator(None, part))
            except Exception as error:  # every class raises its own
                problem = f'{type(error).__name__}: {error}'
                found.append(Finding('not_built', key=key, problem=problem))
    return built, found


def _fails(found: Sequence[Finding]) -> bool:
    return any(finding.error for finding in found)


def _shown(evaluated, head=None) -> Callable[[Finding], bool]:
    """Tells which findings matter to this evaluation and head."""
    hidden = set(() if evaluated else OF_EVALUATION)
    if getattr(head, 'ignore_iof_thr', None) is not None:
        hidden.add('ignored')
    return lambda finding: finding.name not in hidden


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


def _classes(dataset) -> Optional[Sequence[str]]:
    """Class names; VOC2007 and VOC2012 together have two metainfos."""
    metainfo = dataset.metainfo
    return (metainfo[0]
            if isinstance(metainfo, list) else metainfo).get('classes')


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
        if not _fails(found):
            dataset.full_init()
    except Exception as error:
        problem = f'{dataset.ann_file}: {type(error).__name__}: {error}'
        found = [f for f in check_splits(files, []) if f.error
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
        found = [
            finding for dataset in datasets
            for finding in check_head(model, _classes(dataset))
        ]
        yield from found
        if not all(hook.enabled for hook in _hooks(runner)):
            for dataset in datasets:
                yield from self._check_files(runner, dataset)
            yield from (f for f in check_splits(read_all(datasets[0]), [])
                        if f.name == 'no_boxes')
        elif not found:
            train, val, *_ = [*map(read_all, datasets), []]
            yield from check_training(runner.cfg, model, train, val,
                                      runner.world_size, datasets[0])

    def _check_test(self, runner) -> Iterator[Finding]:
        dataset = runner.test_dataloader.dataset
        yield from check_head(_unwrapped(runner.model), _classes(dataset))
        yield from self._check_files(runner, dataset)

    @staticmethod
    def _check_files(runner, dataset) -> Iterator[Finding]:
        """What makes a test fail, or only the classes if that is wanted."""
        enabled = all(hook.enabled for hook in _hooks(runner))
        evaluators = dicts(runner.cfg.get('test_evaluator'))
        shown = _shown(any(part.get('ann_file') for part in evaluators))
        for data in read_all(dataset):
            for finding in filter(shown, check_file(data)):
                if finding.error and (enabled or finding.name in NAMES):
                    yield finding


def _hooks(runner) -> List[PreflightHook]:
    return [hook for hook in runner.hooks if isinstance(hook, PreflightHook)]


def _unwrapped(model: nn.Module) -> nn.Module:
    while hasattr(model, 'module') and (is_model_wrapper(model)
                                        or not hasattr(model, 'bbox_head')):
        model = model.module
    return model
