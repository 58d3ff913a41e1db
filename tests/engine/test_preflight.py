"""The pre-flight stops all ranks before the first step."""
from types import SimpleNamespace

import pytest
from helpers.broken_data import build_model, entry, lines, write_broken
from helpers.tiny_data import LITE0, trained_run
from helpers.two_ranks import errors_of_ranks
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.fileio import LocalBackend, register_backend
from mmengine.registry import HOOKS

from mmdet_efficientdet import PreflightHook

OLD_NAME = 'mmdet_efficientdet.ClassCheckHook'
NAME = 'mmdet_efficientdet.PreflightHook'


@register_backend('counting', force=True)
class CountingBackend(LocalBackend):
    """Local files, and how often each is read."""
    reads = []

    def get_local_path(self, filepath):
        self.reads.append(filepath.rsplit('/', 1)[-1])
        return super().get_local_path(filepath)

    def get(self, filepath):
        self.reads.append(filepath.rsplit('/', 1)[-1])
        return super().get(filepath)


def make_runner(path, *hooks, **options):
    """What the hooks see of a runner, with its log in ``lines``."""
    config = Config.fromfile(path)
    config.merge_from_dict(options)
    lines = []
    train, val = (
        SimpleNamespace(dataset=DATASETS.build(loader.dataset))
        for loader in (config.train_dataloader, config.val_dataloader))
    return SimpleNamespace(
        cfg=config,
        model=build_model(config),
        hooks=[HOOKS.build(hook) for hook in hooks or [dict(type=NAME)]],
        train_dataloader=train,
        val_loop=True,
        val_dataloader=val,
        test_dataloader=val,
        world_size=1,
        logger=SimpleNamespace(warning=lines.append),
        lines=lines)


def start(runner, stage='before_train'):
    for hook in runner.hooks:
        getattr(hook, stage)(runner)


def test_error_stops_the_training(tmp_path):
    """The message has the finding, an example, the fix and the verdict."""
    runner = make_runner(write_broken(tmp_path, entry('category_id', 0, 40)))
    with pytest.raises(ValueError) as error:
        start(runner)
    first, *examples, fix, verdict = str(error.value).splitlines()
    assert first.startswith('ERROR category_id: ')
    assert 'train.json' in first and '40 boxes' in first
    assert 'annotation 1, ' in examples[0]
    assert '"categories"' in fix
    assert verdict.startswith('VERDICT: this training will fail (errors: 1,')
    assert not runner.lines


def test_sound_data(tmp_path):
    runner = make_runner(write_broken(tmp_path, lines('')))
    start(runner)
    start(runner, 'before_test')
    assert not runner.lines


@pytest.mark.slow
def test_warnings_do_not_stop(tmp_path_factory):
    """The log has each of them once, and the training goes on to the end."""
    run = trained_run(tmp_path_factory.getbasetemp())
    for name in ('learning_rate', 'batch_norm', 'few_boxes', 'overlap'):
        assert run.output.count(f'pre-flight, {name}: ') == 1
    assert 'could not check' not in run.output
    assert (run.work_dir / 'epoch_2.pth').is_file()


def test_disabled(tmp_path):
    """Only the classes are compared, of which little is read."""
    off = dict(type=NAME, enabled=False)
    runner = make_runner(
        write_broken(tmp_path, entry('category_id', 0, 40)), off)
    start(runner)
    assert not runner.lines


# Datasets of a user, which replace the one of the base
WRAPPERS = dict(
    ConcatDataset='datasets=[part, part]',
    RepeatDataset='times=2, dataset=part',
    ClassBalancedDataset='oversample_thr=0.1, dataset=part',
    MultiImageMixDataset='pipeline=_base_.train_pipeline[3:], '
    'dataset=dict(part, pipeline=_base_.train_pipeline[:3])')


@pytest.mark.parametrize('kind', WRAPPERS)
@pytest.mark.parametrize('metainfo', [
    '', "metainfo=dict(classes=('red', 'green', 'blue')),"
], ids=['without', 'metainfo'])  # yapf: disable
def test_wrappers(kind, metainfo, tmp_path):
    """Each part needs the names, which scale_config cannot give it."""
    config = write_broken(
        tmp_path,
        lines(f"""
part = dict(
    type='CocoDataset', pipeline=_base_.train_pipeline, {metainfo} **dataset)
train_dataloader['dataset'] = dict(
    _delete_=True, type={kind!r}, {WRAPPERS[kind]})
"""))
    runner = make_runner(config)
    if metainfo:
        start(runner)
        assert not runner.lines
        runner.train_dataloader.dataset[0]
        return
    with pytest.raises(ValueError) as error:
        start(runner)
    for value in ('num_classes=3', '80 classes', '_delete_=True',
                  'metainfo=dict(classes=', 'in each part'):
        assert value in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize('fault, name', [
    (entry('iscrowd', None, split=1), 'iscrowd'),
    (entry('id', 'a', split=1), 'text_id'),
    (entry('bbox', [1, 2, float('nan'), 4], split=1), 'fields'),
])
def test_faults_of_a_test(fault, name, tmp_path):
    """They would stop, or spoil, the evaluation after the last image."""
    path = write_broken(tmp_path, fault)
    with pytest.raises(ValueError) as error:
        start(make_runner(path), 'before_test')
    assert f'ERROR {name}: ' in str(error.value)
    assert 'VERDICT: this test will fail' in str(error.value)
    start(make_runner(path, dict(type=NAME, enabled=False)), 'before_test')
    if name != 'fields':  # only the evaluation of COCO needs it
        other = make_runner(path, **{'test_evaluator.ann_file': ''})
        start(other, 'before_test')


def wrong_name(train, val, root):
    val['categories'][0]['name'] = 'scarlet'
    val['annotations'][0]['area'] = float('nan')


@pytest.mark.parametrize('stage, enabled', [('before_train', True),
                                            ('before_train', False),
                                            ('before_test', False)])
def test_class_names_are_always_compared(stage, enabled, tmp_path):
    runner = make_runner(
        write_broken(tmp_path, wrong_name), dict(type=NAME, enabled=enabled))
    with pytest.raises(ValueError) as error:
        start(runner, stage)
    for value in ('ERROR class_names: ', "'scarlet'", "'red'", 'val.json'):
        assert value in str(error.value)


@pytest.mark.parametrize('enabled', [True, False])
@pytest.mark.parametrize('types',
                         [[OLD_NAME], [OLD_NAME, NAME], [NAME, OLD_NAME]])
def test_name_of_the_class_check(types, enabled, tmp_path):
    """The old name gives the same hook; of two, the first one works."""
    hooks = [dict(type=kind) for kind in types]
    hooks[-1]['enabled'] = enabled
    path = write_broken(tmp_path,
                        lines('auto_scale_lr = dict(base_batch_size=128)'))
    runner = make_runner(path, *hooks)
    assert [type(hook)
            for hook in runner.hooks] == [PreflightHook] * len(types)
    start(runner)
    assert [line.split(': ')[0] for line in runner.lines
            ] == ['pre-flight, learning_rate'] * enabled
    for hook in runner.hooks:
        hook.after_load_checkpoint(runner, dict(meta=dict(anchor_scale=7.0)))
    assert sum('octave_base_scale=7.0' in line for line in runner.lines) == 1


def test_files_are_read_once(tmp_path):
    """Beside the host, which builds the data sets."""
    path = write_broken(
        tmp_path,
        lines(
            "for part in (train_dataloader, val_dataloader):\n"
            "    part['dataset']['backend_args'] = dict(backend='counting')"))
    runner = make_runner(path)
    CountingBackend.reads.clear()
    start(runner)
    assert sorted(CountingBackend.reads) == ['train.json', 'val.json']
    assert not runner.lines


def test_file_that_has_gone(tmp_path):
    """What cannot be read is no reason to stop; a wrong head is one."""
    path = write_broken(tmp_path, lines(''))
    runner = make_runner(path)
    (tmp_path / 'data' / 'train.json').unlink()
    start(runner)
    line, = runner.lines
    assert 'could not check' in line and 'train.json' in line
    runner.model = SimpleNamespace(bbox_head=SimpleNamespace(num_classes=5))
    with pytest.raises(ValueError, match='num_classes=5'):
        start(runner)


class FirstRankOnly:
    """A runner whose data only the first process may look at."""
    hooks = [PreflightHook()]
    val_loop = None
    model = SimpleNamespace(bbox_head=SimpleNamespace(num_classes=5))

    @property
    def train_dataloader(self):
        assert get_rank() == 0
        metainfo = dict(classes=('red', 'green', 'blue'))
        return SimpleNamespace(
            dataset=SimpleNamespace(metainfo=metainfo, __len__=lambda: 1))

    test_dataloader = train_dataloader
    logger = SimpleNamespace(warning=print)


@pytest.mark.distributed
@pytest.mark.parametrize('stage', ['before_train', 'before_test'])
def test_all_ranks_stop(stage, tmp_path):
    """The first process checks, and all raise what it found."""
    first, second = errors_of_ranks(
        getattr(FirstRankOnly.hooks[0], stage), tmp_path, FirstRankOnly())
    assert first == second
    assert 'num_classes=5' in first and "'green'" in first


def test_hook_is_on_by_default():
    """All configs have it, once."""
    hooks = Config.fromfile(LITE0).default_hooks
    built = [
        HOOKS.build(hook) for hook in hooks.values()
        if hook.type in (NAME, OLD_NAME)
    ]
    assert [hook.enabled for hook in built] == [True]
