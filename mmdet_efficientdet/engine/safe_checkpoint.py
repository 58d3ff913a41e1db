"""Checkpoints that survive an interruption and hold plain data only."""
import os.path as osp
import re
from collections import deque
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from mmengine.dist import (all_reduce, broadcast_object_list, get_comm_device,
                           is_main_process)
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.hooks import CheckpointHook
from mmengine.logging import HistoryBuffer
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

from ..registry import HOOKS
from ..utils import plain_data
from ..weights.sources import check_integrity
from .atomic_backend import AtomicBackend
from .work_dir import find_checkpoint, lock_folder

# Names of numbers without their prefix, the most wanted first. The last are
# all but the AP of a class.
WANTED = (r'(bbox_)?m?AP', r'\w+_m?AP', r'(\w+_)?m?AP[_@]?\d+',
          r'(\w+_)?AR@\d+', r'recall@.*', r'(?!.*_precision$).*')
NAME_IT = ('name it by default_hooks.checkpoint.save_best, and set '
           'default_hooks.checkpoint.rule to greater or less')


@contextmanager
def _together():
    """Raises an OSError of the first rank on all ranks.

    Only the first rank writes files. Without this, the others would wait for
    it forever.
    """
    failure = [None]
    try:
        yield
    except OSError as error:
        failure = [error]
    broadcast_object_list(failure)
    if failure[0] is not None:
        raise failure[0]


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """Saves checkpoints in an order that never leaves a run without one.

    The hook writes the new file under a temporary name and renames it, then
    writes ``last_checkpoint``, which ``--resume`` reads, and removes old files
    last. mmengine's hook removes old files first. The best checkpoint is
    handled in the same way. If the disk is full, the last good checkpoint is
    kept. If ``out_dir`` is not on a local disk, its file backend writes the
    files.

    The checkpoints hold plain data and no Python objects. mmengine stores its
    log history as pickled objects and some numbers as NumPy scalars. torch >=
    2.6 refuses such files with ``weights_only=True``, and an allowlist for
    them would have to include ``getattr``. This hook stores them as lists and
    numbers and restores the history when the run is resumed, so that every
    tool can load a checkpoint with ``weights_only=True``.

    ``save_best='auto'`` takes the mean AP, wherever the evaluator puts it, and
    if there is none, AP at one IoU, then recall. mmengine takes the first
    number, which may be the AP of one class.

    Args:
        kwargs: See mmengine's ``CheckpointHook``.
    """

    _best_first = False  # True while the best checkpoint is being saved

    def before_run(self, runner) -> None:
        """Finds what to resume; mmengine takes its path as it was saved."""
        if runner._resume and runner._load_from is None:
            runner._load_from = find_checkpoint(runner.work_dir,
                                                self.filename_tmpl,
                                                bool(self.out_dir))

    def before_train(self, runner) -> None:
        """Locks the folders and removes half-written files in them.

        Raises:
            BlockingIOError: If another training has one of the folders.
            ValueError: If an iteration-based loop would save by epochs, or
                the evaluator has no number of the name in ``save_best``.
        """
        backend = get_file_backend(self.out_dir or runner.work_dir)
        self._last = osp.join(runner.work_dir, 'last_checkpoint')
        if (self.backend_args is None and self.file_client_args is None
                and type(backend) is LocalBackend):
            self.backend_args = dict(
                backend='mmdet_efficientdet.atomic',
                last_checkpoint=self._last)
        super().before_train(runner)
        with _together():
            if is_main_process():
                self._locks = [
                    lock_folder(folder)
                    for folder in {runner.work_dir, self.out_dir}
                    if '://' not in folder
                ]
        self._keep_foreign_files()
        # Other messages name it. resumed=False keeps it out of checkpoints.
        runner.message_hub.update_info(
            'work_dir', runner.work_dir, resumed=False)
        every = self.interval
        if self.by_epoch:
            every *= len(runner.train_dataloader)
        counts = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
        if every > 0 and every % counts:
            runner.logger.warning(
                f'A checkpoint every {every} iterations loses the gradients '
                'that are being accumulated: set the interval to a multiple of'
                f' {counts}')
        by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
        if by_epoch and not self.by_epoch:
            runner.logger.warning(
                'An epoch-based loop does not exactly resume checkpoints by '
                'iterations: remove default_hooks.checkpoint.by_epoch=False')
        if (isinstance(runner.train_loop, IterBasedTrainLoop) and self.by_epoch
                and self.interval > 0):
            raise ValueError(
                'An iteration-based loop would save nothing before its end: '
                'write default_hooks=dict(checkpoint=dict(by_epoch=False, '
                'interval=<iterations>)) and '
                'log_processor=dict(by_epoch=False)')
        if runner.val_loop is not None:
            self._check_save_best(runner)
        self._validate_again(runner, by_epoch)

    def _check_save_best(self, runner) -> None:
        """Says now what the first validation could not decide."""
        metrics = runner.val_evaluator.metrics
        known = ["'mmdet." in str(type(m).__mro__) for m in metrics]
        if self.save_best == ['auto']:
            if self.rules == [None] and not any(known):
                runner.logger.warning(
                    f"save_best='auto' may not find the number of "
                    f'{type(metrics[0]).__name__} that you want: {NAME_IT}')
            return
        for name in self.save_best or ():
            if all(known) and not any(f'{m.prefix}/' in name for m in metrics):
                raise ValueError(
                    f'save_best={name!r} is no number of val_evaluator: write '
                    f"'{metrics[0].prefix}/{name}'")

    @staticmethod
    def _validate_again(runner, by_epoch: bool) -> None:
        """Runs a validation that may be missing after an interruption.

        A checkpoint is saved before its validation, so that it cannot tell
        whether the validation was done. Repeating it does no harm.
        """
        loop = runner.train_loop
        if not isinstance(loop, (EpochBasedTrainLoop, IterBasedTrainLoop)):
            return
        done = loop.epoch if by_epoch else loop.iter
        end = loop.max_epochs if by_epoch else loop.max_iters
        if (runner.val_loop is not None and done > 0 and done >= loop.val_begin
                and (done % loop.val_interval == 0 or done == end)):
            runner.val_loop.run()

    def after_train(self, runner) -> None:
        """Publishes a checkpoint as mmengine does, and ends the lock."""
        super().after_train(runner)
        self._locks = None

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Replaces Python objects by plain data."""
        for key in ('meta', 'message_hub'):
            checkpoint[key] = plain_data(checkpoint[key])

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Restores the objects of the log history.

        A damaged file raises before its weights reach the model. torch does
        not compare its checksums. mmengine's loader of local files could be
        replaced, but then it would be replaced for all models of the process.

        ``meta['config']`` is removed. Checkpoints of MMDetection 2 have it,
        and mmengine would execute its text to compare the number of GPUs.
        """
        path = str(runner._load_from or '')
        if path and '://' not in path:
            check_integrity(Path(path).expanduser())
        meta = checkpoint.get('meta')
        if isinstance(meta, dict):
            meta.pop('config', None)
        hub = checkpoint.get('message_hub', {})
        ids = hub.get('runtime_info', {}).get('keep_ckpt_ids')
        if ids:  # mmengine makes paths of them, whose files it removes
            hub['runtime_info']['keep_ckpt_ids'] = [
                i for i in ids if isinstance(i, int)
            ]
        scalars = hub.get('log_scalars', {})
        for name, value in scalars.items():
            if isinstance(value, dict):
                scalars[name] = HistoryBuffer(**value)

    def _keep_foreign_files(self) -> None:
        """Looks for the best checkpoint in this folder only.

        mmengine removes the file or folder that the resumed checkpoint names
        as the best one, wherever it is, as soon as there is a better one. The
        folder may have been moved.
        """

        def own(path):
            name = osp.basename(str(path))
            path = osp.join(self.out_dir, name)
            return path if name.startswith('best_') else None

        self.best_ckpt_path = own(getattr(self, 'best_ckpt_path', None))
        paths = getattr(self, 'best_ckpt_path_dict', {})
        paths.update({key: own(path) for key, path in paths.items()})

    def _save_checkpoint_with_step(self, runner, step: int,
                                   meta: dict) -> None:
        if self._best_first:
            self._afterwards = (step, meta)
            return
        self._check_finite(runner)
        ids, hub = [], runner.message_hub
        if self.max_keep_ckpts > 0:
            # The list includes the files that this one replaces. If they
            # still exist when the run is resumed, mmengine removes them.
            ids = [i for i in self.keep_ckpt_ids if i != step] + [step]
            hub.update_info('keep_ckpt_ids', ids)
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        hub.update_info('last_ckpt', self.last_ckpt)
        with _together():
            runner.save_checkpoint(
                self.out_dir,
                name,
                self.file_client_args,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                meta=meta,
                by_epoch=self.by_epoch,
                backend_args=self.backend_args,
                **self.args)
            if is_main_process():
                AtomicBackend(self._last).put(self.last_ckpt.encode(),
                                              self._last)
        if ids:
            self.keep_ckpt_ids = deque(ids, self.max_keep_ckpts)
            if is_main_process():
                for i in ids[:-self.max_keep_ckpts]:
                    path = self.file_backend.join_path(
                        self.out_dir, self.filename_tmpl.format(i))
                    if self.file_backend.isfile(path):
                        self.file_backend.remove(path)
        self._clean()

    def _save_best_checkpoint(self, runner, metrics: dict) -> None:
        if not self.save_best:
            return
        if 'auto' in self.key_indicators:
            self._choose(metrics)
        if not metrics.keys() >= {*self.key_indicators}:
            runner.logger.warning(
                f'No best checkpoint is saved: {self.key_indicators} is none '
                f'of {[*metrics]}; {NAME_IT}')
            return
        self._check_finite(runner)
        # mmengine's method also saves the last checkpoint again, on all
        # ranks, when the first rank may have failed already.
        self._best_first, self._afterwards = True, None
        try:
            with _together():
                super()._save_best_checkpoint(runner, metrics)
        finally:
            self._best_first = False
        if self._afterwards:
            self._save_checkpoint_with_step(runner, *self._afterwards)
        self._clean()

    def _choose(self, metrics: dict) -> None:
        """Replaces 'auto' by the most wanted number, if there is one."""

        def rank(name: str) -> list:
            end = name.rpartition('/')[2]
            return [bool(re.fullmatch(wanted, end)) for wanted in WANTED]

        rule, = self.rules
        for name in sorted(metrics, key=rank, reverse=True):
            known = 'greater' if any(rank(name)[:-1]) else None
            with suppress(ValueError):  # for which more may be worse
                return self._init_rule([rule or known], [name])
            self.rules = [rule]  # which the failure has cleared

    def _check_finite(self, runner) -> None:
        """Prevents weights that are not finite from replacing good ones.

        Raises:
            RuntimeError: On all ranks, if a weight of any rank is not finite.
        """
        weights = runner.model.state_dict()
        broken = [
            n for n, t in weights.items()
            if isinstance(t, torch.Tensor) and not t.isfinite().all()
        ]
        count = torch.tensor(len(broken), device=get_comm_device())
        all_reduce(count)
        if count:
            raise RuntimeError(
                f'weights are not finite ({", ".join(broken[:3])}, ...), so '
                'this checkpoint is not saved. Start a new training with a '
                'lower learning rate, optionally with load_from set to a '
                f'checkpoint from before the loss grew ({self._last} names '
                'the last one). --resume would keep the learning rate of its '
                'checkpoint')

    def _clean(self) -> None:
        if isinstance(self.file_backend, AtomicBackend):
            # A repeated validation may write a file of the same name.
            self.file_backend.clean({
                getattr(self, 'last_ckpt', None),
                getattr(self, 'best_ckpt_path', None),
                *getattr(self, 'best_ckpt_path_dict', {}).values()
            })
