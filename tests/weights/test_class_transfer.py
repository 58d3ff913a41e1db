"""Checkpoints for other classes: by function, by load_from and by tool."""
import hashlib
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_data import (CLASSES, D0, LITE0, make_dataset, run_tool,
                               trained_run, write_config)
from mmdet.apis import DetInferencer
from mmdet.datasets import CocoDataset, VOCDataset
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.runner import EpochBasedTrainLoop
from oracles import effdet_reference
from safetensors.torch import save_file

from mmdet_efficientdet import ClassTransferHook
from mmdet_efficientdet.weights.class_transfer import (transfer_classes,
                                                       transfer_file)

COCO = CocoDataset.METAINFO['classes']
VOC = VOCDataset.METAINFO['classes']
# By hand: which of VOC's names COCO has, too, and where.
SHARED = dict(
    bicycle=1,
    bird=14,
    boat=8,
    bottle=39,
    bus=5,
    car=2,
    cat=15,
    chair=56,
    cow=19,
    dog=16,
    horse=17,
    person=0,
    sheep=18,
    train=6)
ANEW = ('aeroplane', 'diningtable', 'motorbike', 'pottedplant', 'sofa',
        'tvmonitor')
PREDICTOR = 'bbox_head.conv_cls.pointwise.'
BIAS, WEIGHT = PREDICTOR + 'bias', PREDICTOR + 'weight'


def scrambled(state_dict):
    """The same with random values everywhere."""
    return {
        key: torch.rand_like(value) if value.is_floating_point() else value + 7
        for key, value in state_dict.items()
    }


@pytest.fixture
def new_head(model_cfg):
    """A function: the head of a Lite0 as a training starts it."""

    def build(num_classes):
        head = MODELS.build(model_cfg('lite0', num_classes).bbox_head)
        head.init_weights()
        return head

    return build


@pytest.fixture
def coco(lite0):
    """A checkpoint for COCO as of a training with averages."""
    state_dict = lite0
    averages = {f'module.{k}': v for k, v in scrambled(state_dict).items()}
    return dict(
        meta=dict(
            epoch=3, dataset_meta=dict(classes=COCO,
                                       palette=[(0, 0, 0)] * 80)),
        state_dict=scrambled(state_dict),
        ema_state_dict=dict(averages, steps=torch.tensor(9)),
        optimizer=dict(state={}))


def check_predictor(new, old, classes=VOC, prefix=''):
    """Rows of shared names are the old ones; others have the focal prior.

    Anchors come first: row ``anchor * number of classes + class``.
    """
    drawn = []
    for label, name in enumerate(classes):
        for anchor in range(9):
            row = anchor * len(classes) + label
            if name in SHARED:
                source = anchor * 80 + SHARED[name]
                for key in (prefix + WEIGHT, prefix + BIAS):
                    assert torch.equal(new[key][row], old[key][source])
            else:
                # log(0.01 / 0.99)
                assert new[prefix + BIAS][row] == pytest.approx(-4.59511985)
                drawn.append(new[prefix + WEIGHT][row])
    return torch.stack(drawn).flatten() if drawn else torch.empty(0)


def check_kept(new, old):
    """All but the class predictor is the same, bit for bit, in order."""
    assert list(new) == list(old)
    for key in new:
        if PREDICTOR not in key:
            assert torch.equal(new[key], old[key]), key
            assert new[key].dtype == old[key].dtype


def test_voc_from_coco(coco, new_head):
    """14 of VOC's classes are copied, 6 start anew, all else is kept."""
    before = {k: v.clone() for k, v in coco['state_dict'].items()}
    head = new_head(20)
    new, receipt = transfer_classes(coco, VOC, head)
    assert new['state_dict'][WEIGHT].shape == (180, 64, 1, 1)
    check_kept(new['state_dict'], coco['state_dict'])
    drawn = check_predictor(new['state_dict'], coco['state_dict'])
    # Variance scaling with a fan-in of 64: a deviation of 1 / 8, cut off at
    # two of the underlying normal distribution's.
    assert len(drawn) == 6 * 9 * 64
    assert drawn.std() == pytest.approx(0.125, rel=0.05)
    assert 0.27 < drawn.abs().max() <= 2 * 0.125 / 0.87962566
    assert set(new) == {'meta', 'state_dict', 'ema_state_dict'}
    assert new['meta']['epoch'] == 3
    assert new['meta']['dataset_meta'] == dict(classes=list(VOC))
    # The given checkpoint is as it was.
    assert coco['meta']['dataset_meta']['classes'] == COCO
    assert all(torch.equal(coco['state_dict'][k], before[k]) for k in before)
    assert f'copied: 14 classes ({", ".join(n for n in VOC if n in SHARED)})' \
        in receipt
    assert f'new: 6 classes ({", ".join(ANEW)})' in receipt
    # 588 tensors and 108 counters of batch norms, without two
    assert 'kept: 694 tensors, bit-identical' in receipt
    assert sum('not used: 66 classes (' in line for line in receipt) == 1
    # What the head drew is not shared with what is trained from it.
    new['state_dict'][WEIGHT].zero_()
    assert head.conv_cls.pointwise.weight.abs().min() > 0


def test_shared_classes_predict_the_same(coco, new_head):
    """The logits of a shared class are those of the old network."""
    old, new = new_head(80).eval(), new_head(20).eval()
    transferred, _ = transfer_classes(coco, VOC, new)
    for head, checkpoint in ((old, coco), (new, transferred)):
        head.load_state_dict({
            key.removeprefix('bbox_head.'): value
            for key, value in checkpoint['state_dict'].items()
            if key.startswith('bbox_head.')
        })
    features = [torch.rand(1, 64, n, n) for n in (8, 4, 2, 1, 1)]
    with torch.no_grad():
        before, boxes_before = old(features)
        after, boxes_after = new(features)
    for level in range(5):
        assert torch.equal(boxes_before[level], boxes_after[level])
        given = before[level].reshape(9, 80, -1)
        got = after[level].reshape(9, 20, -1)
        for name, source in SHARED.items():
            torch.testing.assert_close(got[:, VOC.index(name)], given[:,
                                                                      source])


def test_averages(coco, new_head):
    """The copy of the averages gets rows of its own, and the same new ones."""
    head = new_head(20)
    new, receipt = transfer_classes(coco, VOC, head)
    assert 'the same in ema_state_dict' in receipt
    old, averages = coco['ema_state_dict'], new['ema_state_dict']
    check_kept(averages, old)
    assert averages['steps'] == 9
    drawn = check_predictor(averages, old, prefix='module.')
    assert torch.equal(drawn,
                       check_predictor(new['state_dict'], coco['state_dict']))
    del coco['ema_state_dict']
    new, receipt = transfer_classes(coco, VOC, head)
    assert 'ema_state_dict' not in new
    assert 'the same in ema_state_dict' not in receipt


def test_another_order(coco, new_head):
    """Rows follow their names, also where no class is new."""
    head = new_head(80)
    new, receipt = transfer_classes(coco, COCO[::-1], head)
    for key in (WEIGHT, BIAS):
        rows = new['state_dict'][key].reshape(9, 80, -1)
        assert torch.equal(
            rows.flip(1), coco['state_dict'][key].reshape(9, 80, -1))
    assert 'new: 0 classes' in receipt
    same, _ = transfer_classes(coco, COCO, head)
    for key, value in same['state_dict'].items():
        assert torch.equal(value, coco['state_dict'][key])


@pytest.mark.parametrize('prefix', ['module.', 'student.', 'a.detector.'])
def test_wrapped_detectors(coco, new_head, prefix):
    """Keys of a detector inside another module are found."""
    old = {prefix + k: v for k, v in coco['state_dict'].items()}
    new, _ = transfer_classes(
        dict(meta=coco['meta'], state_dict=old), VOC, new_head(20))
    check_kept(new['state_dict'], old)
    check_predictor(new['state_dict'], old, prefix=prefix)


def test_case_matters(coco, new_head):
    """A name in other letters is new, and the receipt tells the likely one."""
    names = ('Cat', 'dog', 'dining_table', 'sofa')
    new, receipt = transfer_classes(coco, names, new_head(4))
    assert 'copied: 1 classes (dog)' in receipt
    assert 'new: 3 classes (Cat, dining_table, sofa)' in receipt
    check_predictor(new['state_dict'], coco['state_dict'], names)
    hints = [line for line in receipt if line.startswith('hint')]
    assert len(hints) == 2
    assert "'Cat'" in hints[0] and "'cat'" in hints[0]
    assert "'dining_table'" in hints[1] and "'dining table'" in hints[1]


# What is done to the checkpoint: (edit, words of the message).
WRONG = dict(
    no_meta=(lambda c: c.pop('meta'), ['has no class names']),
    list_as_meta=(lambda c: c.update(meta=['dataset_meta']),
                  ['has no class names']),
    text_as_meta=(lambda c: c.update(meta='dataset_meta'),
                  ['has no class names']),
    none_as_meta=(lambda c: c.update(meta=None), ['has no class names']),
    list_as_weights=(lambda c: c.update(state_dict=[WEIGHT]),
                     ['state_dict of the checkpoint has no']),
    none_as_averages=(lambda c: c.update(ema_state_dict=None),
                      ['ema_state_dict of the checkpoint has no']),
    number_as_rows=(lambda c: c['state_dict'].update({WEIGHT: 5}),
                    [WEIGHT, '0 rows']),
    number_as_key=(lambda c: c.update(state_dict={5: 5}),
                   ['has no bbox_head.conv_cls.pointwise']),
    no_names=(lambda c: c['meta'].update(dataset_meta={}),
              ['has no class names', 'tools/convert_checkpoint.py']),
    count=(lambda c: c['meta'].update(dataset_meta=dict(classes=COCO[:79])),
           ['720 rows', '9 anchors', '79 classes']),
    twice=(lambda c: c['meta'].update(
        dataset_meta=dict(classes=('dog', *COCO[1:]))),
           ["'dog' occurs twice"]),
    size=(lambda c: c['state_dict'].update({
        WEIGHT: torch.zeros(720, 88, 1, 1)
    }), ['[88, 1, 1]', '[64, 1, 1]', 'another size']),
    averages=(lambda c: c['ema_state_dict'].clear(),
              ['has no bbox_head.conv_cls.pointwise']),
    other=(lambda c: c.update(state_dict=dict(fc=torch.zeros(80))),
           ['has no bbox_head.conv_cls.pointwise']))  # yapf: disable


@pytest.mark.parametrize('name', WRONG)
def test_what_cannot_be_transferred(coco, new_head, name):
    edit, parts = WRONG[name]
    edit(coco)
    with pytest.raises(ValueError) as error:
        transfer_classes(coco, VOC, new_head(20))
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize('meta', [None, ['dataset_meta'], 'dataset_meta', 5])
def test_hook_without_meta(coco, new_head, meta):
    """A checkpoint without class names is loaded, but not transferred."""
    checkpoint, hook = dict(coco, meta=meta), ClassTransferHook()
    dataset = SimpleNamespace(metainfo=dict(classes=VOC))
    runner = SimpleNamespace(
        _resume=False,
        _train_loop=object.__new__(EpochBasedTrainLoop),
        cfg={},
        model=new_head(20),
        train_dataloader=SimpleNamespace(dataset=dataset))
    hook.after_load_checkpoint(runner, checkpoint)
    assert checkpoint['state_dict'] is coco['state_dict']
    runner.cfg['transfer_classes'] = True
    with pytest.raises(ValueError, match='has no class names'):
        hook.after_load_checkpoint(runner, checkpoint)


def test_new_names_differ(coco, new_head):
    with pytest.raises(ValueError, match="'cat' occurs twice"):
        transfer_classes(coco, ('cat', 'dog', 'cat'), new_head(3))


# Trainings with the host's own script

STILL = '''
train_cfg = dict(max_epochs=1)
optim_wrapper = dict(optimizer=dict(lr=0.0))
model = dict(backbone=dict(norm_eval=True))
'''


@pytest.fixture(scope='module')
def voc(tmp_path_factory):
    """Data with VOC's 20 names, and a file of 80 classes to start from.

    Objects are of the first three classes: aeroplane, bicycle and bird.
    """
    folder = tmp_path_factory.mktemp('voc')
    root = make_dataset(folder / 'data')
    data = json.loads((root / 'coco.json').read_text())
    data['categories'] = [
        dict(id=10 * label + 5, name=name) for label, name in enumerate(VOC)
    ]
    (root / 'coco.json').write_text(json.dumps(data))
    run = trained_run(tmp_path_factory.getbasetemp())
    trained = torch.load(run.work_dir / 'epoch_2.pth', weights_only=True)
    state_dict = dict(trained['state_dict'])
    generator = torch.Generator().manual_seed(1)
    for key, shape in ((WEIGHT, (720, 64, 1, 1)), (BIAS, (720, ))):
        state_dict[key] = torch.rand(shape, generator=generator) / 10 - 5
    checkpoint = folder / 'coco.pth'
    torch.save(
        dict(
            meta=dict(dataset_meta=dict(classes=COCO)), state_dict=state_dict),
        checkpoint)
    return SimpleNamespace(
        root=root, checkpoint=checkpoint, state_dict=state_dict)


def config_of(voc, folder, extra='', classes=VOC):
    return write_config(
        folder / 'mine.py',
        voc.root,
        classes=classes,
        extra=f'{STILL}\nload_from = {str(voc.checkpoint)!r}\n{extra}')


@pytest.fixture(scope='module')
def tuned(voc, tmp_path_factory):
    """A run of an epoch that changes no weights, and its log."""
    folder = tmp_path_factory.mktemp('tuned')
    config = config_of(voc, folder, 'transfer_classes = True')
    done = run_tool('train.py', config, cwd=folder)
    assert done.code == 0, done.output
    return SimpleNamespace(config=config, folder=folder, output=done.output)


def is_statistic(key):
    return key.endswith(('running_mean', 'running_var', 'batches_tracked'))


@pytest.mark.slow
def test_load_from(voc, tuned):
    """train.py fine-tunes 80 classes to 20 with one line in the config."""
    assert 'new: 6 classes (aeroplane, diningtable, motorbike' in tuned.output
    assert 'copied: 14 classes (bicycle, bird, boat' in tuned.output
    assert 'do not match' not in tuned.output
    saved = torch.load(
        tuned.folder / 'work_dirs' / 'mine' / 'epoch_1.pth', weights_only=True)
    assert tuple(saved['meta']['dataset_meta']['classes']) == VOC
    # The model and its averages both start so, and nothing was learned.
    averages = {
        k[len('module.'):]: v
        for k, v in saved['ema_state_dict'].items() if k != 'steps'
    }
    for state_dict in (saved['state_dict'], averages):
        drawn = check_predictor(state_dict, voc.state_dict)
        assert drawn.std() == pytest.approx(0.125, rel=0.05)
        for key, value in state_dict.items():
            if PREDICTOR not in key and not is_statistic(key):
                assert torch.equal(value, voc.state_dict[key]), key


@pytest.mark.slow
def test_new_rows_follow_the_seed(voc, tuned, tmp_path):
    """The same seed draws the same rows, another one others.

    The weights of a training without load_from are those before the transfer.
    """
    rows = []
    for seed in (0, 1):
        done = run_tool(
            'train.py',
            tuned.config,
            '--cfg-options',
            'load_from=None',
            'transfer_classes=False',
            f'randomness.seed={seed}',
            cwd=tmp_path)
        assert done.code == 0, done.output
        saved = tmp_path / 'work_dirs' / 'mine' / 'epoch_1.pth'
        rows.append(torch.load(saved, weights_only=True)['state_dict'][WEIGHT])
    saved = tuned.folder / 'work_dirs' / 'mine' / 'epoch_1.pth'
    got = torch.load(saved, weights_only=True)['state_dict'][WEIGHT]
    for name in ANEW:
        label = VOC.index(name)
        assert torch.equal(got[label::20], rows[0][label::20])
        assert not torch.equal(got[label::20], rows[1][label::20])


@pytest.mark.slow
def test_resuming_changes_nothing(tuned, tmp_path):
    """--resume goes on with the rows of the file, whatever its names say."""
    saved = torch.load(
        tuned.folder / 'work_dirs' / 'mine' / 'epoch_1.pth', weights_only=True)
    # With load_from, all rows would change places.
    saved['meta']['dataset_meta']['classes'] = VOC[::-1]
    torch.save(saved, tmp_path / 'renamed.pth')
    done = run_tool(
        'train.py',
        tuned.config,
        '--resume',
        tmp_path / 'renamed.pth',
        '--cfg-options',
        'train_cfg.max_epochs=2',
        cwd=tmp_path)
    assert done.code == 0, done.output
    assert 'resumed epoch: 1, iter: 3' in done.output
    assert 'Transferred' in tuned.output
    assert 'Transferred' not in done.output
    later = torch.load(
        tmp_path / 'work_dirs' / 'mine' / 'epoch_2.pth', weights_only=True)
    for key in (WEIGHT, BIAS):
        assert torch.equal(later['state_dict'][key], saved['state_dict'][key])


# What is wrong: (options, words of the message).
STOPS = dict(
    off=(['transfer_classes=False'], [
        "80 classes ('person', 'bicycle'", "has 20 ('aeroplane', 'bicycle'",
        'transfer_classes=True beside load_from'
    ]),
    head=(['model.bbox_head.num_classes=5'],
          ['num_classes=5', "20 classes ('aeroplane'", 'scale_config(_base_']),
    names=(['transfer_classes=[cat,dog]'],
           ["transfer_classes=['cat', 'dog'] must be True or False"]),
    from_nothing=(['load_from=None'], [
        'needs a checkpoint, and none was loaded: set load_from',
        'inherit another recipe', '(docs/training.md)'
    ]),
    resume_nothing=(['transfer_classes=False', '--resume'], [
        '--resume found no checkpoint in ', "load_from='", 'leave out --resume'
    ]),
    order=(['load_from=reversed.pth', 'transfer_classes=False'], [
        "20 classes ('tvmonitor', 'train'", "has 20 ('aeroplane', 'bicycle'",
        'transfer_classes=True beside load_from'
    ]),
    nameless=(['load_from=bare.pth'], ['has no class names']),
    nameless_off=(['load_from=bare.pth', 'transfer_classes=False'], [
        'predicts 80 classes, this model 20', 'transfer_classes=True beside',
        'tools/convert_checkpoint.py --classes'
    ]))


@pytest.fixture(scope='module')
def stopped(voc, tuned, errors_of_scripts, tmp_path_factory):
    """The errors of train.py, by the name of what is wrong."""
    folder = tmp_path_factory.mktemp('stopped')
    torch.save(dict(state_dict=voc.state_dict), folder / 'bare.pth')
    torch.save(
        dict(
            meta=dict(dataset_meta=dict(classes=VOC[::-1])),
            state_dict=voc.state_dict), folder / 'reversed.pth')
    messages, output = errors_of_scripts(
        {
            name: ('train.py', tuned.config, '--work-dir', name,
                   '--cfg-options', *options)
            for name, (options, _) in STOPS.items()
        }, folder)
    assert 'Epoch(train)' not in output
    assert not list(folder.rglob('epoch*.pth'))
    return messages


@pytest.mark.slow
@pytest.mark.parametrize('name', STOPS)
def test_what_stops_a_training(stopped, name):
    """train.py stops before the first step and says what to write."""
    assert stopped[name].startswith('ValueError: ')
    for part in STOPS[name][1]:
        assert part in stopped[name]


@pytest.mark.slow
def test_testing_transfers_nothing(voc, tuned, tmp_path):
    """test.py would evaluate rows that nothing has trained."""
    done = run_tool('test.py', tuned.config, voc.checkpoint, cwd=tmp_path)
    assert done.code == 1
    assert 'predicts 80 classes, this model 20' in done.output
    assert 'transfer_classes=True beside load_from' in done.output


def test_hook_finds_the_head_in_wrappers(coco, new_head):
    """Of a model inside others, the first head is taken."""
    student = torch.nn.ModuleDict(dict(bbox_head=new_head(20)))
    wrapped = torch.nn.ModuleDict(
        dict(module=torch.nn.ModuleDict(dict(student=student))))
    loop = EpochBasedTrainLoop.__new__(EpochBasedTrainLoop)
    loop.dataloader = SimpleNamespace(
        dataset=SimpleNamespace(metainfo=dict(classes=VOC)))
    runner = SimpleNamespace(
        _resume=False,
        _train_loop=loop,
        train_dataloader=loop.dataloader,
        cfg=dict(transfer_classes=True),
        logger=logging.getLogger('test'),
        model=wrapped)
    given = dict(coco)
    ClassTransferHook().after_load_checkpoint(runner, given)
    check_predictor(given['state_dict'], coco['state_dict'])
    torch.testing.assert_close(
        given['state_dict'][WEIGHT][0],  # aeroplane, of the first anchor
        student['bbox_head'].conv_cls.pointwise.weight[0].detach())
    runner.model = torch.nn.Conv2d(1, 1, 1)
    with pytest.raises(ValueError, match='this model has none'):
        ClassTransferHook().after_load_checkpoint(runner, dict(coco))
    runner.cfg['transfer_classes'] = False
    ClassTransferHook().after_load_checkpoint(runner, dict(coco))


# The tool


@pytest.mark.slow
def test_tool_converts_and_transfers(effdet_lite0, effdet_file, run_converter,
                                     tmp_path):
    """Published weights for the 90 slots of COCO become ones for VOC."""
    published = effdet_lite0
    for name in ('a.pth', 'b.pth'):
        code, output = run_converter(effdet_file, tmp_path / name, '--config',
                                     LITE0, '--classes', *VOC)
        assert code == 0, output
    assert 'layout: effdet' in output
    assert 'copied: 14 classes (bicycle, bird, boat' in output
    assert f'new: 6 classes ({", ".join(ANEW)})' in output
    assert (tmp_path / 'a.pth').read_bytes() == (tmp_path /
                                                 'b.pth').read_bytes()
    saved = torch.load(tmp_path / 'a.pth', weights_only=True)
    # Slots of the ids 3, 17 and 62 of COCO.
    for kind, shape in (('bias', (9, )), ('weight', (9, 64, 1, 1))):
        slots = published[f'class_net.predict.conv_pw.{kind}']
        rows = saved['state_dict'][PREDICTOR + kind]
        for name, slot in dict(car=2, cat=16, chair=61).items():
            row = rows[VOC.index(name)::20]
            assert row.shape == shape
            assert torch.equal(row, slots[slot::90])
        for name in ANEW:
            row = rows[VOC.index(name)::20]
            if kind == 'bias':
                torch.testing.assert_close(row, torch.full((9, ), -4.59511985))
            else:
                assert 0.1 < row.std() < 0.15
    assert torch.equal(
        saved['state_dict']['bbox_head.conv_cls.depthwise'
                            '.weight'],
        published['class_net.predict.conv_dw.weight'])
    inferencer = DetInferencer(
        weights=str(tmp_path / 'a.pth'), device='cpu', show_progress=False)
    assert inferencer.model.bbox_head.num_classes == 20
    assert tuple(inferencer.model.dataset_meta['classes']) == VOC


@pytest.mark.slow
def test_tool_takes_a_training(run_converter, tmp_path, tmp_path_factory):
    """A checkpoint of a training keeps its averages, not its optimizer."""
    run = trained_run(tmp_path_factory.getbasetemp())
    trained = torch.load(run.work_dir / 'epoch_2.pth', weights_only=True)
    code, output = run_converter(run.work_dir / 'epoch_2.pth',
                                 tmp_path / 'x.pth', '--config', run.config,
                                 '--classes', 'violet', 'green')
    assert code == 0, output
    assert 'copied: 1 classes (green)' in output
    assert 'not used: 2 classes (red, blue)' in output
    assert 'the same in ema_state_dict' in output
    saved = torch.load(tmp_path / 'x.pth', weights_only=True)
    assert set(saved) == {'meta', 'state_dict', 'ema_state_dict'}
    for entry, prefix in (('state_dict', ''), ('ema_state_dict', 'module.')):
        check_kept(saved[entry], trained[entry])
        for key in (prefix + BIAS, prefix + WEIGHT):
            assert torch.equal(saved[entry][key][1::2],
                               trained[entry][key][1::3])
    config = Config.fromstring(saved['meta']['cfg'], '.py')
    assert config.model.bbox_head.num_classes == 2
    assert config.train_dataloader.dataset.metainfo.classes == ('violet',
                                                                'green')
    digest = hashlib.sha256((run.work_dir / 'epoch_2.pth').read_bytes())
    assert saved['meta']['source']['sha256'] == digest.hexdigest()


@pytest.mark.slow
def test_tool_writes_nothing_when_it_cannot(voc, run_converter, tmp_path):
    """One clear message, and no file."""
    bare = dict(voc.state_dict)
    bare.update({key: bare[key][:27] for key in (WEIGHT, BIAS)})
    torch.save(dict(state_dict=bare), tmp_path / 'bare.pth')
    for source, config, classes, words in (('bare.pth', LITE0, VOC,
                                            'predicts 3 classes, whose names'),
                                           (voc.checkpoint, D0, VOC,
                                            'does not fit EfficientDet'),
                                           (voc.checkpoint, LITE0, ('cat',
                                                                    'cat'),
                                            'must be a list of different'),
                                           ('none.pth', LITE0, VOC,
                                            'none.pth does not exist')):
        code, output = run_converter(tmp_path / source, tmp_path / 'x.pth',
                                     '--config', config, '--classes', *classes)
        assert code == 1, output
        assert words in output
        assert 'Nothing was written' in output
        assert not (tmp_path / 'x.pth').exists()


@pytest.mark.slow
def test_names_from_the_config(effdet_lite0, tmp_path, tmp_path_factory):
    """Published weights of own classes are named by the config's data."""
    run = trained_run(tmp_path_factory.getbasetemp())
    path = tmp_path / 'effdet.pth'
    published = effdet_reference.with_classes(effdet_lite0, 3)
    torch.save(published, path)
    config = Config.fromfile(run.config)
    new = transfer_file(path, config, ['pink', 'blue', 'violet'])
    assert torch.equal(new['state_dict'][BIAS][1::3],
                       published['class_net.predict.conv_pw.bias'][2::3])
    torch.testing.assert_close(new['state_dict'][BIAS][0::3],
                               torch.full((9, ), -4.59511985))
    assert config.model.bbox_head.num_classes == 3
    assert config.train_dataloader.dataset.metainfo.classes == CLASSES


def test_anchors_of_the_file_stay(coco, tmp_path):
    """The aspect pairs that a file carries get into its config."""
    pairs = [(1.0, 1.0), (1.5, 0.5), (0.5, 1.5)]
    coco['meta'].update(
        aspect_pairs=[list(pair) for pair in pairs],
        mean=[1.0, 2.0, 3.0],
        std=[4.0, 5.0, 6.0],
        pad_value=-1.0)
    torch.save(coco, tmp_path / 'x.pth')
    new = transfer_file(tmp_path / 'x.pth', Config.fromfile(LITE0), ['dog'])
    config = Config.fromstring(new['meta']['cfg'], '.py')
    head = config.model.bbox_head
    assert head.anchor_generator.aspect_pairs == pairs
    preprocessor = config.model.data_preprocessor
    assert preprocessor.mean == [1.0, 2.0, 3.0]
    assert preprocessor.std == [4.0, 5.0, 6.0]
    assert preprocessor.pad_value == -1.0
    assert head.num_classes == 1


def test_safetensors_of_ours(coco, tmp_path):
    """They hold no names, so those of the config count."""
    save_file(coco['state_dict'], tmp_path / 'x.safetensors')
    new = transfer_file(tmp_path / 'x.safetensors', Config.fromfile(LITE0),
                        ['person', 'pink'])
    assert torch.equal(new['state_dict'][BIAS][::2],
                       coco['state_dict'][BIAS][::80])


def test_backbone_alone(effdet_lite0, tmp_path):
    """Without a class predictor there is nothing to transfer."""
    torch.save(
        {
            key.removeprefix('backbone.'): value
            for key, value in effdet_lite0.items()
            if key.startswith('backbone.')
        }, tmp_path / 'x.pth')
    with pytest.raises(ValueError, match='no bbox_head.conv_cls.pointwise'):
        transfer_file(tmp_path / 'x.pth', Config.fromfile(LITE0), ['dog'])
