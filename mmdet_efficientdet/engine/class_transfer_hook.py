"""Changes the classes of a checkpoint when a training starts."""
from pathlib import Path

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import BaseLoop

from ..datasets.class_names import check_class_count
from ..models import EfficientDetHead
from ..registry import HOOKS
from ..utils import shorten
from ..weights.class_transfer import transfer_classes
from ..weights.conventions import class_names, meta_of


@HOOKS.register_module()
class ClassTransferHook(Hook):
    """Changes the classes of a ``load_from`` checkpoint to those of the data.

    The config must have ``transfer_classes = True``. Otherwise the hook raises
    an error if the names differ. It does nothing when a training is resumed
    and in a test.
    """

    priority = 'VERY_HIGH'  # EMAHook copies what this one changes

    def before_train(self, runner) -> None:
        """Raises if no checkpoint was loaded although the config names one.

        With --resume, MMDetection's script ignores load_from, even if there
        is nothing to resume yet.
        """
        file = runner.cfg.filename
        if (runner._resume and not runner._has_loaded and file
                and Path(file).is_file()):
            load_from = Config.fromfile(
                file, import_custom_modules=False).get('load_from')
            if load_from:
                raise ValueError(
                    f'--resume found no checkpoint in {runner.work_dir}, and '
                    f'load_from={load_from!r} of the config is not loaded '
                    'with --resume, so the training would start from scratch: '
                    'leave out --resume until there is something to resume')
        if self._wanted(runner) and not runner._has_loaded:
            raise ValueError(
                'transfer_classes=True needs a checkpoint, and none was '
                'loaded: set load_from, leave out --resume until there is one '
                'to resume, or inherit another recipe (docs/training.md)')

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Replaces the rows of the class predictor and logs a receipt."""
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
        old = class_names(meta_of(checkpoint))
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
                'Set transfer_classes=True beside load_from: classes with the '
                'same name keep what was learned, the others start anew')

    @staticmethod
    def _wanted(runner) -> bool:
        wanted = runner.cfg.get('transfer_classes', False)
        if not isinstance(wanted, bool):
            raise ValueError(
                f'transfer_classes={wanted!r} must be True or False; the '
                'classes are those of the training data')
        return wanted
