"""Transfers a checkpoint to other classes when a training starts."""
from pathlib import Path

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import BaseLoop

from ..datasets.class_names import check_class_count
from ..models import EfficientDetHead
from ..registry import HOOKS
from ..utils import shorten
from ..weights.class_transfer import transfer_classes
from ..weights.sources import class_names


@HOOKS.register_module()
class ClassTransferHook(Hook):
    """Fits the checkpoint of ``load_from`` to the classes of the training.

    It does so when the config says ``transfer_classes = True``; otherwise it
    raises where the names differ. Resuming and testing are left alone.
    """

    priority = 'VERY_HIGH'  # EMAHook copies what this one changes

    def before_train(self, runner) -> None:
        """Raises if there is nothing to start or to transfer from.

        With --resume, MMDetection's script forgets load_from, also where
        there is nothing to resume yet.
        """
        file = runner.cfg.filename
        if (runner._resume and not runner._has_loaded and file
                and Path(file).is_file()):
            load_from = Config.fromfile(
                file, import_custom_modules=False).get('load_from')
            if load_from:
                raise ValueError(
                    f'--resume found no checkpoint in {runner.work_dir}, and '
                    f'with it load_from={load_from!r} of the config is not '
                    'loaded, so that the training would start from nothing: '
                    'leave out --resume until there is something to resume')
        if self._wanted(runner) and not runner._has_loaded:
            raise ValueError(
                'transfer_classes=True needs a checkpoint, and none was '
                'loaded: set load_from, and leave out --resume until there '
                'is something to resume')

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Replaces the rows of the class predictor, and logs a receipt."""
        # Until a training starts, the loop is a config.
        if runner._resume or not isinstance(runner._train_loop, BaseLoop):
            return
        wanted = self._wanted(runner)
        head = next((module for module in runner.model.modules()
                     if isinstance(module, EfficientDetHead)), None)
        if head is None:
            if wanted:
                raise ValueError('transfer_classes=True is for models with '
                                 'EfficientDetHead; this model has none')
            return
        classes = runner.train_dataloader.dataset.metainfo.get('classes')
        old = class_names(checkpoint.get('meta') or {})
        if not wanted and (not old or classes is None):
            return
        check_class_count(head.num_classes, classes or ())
        if wanted:
            new, receipt = transfer_classes(checkpoint, classes, head)
            checkpoint.update(new)
            runner.logger.info('\n'.join(['Transferred classes:', *receipt]))
        elif old != list(classes):
            raise ValueError(
                f'the checkpoint is for {len(old)} classes {shorten(old)}, '
                f'the training data has {len(classes)} {shorten(classes)}. '
                'Set transfer_classes=True beside load_from: what was learned '
                'is kept for classes of equal names, and others start anew')

    @staticmethod
    def _wanted(runner) -> bool:
        wanted = runner.cfg.get('transfer_classes', False)
        if not isinstance(wanted, bool):
            raise ValueError(
                f'transfer_classes={wanted!r} must be True or False; the '
                'classes are those of the training data')
        return wanted
