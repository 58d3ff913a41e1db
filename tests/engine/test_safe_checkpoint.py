"""Checkpoints are whole or not there, and a run is never without one."""
import errno
import os
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from helpers.tiny_data import CLASSES, CONFIGS, files_up_to, make_dataset
from helpers.toy_training import Scores, toy_runner
from helpers.two_ranks import errors_of_ranks
from mmdet.evaluation import CocoMetric, OpenImagesMetric, VOCMetric
from mmengine.config import Config
from mmengine.hooks import Hook

from mmdet_efficientdet import SafeCheckpointHook
from mmdet_efficientdet.engine.atomic_backend import AtomicBackend
from mmdet_efficientdet.utils import write_file


class Other(Scores):
    """A score of another name."""

    def compute_metrics(self, results):
        return dict(other=self.scores.pop(0))


class Watch(Hook):
    """Keeps the weights of every step."""
    priority = 'HIGHEST'

    def __init__(self):
        self.weights = []

    def after_train_iter(self, runner, *args, **kwargs):
        self.weights.append(runner.model.layer.weight.detach().clone())


def test_never_without_a_checkpoint(tmp_path, monkeypatch):
    """Before and after each change in the folder, all that counts loads."""
    best_seen, checks = [], []

    def check():
        named = tmp_path / 'last_checkpoint'
        if named.exists():
            torch.load(named.read_text(), weights_only=True)
        best = list(tmp_path.glob('best_*.pth'))
        best_seen.extend(best)
        assert bool(best) == bool(best_seen)
        for path in best:
            torch.load(path, weights_only=True)
        checks.append(0)

    for name in ('replace', 'remove'):
        real = getattr(os, name)

        def watched(*args, real=real):
            check()
            real(*args)
            check()

        monkeypatch.setattr(os, name, watched)
    toy_runner(tmp_path, [0.5, 0.7, 0.6, 0.8]).train()
    assert len(checks) >= 30
    assert sorted(path.name for path in tmp_path.glob('*.pth')) == [
        'best_mAP_epoch_4.pth', 'epoch_4.pth'
    ]
    assert not list(tmp_path.glob('*.tmp'))


def test_best_checkpoint_is_the_average(tmp_path):
    """Of the epoch with the best score, by the official rule of averages."""
    watch = Watch()
    runner = toy_runner(tmp_path, [0.5, 0.7, 0.6])
    runner.register_hook(watch)
    runner.train()
    saved = torch.load(
        tmp_path / 'best_mAP_epoch_2.pth', weights_only=True)['state_dict']
    average = watch.weights[0]
    for step, weight in enumerate(watch.weights[1:6]):
        momentum = max(2e-4, 9 / (10 + step))  # of mmengine, a step late
        average = average + momentum * (weight - average)
    torch.testing.assert_close(saved['layer.weight'], average)
    assert (saved['layer.weight'] - watch.weights[5]).abs() > 1e-4


def test_saved_average_includes_the_step(tmp_path):
    """A checkpoint after a step has the average up to this step."""

    class Average(Hook):
        """The official rule, before any hook can save."""
        priority = 'HIGHEST'
        averages = []

        def after_train_iter(self, runner, *args, **kwargs):
            weight = runner.model.layer.weight.detach().clone()
            steps = len(self.averages)
            if steps:  # of mmengine, a step late
                momentum = max(2e-4, 9 / (9 + steps))
                last = self.averages[-1]
                weight = last + momentum * (weight - last)
            self.averages.append(weight)

    runner = toy_runner(tmp_path, [0.5])
    runner._train_loop = dict(type='IterBasedTrainLoop', max_iters=4)
    runner.hooks[:] = [
        hook for hook in runner.hooks
        if not isinstance(hook, SafeCheckpointHook)
    ]
    runner.register_hook(SafeCheckpointHook(by_epoch=False, interval=1))
    runner.register_hook(Average())
    runner.train()
    for step, average in enumerate(Average.averages, 1):
        saved = torch.load(tmp_path / f'iter_{step}.pth', weights_only=True)
        torch.testing.assert_close(saved['state_dict']['layer.weight'],
                                   average)
        current = saved['ema_state_dict']['module.layer.weight']
        assert step == 1 or (current - average).abs() > 1e-4


def coco_numbers(root, **options):
    """What the host's metric finds in one image where all is found."""
    metric = CocoMetric(str(root / 'coco.json'), **options)
    metric.dataset_meta = dict(classes=CLASSES)
    found = dict(
        img_id=1,
        bboxes=np.array([[10., 10, 60, 50], [70, 60, 110, 110]]),
        scores=np.ones(2),
        labels=np.arange(2))
    return metric, metric.compute_metrics([(dict(width=128,
                                                 height=128), found)])


def voc_numbers(metric):
    """The same of a metric that gets the ground truth with the results."""
    box, no_box = np.array([[10., 10, 60, 50]]), np.zeros((0, 4))
    truth = dict(
        bboxes=box,
        labels=np.zeros(1, int),
        bboxes_ignore=no_box,
        labels_ignore=np.zeros(0, int),
        is_group_ofs=np.zeros(1, bool),
        gt_is_group_ofs=np.zeros(1, bool))
    metric.dataset_meta = dict(classes=('cat', ))
    return metric, metric.compute_metrics([(truth,
                                            [np.c_[box, np.ones((1, 1))]])])


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp('best') / 'data')


def train_two(folder, metric, first, second, **options):
    """Trains two epochs with these numbers.

    Returns the name of the best checkpoint, and the warnings.
    """
    numbers = iter((first, second))
    metric.process = lambda *args: metric.results.append(0)
    metric.compute_metrics = lambda results: dict(next(numbers))
    runner = toy_runner(folder, [0, 0])
    options = dict(save_best='auto', save_param_scheduler=False) | options
    runner.register_hook(SafeCheckpointHook(**options))
    runner._hooks[:] = [
        hook for hook in runner.hooks
        if not isinstance(hook, SafeCheckpointHook) or hook.interval < 0
    ]
    runner._val_evaluator = [metric]
    warnings = []
    runner.logger.warning = warnings.append
    runner.train()
    return [path.name for path in folder.glob('best_*')], warnings


@pytest.mark.parametrize('wanted, numbers', [
    ('coco/bbox_mAP', lambda root: coco_numbers(root, classwise=True)),
    ('coco/bbox_mAP',
     lambda root: coco_numbers(root, metric=['proposal', 'bbox'])),
    ('coco/bbox_mAP_50', lambda root: coco_numbers(
        root, classwise=True, metric_items=['mAP_s', 'mAP_50'])),
    ('coco/AR@100', lambda root: coco_numbers(root, metric='proposal')),
    ('openimages/mAP', lambda root: voc_numbers(OpenImagesMetric())),
    ('pascal_voc/recall@100@0.5',
     lambda root: voc_numbers(VOCMetric(metric='recall'))),
])
def test_best_of_the_hosts_metrics(wanted, numbers, root, tmp_path):
    """The number that stands for the detector, wherever it comes."""
    metric, found = numbers(root)
    key = wanted.rpartition('/')[2]
    name = f'best_{wanted.replace("/", "_")}_epoch_2.pth'
    assert train_two(tmp_path, metric, {
        **dict.fromkeys(found, 1), key: 0.1
    }, {
        **dict.fromkeys(found, 0), key: 0.2
    }) == ([name], [])


@pytest.mark.parametrize('wanted, others', [
    ('bbox_AP', ['bbox_AP50', 'cat_precision', 'bbox_APs']),
    ('AP', ['APr', 'AP50', 'cat_precision']),
    ('mAP', ['loss', 'segm_mAP', 'mAP_50']),
    ('acc', ['f1', 'cat_precision']),
    ('mean_precision', []),
])
def test_best_of_other_metrics(wanted, others, tmp_path):
    """LVIS, for which the host needs a package, and metrics of one's own."""
    best, (warning, ) = train_two(tmp_path, Scores([]), {
        **dict.fromkeys(others, 1), wanted: 0
    }, {
        **dict.fromkeys(others, 0), wanted: 0.1
    })
    assert best == [f'best_{wanted}_epoch_2.pth']
    for part in ("save_best='auto'", 'Scores', 'default_hooks.checkpoint'
                 '.save_best', '.rule'):
        assert part in warning


def test_best_of_unknown_numbers(tmp_path):
    """The training goes on, and each validation says what to do."""
    metric = Scores([])
    best, warnings = train_two(tmp_path / '1', metric, dict(f1=1, mse=1),
                               dict(f1=2, mse=2))
    assert not best and len(warnings) == 3
    assert all('checkpoint.rule to greater or less' in w for w in warnings)
    assert all("['f1', 'mse']" in warning for warning in warnings[1:])
    for options in (dict(rule='less'), dict(rule='less', save_best='f1')):
        folder = tmp_path / options.get('save_best', 'rule')
        assert train_two(folder, metric, dict(f1=2), dict(f1=1),
                         **options) == (['best_f1_epoch_2.pth'], [])


def test_best_of_a_wrong_name(root, tmp_path):
    """Names have the prefix of their metric: said before the first step."""
    metric, found = coco_numbers(root)
    with pytest.raises(ValueError, match="'bbox_mAP' .*'coco/bbox_mAP'"):
        train_two(tmp_path, metric, found, found, save_best='bbox_mAP')
    assert not list(tmp_path.glob('*.pth'))


def test_better_when_validated_again(tmp_path):
    """A best checkpoint that is written once more is not removed as old."""
    toy_runner(tmp_path, [0.5]).train()
    best = tmp_path / 'best_mAP_epoch_1.pth'
    assert best.is_file()
    runner = toy_runner(tmp_path, [0.500001, 0.3])
    runner._resume = True
    runner.train()
    assert best.is_file() and (tmp_path / 'epoch_2.pth').is_file()


def test_resumed_history(tmp_path):
    """What was logged before goes on to be averaged, from plain data."""
    runner = toy_runner(tmp_path / 'first', [0.1])
    runner.train()
    again = toy_runner(tmp_path / 'again', [0.1, 0.1])
    again._load_from, again._resume = runner.message_hub.get_info(
        'last_ckpt'), True
    again.train()
    before, after = (
        r.message_hub.get_scalar('train/loss').data[0].tolist()
        for r in (runner, again))
    assert (len(before), len(after)) == (3, 6) and after[:3] == before


@pytest.mark.parametrize('path', [
    'efficientdet/efficientdet_lite0_8xb16-300e_coco.py',
    'bifpn/retinanet_r50_bifpn_1x_coco.py',
    'bifpn/rtmdet_tiny_bifpn_8xb32-300e_coco.py'
])
def test_resuming_executes_no_text(path, tmp_path):
    """mmengine would execute meta['config'] as the text of a config."""
    hook = Config.fromfile(CONFIGS.parent / path).default_hooks.checkpoint
    marker = tmp_path / 'marker'
    text = f'made = __import__("os").mkdir({str(marker)!r})'
    Config.fromstring(text, '.py')  # that is what it would do
    marker.rmdir()
    toy_runner(tmp_path / 'first', [0.1]).train()
    path = tmp_path / 'first' / 'epoch_1.pth'
    checkpoint = torch.load(path, weights_only=True)
    checkpoint['meta']['config'] = text
    torch.save(checkpoint, path)
    again = toy_runner(tmp_path / 'again', [0.1, 0.1], checkpoint=hook)
    again._load_from, again._resume = str(path), True
    again.train()
    assert again.epoch == 2 and again.iter == 6
    assert not marker.exists()


@pytest.mark.parametrize('way', ['load_from', 'resume', 'auto', 'test'])
def test_damaged_checkpoints_are_refused(way, tmp_path):
    """torch would load other weights."""
    toy_runner(tmp_path, [0.1]).train()
    path = tmp_path / 'epoch_1.pth'
    data = bytearray(path.read_bytes())
    weight = torch.load(
        path, weights_only=True)['state_dict']['layer.weight'].numpy()
    data[data.index(weight.tobytes())] ^= 1
    path.write_bytes(data)
    loaded = torch.load(path, weights_only=True)['state_dict']['layer.weight']
    assert loaded.numpy() != weight
    runner = toy_runner(tmp_path, [0.1, 0.2])
    runner._resume = way in ('resume', 'auto')
    if way != 'auto':
        runner._load_from = str(path)
    if way == 'test':
        runner._test_dataloader = runner._val_dataloader
        runner._test_loop, runner._test_evaluator = dict(), [Scores([0.1])]
    before = runner.model.layer.weight.clone()
    with pytest.raises(ValueError, match='epoch_1.pth is damaged or cut off'):
        runner.test() if way == 'test' else runner.train()
    assert torch.equal(runner.model.layer.weight, before)


@pytest.mark.parametrize('save_best', ['auto', ['mAP', 'other']])
def test_resuming_removes_no_foreign_files(save_best, tmp_path):
    """What a checkpoint names as the best one, or as an old one."""
    toy_runner(tmp_path / 'first', [0.1]).train()
    path = tmp_path / 'first' / 'epoch_1.pth'
    mine = tmp_path / 'best_of_mine'
    (mine / 'folder').mkdir(parents=True)
    (tmp_path / 'again' / 'epoch_').mkdir(parents=True)
    checkpoint = torch.load(path, weights_only=True)
    info = checkpoint['message_hub']['runtime_info']
    for key in ('best_ckpt', 'best_ckpt_mAP', 'best_ckpt_again'):
        info[key] = str(mine)
        checkpoint['message_hub']['resumed_keys'][key] = True
    (tmp_path / 'mine.pth').touch()
    info['keep_ckpt_ids'] = ['/../../../mine', 1, 2]
    torch.save(checkpoint, path)
    again = toy_runner(tmp_path / 'again', [0.1, 0.2])
    again.hooks[:] = [
        h for h in again.hooks if not isinstance(h, SafeCheckpointHook)
    ]
    again.register_hook(
        SafeCheckpointHook(
            save_best=save_best, rule='greater', max_keep_ckpts=1))
    if save_best != 'auto':
        again._val_evaluator = [Scores([0.1, 0.2]), Other([0.1, 0.2])]
    again._load_from, again._resume = str(path), True
    again.train()
    assert list((tmp_path / 'again').glob('best_mAP_epoch_2.pth'))
    assert (mine / 'folder').is_dir()
    assert (tmp_path / 'mine.pth').is_file()


@pytest.mark.parametrize(
    'path',
    sorted(CONFIGS.parent.glob('[!_]*/*.py')),
    ids=lambda path: path.stem)
def test_every_config_has_the_hook(path):
    """So that no training by a config of ours executes what it resumes."""
    hook = Config.fromfile(path).default_hooks.checkpoint
    assert hook.type == 'mmdet_efficientdet.SafeCheckpointHook'


def test_early_stopping(tmp_path):
    """By one line of default_hooks, when two validations were no better."""
    runner = toy_runner(
        tmp_path, [0.5, 0.6, 0.59, 0.601, 0.8, 0.9],
        early_stopping=dict(
            type='EarlyStoppingHook',
            monitor='mAP',
            min_delta=0.005,
            patience=2))
    runner.train()
    assert runner.epoch == 4
    assert (tmp_path / 'best_mAP_epoch_4.pth').is_file()


class FullDisk(Hook):
    """Lets no large file be written, from some checkpoint on."""

    def __init__(self, epoch, best):
        self.epoch, self.best = epoch, best
        self.limit = ExitStack()

    def before_save_checkpoint(self, runner, checkpoint):
        best = 'optimizer' not in checkpoint
        if checkpoint['meta']['epoch'] == self.epoch and best == self.best:
            self.limit.enter_context(files_up_to(1000))


@pytest.mark.parametrize('kind', ['epoch', 'best'])
def test_full_disk(kind, tmp_path):
    """The error says what to do, and the last good checkpoint stays."""
    name = dict(epoch='epoch_2.pth', best='best_mAP_epoch_2.pth')[kind]
    runner = toy_runner(tmp_path, [0.5, 0.6])
    disk = FullDisk(2, kind == 'best')
    runner.register_hook(disk)
    with disk.limit, pytest.raises(OSError, match=name) as info:
        runner.train()
    assert info.value.errno == errno.EFBIG
    good = 'epoch_1.pth' if kind == 'epoch' else 'epoch_2.pth'
    for part in ('MB) could not be written', 'MB are free', '--resume',
                 f'The last good checkpoint is {tmp_path / good}. ',
                 'max_keep_ckpts'):
        assert part in str(info.value)
    assert not list(tmp_path.glob(f'{name}*'))
    for path in (tmp_path / good, tmp_path / 'best_mAP_epoch_1.pth'):
        torch.load(path, weights_only=True)
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / good)


def test_write_file(tmp_path):
    """New contents come at once; an error leaves the old ones alone."""
    path = tmp_path / 'new' / 'file'
    write_file(path, b'one')
    with files_up_to(1), pytest.raises(OSError):
        write_file(path, b'two')
    assert path.read_bytes() == b'one'
    assert [p.name for p in path.parent.iterdir()] == ['file']
    backend = AtomicBackend(str(tmp_path / 'last_checkpoint'))
    with pytest.raises(IsADirectoryError) as info:  # not a full disk
        backend.put(b'data', str(path.parent))
    assert 'MB' not in str(info.value)


def test_two_writers(tmp_path):
    """Neither takes the half-written file of the other."""

    def slowly(file):
        file.write(b'slow, ')
        write_file(path, b'fast')
        file.write(b'but complete')

    path = tmp_path / 'file'
    write_file(path, slowly)
    assert path.read_bytes() == b'slow, but complete'
    assert [p.name for p in tmp_path.iterdir()] == ['file']


class Spoil(Hook):
    """Spoils the weights in an epoch, the second by default."""

    def __init__(self, epoch=1):
        self.epoch = epoch

    def after_train_iter(self, runner, *args, **kwargs):
        if runner.epoch == self.epoch:
            runner.model.layer.bias.data.fill_(float('nan'))


def test_spoilt_weights_are_not_saved(tmp_path):
    """They would take the place of a good checkpoint."""
    runner = toy_runner(tmp_path, [0.5, 0.6])
    runner.register_hook(Spoil())
    with pytest.raises(RuntimeError, match='not finite .*layer.bias') as info:
        runner.train()
    assert str(tmp_path / 'last_checkpoint') in str(info.value)
    assert (tmp_path / 'last_checkpoint').read_text().endswith('epoch_1.pth')
    assert (tmp_path / 'epoch_1.pth').is_file()


@pytest.mark.parametrize('interval', [1, 5])
def test_spoilt_weights_are_not_the_best(interval, tmp_path):
    """Nor where a validation comes before the first checkpoint."""
    runner = toy_runner(tmp_path, [0.5, 0.6])
    hook, = (h for h in runner.hooks if isinstance(h, SafeCheckpointHook))
    hook.interval, hook.save_last = interval, False
    runner.register_hook(Spoil(epoch=0))
    with pytest.raises(RuntimeError, match='not finite'):
        runner.train()
    assert not list(tmp_path.glob('*.pth'))


def train_with_a_fault(folder, fault):
    """Trains where one file cannot be written, or weights are spoilt."""
    runner = toy_runner(folder, [0.5, 0.6])
    if fault != 'weights':
        (folder / fault).mkdir(exist_ok=True)
    # The weights of rank 0 are saved.
    elif torch.distributed.get_rank() == 1:
        runner.register_hook(Spoil())
    runner.train()


@pytest.mark.distributed
@pytest.mark.parametrize('fault, message', [
    ('epoch_1.pth', "-> '{folder}/epoch_1.pth'"),
    ('last_checkpoint', "-> '{folder}/last_checkpoint'"),
    ('best_mAP_epoch_1.pth', "-> '{folder}/best_mAP_epoch_1.pth'"),
    ('weights', 'weights are not finite'),
])
def test_all_ranks_stop(fault, message, tmp_path):
    """None waits for a rank that has raised."""
    for error in errors_of_ranks(train_with_a_fault, tmp_path, tmp_path,
                                 fault):
        assert message.format(folder=tmp_path) in error


def test_interrupted_validation_is_made_again(tmp_path):
    """So that the best checkpoint is not lost."""

    class Kill(Hook):

        def before_val_epoch(self, runner):
            if runner.epoch == 2:
                raise KeyboardInterrupt

    runner = toy_runner(tmp_path, [0.5, 0.9])
    runner.register_hook(Kill())
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    runner = toy_runner(tmp_path, [0.9, 0.0])
    runner._resume = True
    runner.train()
    assert runner.epoch == 2
    assert [p.name for p in tmp_path.glob('best*')] == ['best_mAP_epoch_2.pth']


def test_iterations_of_an_epoch_are_not_exact(tmp_path):
    """A loop by epochs cannot go on within one."""
    runner = toy_runner(tmp_path, [0.5])
    hook, = (h for h in runner.hooks if isinstance(h, SafeCheckpointHook))
    hook.by_epoch = False
    messages = []
    runner.logger.warning = messages.append
    runner.train()
    assert any('checkpoints by iterations' in m for m in messages)


@pytest.mark.parametrize('by_epoch', [True, False])
def test_iterations_are_saved_by_iteration(by_epoch, tmp_path):
    """Counted in epochs, nothing would be saved before the end."""
    runner = toy_runner(tmp_path, [0.5])
    runner._train_loop = dict(type='IterBasedTrainLoop', max_iters=3)
    hook, = (h for h in runner.hooks if isinstance(h, SafeCheckpointHook))
    hook.by_epoch = by_epoch
    if by_epoch:
        with pytest.raises(ValueError, match='by_epoch=False, interval='):
            runner.train()
        hook.interval = -1  # no more than the last one, then
    runner.train()
    assert by_epoch or [p.name for p in tmp_path.glob('*_3.pth')]


def test_half_written_files_are_removed(tmp_path):
    """By the next start; files of others stay, and none of them is loaded."""
    for name in ('epoch_9.pth.tmp', 'epoch_8.pth.0a1b.tmp', 'mine.tmp',
                 'best_mAP_epoch_8.pth.0a.tmp', 'last_checkpoint.0a1b.tmp'):
        (tmp_path / name).write_text('half')
    runner = toy_runner(tmp_path, [0.5])
    runner._resume = True
    runner.train()
    assert runner.iter == 3  # from scratch
    assert [p.name for p in tmp_path.glob('*.tmp')] == ['mine.tmp']


@pytest.mark.parametrize('counts, warns', [(2, True), (3, False)])
def test_accumulation_between_checkpoints(counts, warns, tmp_path):
    """Three steps an epoch: an update every two does not fit."""
    runner = toy_runner(tmp_path, [0.5])
    runner.optim_wrapper['accumulative_counts'] = counts
    messages = []
    runner.logger.warning = messages.append
    runner.train()
    assert any('multiple of 2' in m for m in messages) == warns
