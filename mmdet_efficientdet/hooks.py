"""Hooks of the shipped configs."""
import json

from mmdet.datasets import CocoDataset
from mmengine.fileio import get_text
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from .conventions import differing_options
from .registry import HOOKS


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


def check_class_count(num_classes: int, classes) -> None:
    """Raises a ValueError unless a head has one output for each name."""
    if isinstance(classes, str):
        raise ValueError(
            f'classes={classes!r} is a string; write a list, such as '
            f'[{classes!r}]')
    if num_classes != len(classes):
        raise ValueError(
            f'the head has num_classes={num_classes}, but the dataset '
            f'{len(classes)} classes {shorten(classes)}. Set both '
            "together in the config: scale_config(_base_, '<size>', "
            "classes=['<name>', ...])")


def check_class_names(classes, names, file: str) -> None:
    """Raises a ValueError unless a file's categories are those of a config."""
    if list(classes) != [name for name in names if name in classes]:
        # MMDetection numbers classes in the order of the file.
        raise ValueError(f'the classes {shorten(classes)} do not fit {file}, '
                         f'which has {shorten(names)}. Write names of that '
                         'file, in the same order')


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


def innermost(dataset) -> list:
    """The datasets inside wrappers such as RepeatDataset."""
    if hasattr(dataset, 'datasets'):
        return [d for part in dataset.datasets for d in innermost(part)]
    if hasattr(dataset, 'dataset'):
        return innermost(dataset.dataset)
    return [dataset]


def reads_like(dataset, kind: type) -> bool:
    """Whether a dataset is of this kind and reads its file as that does.

    LVIS has fields of its own, and Objects365 sorts the classes.
    """
    return (isinstance(dataset, kind)
            and type(dataset).load_data_list is kind.load_data_list)


def shorten(classes) -> str:
    """The first ten names, for a message."""
    names = ', '.join(map(repr, classes[:10]))
    return f'({names}{", ..." if len(classes) > 10 else ""})'
