"""Weights are loaded strictly and as data only, by every tool of the host."""
import os
from types import SimpleNamespace

import mmcv
import numpy as np
import pytest
import torch
from helpers.tiny_data import (CLASSES, LITE0, run_tool, trained_run,
                               write_config)
from mmdet.apis import DetInferencer, inference_detector, init_detector
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import load_checkpoint

from mmdet_efficientdet import EfficientNet, PreflightHook
from mmdet_efficientdet.weights.class_transfer import transfer_file
from mmdet_efficientdet.weights.conventions import conventions
from mmdet_efficientdet.weights.convert import convert_file

BIAS = 'bbox_head.conv_cls.pointwise.bias'
STEM = 'backbone.stem.conv.weight'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A short training by the host's script, shared with other files."""
    return trained_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope='module')
def checkpoint(run):
    """The checkpoint of its second epoch."""
    return torch.load(run.work_dir / 'epoch_2.pth', weights_only=True)


def build_config(**model):
    """The config of a Lite0 for three classes."""
    config = Config.fromfile(LITE0)
    config.model.backbone.init_cfg = None
    config.model.bbox_head.num_classes = 3
    config.merge_from_dict(dict(model=model))
    return config


def build(**model):
    """A Lite0 for three classes."""
    init_default_scope('mmdet')
    return MODELS.build(build_config(**model).model)


@pytest.fixture(scope='module')
def detector():
    """A Lite0 into which only what it refuses is loaded."""
    return build()


def renamed(state_dict, edit):
    """A copy of a state dict after ``edit``."""
    state_dict = dict(state_dict)
    edit(state_dict)
    return state_dict


# What is wrong with a checkpoint, and what the message must say of it.
EDITS = dict(
    missing=(lambda s: s.pop(STEM),
             ['1 only in the model', f'+ {STEM} (32, 3, 3, 3)']),
    unexpected=(lambda s: s.update({'neck.alpha': torch.zeros(7)}),
                ['1 only in the checkpoint', '- neck.alpha (7,)']),
    renamed=(lambda s: s.update({'stem': s.pop(STEM)}), [
        '1 only in the model', f'+ {STEM} (32, 3, 3, 3)',
        '1 only in the checkpoint', '- stem (32, 3, 3, 3)'
    ]),
    shape=(lambda s: s.update({STEM: torch.zeros(32, 3, 5, 5)}), [
        '1 of another shape (checkpoint, model)',
        f'! {STEM} (32, 3, 5, 5), (32, 3, 3, 3)'
    ]),
    prefix=(lambda s: [s.update({f'model.{k}': s.pop(k)}) for k in list(s)],
            ['+ backbone.', '- model.backbone.']),
    other_model=(lambda s: (s.clear(), s.update({'conv1.weight': torch.ones(
        64, 3, 7, 7)})), ['- conv1.weight (64, 3, 7, 7)', '+ backbone.']),
    empty=(lambda s: s.clear(), ['+ backbone.']),
    backbone_only=(lambda s: [
        s.pop(k) for k in list(s) if not k.startswith('backbone.')
    ], ['+ neck.', 'only in the model']))  # yapf: disable


@pytest.mark.parametrize('name', EDITS)
def test_mismatch_raises(checkpoint, detector, tmp_path, name):
    """load_checkpoint, which would only log, raises and lists both sides."""
    edit, parts = EDITS[name]
    state_dict = renamed(checkpoint['state_dict'], edit)
    torch.save(dict(state_dict=state_dict), tmp_path / 'x.pth')
    with pytest.raises(ValueError, match='does not fit EfficientDet') as error:
        load_checkpoint(detector, str(tmp_path / 'x.pth'))
    for part in parts:
        assert part in str(error.value)


VALUES = dict(
    nan=lambda value: value.index_fill(0, torch.tensor(0), float('nan')),
    infinite=lambda value: value / 0,
    integers=lambda value: value.long(),
    bool=lambda value: value > 0,
    meta=lambda value: value.to('meta'))


@pytest.mark.parametrize('name', VALUES)
def test_wrong_values_raise(checkpoint, detector, tmp_path, name):
    """Names and shapes fit, but nothing could be detected."""
    state_dict = dict(checkpoint['state_dict'])
    state_dict[STEM] = VALUES[name](state_dict[STEM])
    torch.save(dict(state_dict=state_dict), tmp_path / 'x.pth')
    match = f'1 weights of the checkpoint for EfficientDet .*: {STEM} '
    with pytest.raises(ValueError, match=match):
        load_checkpoint(detector, str(tmp_path / 'x.pth'))
    with pytest.raises(ValueError, match=match):
        init_detector(build_config(), str(tmp_path / 'x.pth'), device='cpu')


@pytest.mark.parametrize('dtype', [torch.float16, torch.float64])
def test_other_precisions_load(checkpoint, dtype):
    """Counters of batch norms are integers, which is right."""
    model = build()
    model.load_state_dict({
        key:
        value.to(dtype) if value.is_floating_point() else value
        for key, value in checkpoint['state_dict'].items()
    })
    stem = model.state_dict()[STEM]
    assert torch.equal(stem, checkpoint['state_dict'][STEM].to(dtype).float())


def test_long_lists_are_cut(detector):
    """A message names the number of differences and the first ten."""
    with pytest.raises(ValueError) as error:
        detector.load_state_dict({})
    lines = str(error.value).splitlines()
    assert len([line for line in lines if line.startswith('  + ')]) == 10
    # 588 tensors and 108 counters, of which the latter may be missing
    assert '588 only in the model:' in lines


def test_other_size_raises(tmp_path, build_detector):
    """D1's weights do not fit D0, and the message shows both."""
    torch.save(
        dict(state_dict=build_detector('d1').state_dict()), tmp_path / 'x.pth')
    with pytest.raises(ValueError) as error:
        load_checkpoint(build_detector('d0'), str(tmp_path / 'x.pth'))
    message = str(error.value)
    assert 'of another size or model?' in message
    # By hand: only D0's second block has an expansion, of 5 tensors. D1 has
    # 868 - (676 - 5) tensors and 136 - 107 counters more.
    assert '5 only in the model:' in message
    assert '226 only in the checkpoint:' in message
    assert '+ backbone.blocks.1.expand_conv.conv.weight (96, 16, 1, 1)' \
        in message
    assert '! backbone.blocks.1.depthwise_conv.conv.weight (16, 1, 3, 3), ' \
        '(96, 1, 3, 3)' in message


@pytest.mark.parametrize('num_classes', [1, 20])
def test_other_class_count_raises(checkpoint, tmp_path, num_classes):
    """The message names both numbers of classes."""
    torch.save(dict(state_dict=checkpoint['state_dict']), tmp_path / 'x.pth')
    model = build(bbox_head=dict(num_classes=num_classes))
    with pytest.raises(ValueError) as error:
        load_checkpoint(model, str(tmp_path / 'x.pth'))
    message = str(error.value)
    assert f'predicts 3 classes, this model {num_classes}.' in message
    assert f'! {BIAS} (27,), ({9 * num_classes},)' in message


@pytest.mark.parametrize('form', ['plain', 'wrapped', 'bare', 'counters'])
def test_equal_weights_load(checkpoint, tmp_path, form):
    """A state dict that fits is loaded, tensor by tensor.

    It may come from a model inside a wrapper, stand alone, or lack the
    counters of the batch norms, as converted weights do.
    """
    state_dict = dict(checkpoint['state_dict'])
    if form == 'wrapped':
        saved = dict(state_dict={
            f'module.{k}': v
            for k, v in state_dict.items()
        })
    elif form == 'counters':
        saved = dict(
            state_dict={
                k: v
                for k, v in state_dict.items()
                if not k.endswith('num_batches_tracked')
            })
    else:
        saved = state_dict if form == 'bare' else dict(state_dict=state_dict)
    torch.save(saved, tmp_path / 'x.pth')
    model = build()
    load_checkpoint(model, str(tmp_path / 'x.pth'))
    loaded = model.state_dict()
    assert len(loaded) == 588 + 108
    for key, value in loaded.items():
        if form != 'counters' or not key.endswith('num_batches_tracked'):
            assert torch.equal(value, state_dict[key]), key


def test_gray_detector(checkpoint, tmp_path):
    """Weights for colors, and a config for images of one channel."""
    path = str(tmp_path / 'x.pth')
    torch.save(dict(state_dict=checkpoint['state_dict']), path)
    gray = dict(
        backbone=dict(in_channels=1),
        data_preprocessor=dict(mean=[118.0], std=[60.0], bgr_to_rgb=False))
    config = build_config(**gray)
    config.test_dataloader.dataset.pipeline[0].color_type = 'grayscale'
    model = init_detector(config, path, device='cpu')
    stem = checkpoint['state_dict'][STEM].sum(1, keepdim=True)
    assert torch.equal(model.state_dict()[STEM], stem)
    image = tmp_path / 'x.png'
    mmcv.imwrite(np.random.randint(0, 255, (64, 96, 3), np.uint8), str(image))
    result = inference_detector(model, str(image)).pred_instances
    assert len(result) and result.scores.isfinite().all()


def test_backbone_of_another_arch_raises(tmp_path):
    """A Pretrained init_cfg with other weights raises, and does not log."""
    path = str(tmp_path / 'b0.pth')
    b0 = EfficientNet('b0')
    torch.save(b0.state_dict(), path)
    init_cfg = dict(type='Pretrained', checkpoint=path)
    for arch in ('b1', 'b2', 'lite0'):
        with pytest.raises(ValueError, match='not fit EfficientNet'):
            EfficientNet(arch, init_cfg=init_cfg).init_weights()
    same = EfficientNet('b0', init_cfg=init_cfg)
    same.init_weights()
    for key, value in same.state_dict().items():
        assert torch.equal(value, b0.state_dict()[key]), key
    # Blocks above the levels that are used are ignored.
    EfficientNet('b0', out_indices=(2, 3), init_cfg=init_cfg).init_weights()
    # Weights of a whole detector, of which mmengine takes the backbone.
    torch.save({f'backbone.{k}': v for k, v in b0.state_dict().items()}, path)
    init_cfg['prefix'] = 'backbone.'
    same.init_cfg = init_cfg
    same._is_init = False
    same.init_weights()
    with pytest.raises(ValueError, match='not fit EfficientNet'):
        EfficientNet('b1', init_cfg=init_cfg).init_weights()


def test_apis_are_strict(run, checkpoint, tmp_path):
    """init_detector and DetInferencer raise on what they cannot load."""
    state_dict = renamed(checkpoint['state_dict'], EDITS['missing'][0])
    path = str(tmp_path / 'x.pth')
    torch.save(dict(checkpoint, state_dict=state_dict), path)
    for load in (lambda: init_detector(str(run.config), path, device='cpu'),
                 lambda: DetInferencer(str(run.config), path, device='cpu'),
                 lambda: DetInferencer(weights=path, device='cpu')):
        with pytest.raises(ValueError) as error:
            load()
        assert f'+ {STEM}' in str(error.value)


@pytest.mark.slow
def test_test_script_is_strict(run, checkpoint, tmp_path):
    """The host's test.py stops, where it would go on to a mAP of zero."""
    state_dict = renamed(checkpoint['state_dict'], EDITS['unexpected'][0])
    torch.save(dict(checkpoint, state_dict=state_dict), tmp_path / 'x.pth')
    done = run_tool('test.py', run.config, tmp_path / 'x.pth', cwd=tmp_path)
    assert done.code == 1
    assert 'does not fit EfficientDet' in done.output
    assert '- neck.alpha (7,)' in done.output
    assert 'bbox_mAP' not in done.output


def test_training_checkpoint_is_data_only(run, checkpoint):
    """torch.load with weights_only reads what training has written.

    The fixture has done that already; here is what it must hold: the averages
    as weights, the raw weights, and the log history as lists.
    """
    assert set(checkpoint) == {
        'meta', 'state_dict', 'message_hub', 'optimizer', 'param_schedulers',
        'ema_state_dict'
    }
    assert checkpoint['meta']['dataset_meta']['classes'] == CLASSES
    assert (checkpoint['meta']['epoch'], checkpoint['meta']['iter']) == (2, 6)
    loss = checkpoint['message_hub']['log_scalars']['train/loss']
    assert len(loss['log_history']) == len(loss['count_history']) == 6
    assert all(type(x) is float and 0 < x < 100 for x in loss['log_history'])
    for state_dict in ('state_dict', 'ema_state_dict'):
        for key, value in checkpoint[state_dict].items():
            if isinstance(value, torch.Tensor):
                assert value.isfinite().all(), key
    raw = checkpoint['ema_state_dict'][f'module.{BIAS}']
    assert not torch.equal(checkpoint['state_dict'][BIAS], raw)
    before = torch.load(run.work_dir / 'epoch_1.pth', weights_only=True)
    assert not torch.equal(checkpoint['state_dict'][BIAS],
                           before['state_dict'][BIAS])


def test_ema_weights_load(run, checkpoint):
    """A model gets the averages, not the weights of the last step."""
    model = init_detector(
        str(run.config), str(run.work_dir / 'epoch_2.pth'), device='cpu')
    loaded = model.state_dict()
    assert torch.equal(loaded[BIAS], checkpoint['state_dict'][BIAS])
    assert model.dataset_meta['classes'] == CLASSES


@pytest.mark.slow
def test_resume_continues(run, tmp_path):
    """train.py --resume goes on counting, logging and averaging."""
    work_dir = tmp_path / 'work_dir'
    work_dir.mkdir()
    os.link(run.work_dir / 'epoch_1.pth', work_dir / 'epoch_1.pth')
    (work_dir / 'last_checkpoint').write_text(str(work_dir / 'epoch_1.pth'))
    done = run_tool(
        'train.py',
        run.config,
        '--work-dir',
        work_dir,
        '--resume',
        '--cfg-options',
        'train_cfg.val_interval=9',
        cwd=tmp_path)
    assert done.code == 0, done.output
    assert 'resumed epoch: 1, iter: 3' in done.output
    assert 'Epoch(train) [1]' not in done.output
    assert 'Epoch(train) [2][3/3]' in done.output
    first, second = (torch.load(folder / name, weights_only=True)
                     for folder, name in ((run.work_dir, 'epoch_1.pth'),
                                          (work_dir, 'epoch_2.pth')))
    assert second['meta']['iter'] == 6
    assert second['ema_state_dict']['steps'] == 6
    for name in ('train/loss', 'train/lr', 'train/grad_norm'):
        old, new = (
            c['message_hub']['log_scalars'][name]['log_history']
            for c in (first, second))
        assert len(old) == 3 and len(new) == 6
        assert new[:3] == old
    # Nothing of the schedule and the optimizer starts again.
    assert [s['_global_step'] for s in second['param_schedulers']] == [6]
    assert len(second['optimizer']['state']) == len(
        first['optimizer']['state']) > 0


INFER = '''
import sys
assert 'mmdet_efficientdet' not in sys.modules
from mmdet.apis import DetInferencer
inferencer = DetInferencer(*ARGS, **KWARGS, device='cpu')
assert type(inferencer.model).__module__.startswith('mmdet_efficientdet.')
assert inferencer.model.dataset_meta['classes'] == ('red', 'green', 'blue')
result, = inferencer(IMAGE)['predictions']
assert 0 < len(result['bboxes']) == len(result['scores']) <= 100
assert all(0 < score < 1 for score in result['scores'])
assert set(result['labels']) <= {0, 1, 2}
print('scores', result['scores'][:3])
'''


@pytest.mark.slow
def test_inferencer_in_a_fresh_process(run, tmp_path):
    """Config and weights, or weights alone: the same boxes, no import."""
    weights = str(run.work_dir / 'epoch_2.pth')
    outputs = []
    for args, kwargs in (((str(run.config), weights), {}),
                         ((), dict(weights=weights))):
        image = str(run.root / 'JPEGImages' / '000001.jpg')
        head = f'ARGS = {args}\nKWARGS = {kwargs}\nIMAGE = {image!r}\n'
        done = run_tool('infer', cwd=tmp_path, source=head + INFER)
        assert done.code == 0, done.output
        outputs.append(done.output[done.output.index('scores'):])
    assert outputs[0] == outputs[1]


def test_other_conventions_are_said():
    """A checkpoint that was made for other settings than the config's."""
    lines, hook = [], PreflightHook()
    runner = SimpleNamespace(
        cfg=Config.fromfile(LITE0),
        hooks=[hook],
        logger=SimpleNamespace(warning=lines.append))
    same = conventions(runner.cfg.model)
    hook.after_load_checkpoint(runner, dict(meta=same))
    hook.after_load_checkpoint(runner, dict(meta={}))
    assert not lines
    other = dict(same, anchor_scale=5.0, mean=[1.0, 2.0, 3.0])
    hook.after_load_checkpoint(runner, dict(meta=other))
    line, = lines
    assert "model.data_preprocessor.mean=[1.0,2.0,3.0]'" in line
    assert 'anchor_generator.octave_base_scale=5.0' in line
    assert 'aspect_pairs' not in line


class Planted:
    """What an attacker puts into a file: loading it runs a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker), )


@pytest.fixture(params=['meta', 'beside', 'inside'])
def planted(request, checkpoint, tmp_path):
    """A checkpoint that would create ``marker``, and the marker's path."""
    marker = tmp_path / 'marker'
    meta = dict(checkpoint['meta'])
    saved = dict(checkpoint, meta=meta)
    if request.param == 'meta':
        meta['author'] = Planted(marker)
    elif request.param == 'beside':
        saved['extra'] = Planted(marker)
    else:
        saved['state_dict'] = dict(checkpoint['state_dict'],
                                   **{BIAS: Planted(marker)})
    path = tmp_path / 'planted.pth'
    torch.save(saved, path)
    return path, marker


def test_planted_code_would_run(planted):
    """The files of the next tests are dangerous where they are trusted."""
    path, marker = planted
    torch.load(path, weights_only=False)
    assert marker.is_dir()


@pytest.mark.slow
def test_apis_run_no_planted_code(planted, run):
    """Inferencer, backbone weights and loaders refuse the file."""
    path, marker = map(str, planted)
    init_cfg = dict(type='Pretrained', checkpoint=path, prefix='backbone.')
    for load in (
            lambda: DetInferencer(weights=path, device='cpu'),
            lambda: DetInferencer(str(run.config), path, device='cpu'),
            lambda: init_detector(str(run.config), path, device='cpu'),
            lambda: load_checkpoint(build(), path),
            lambda: EfficientNet('lite0', init_cfg=init_cfg).init_weights()):
        with pytest.raises(Exception, match='[Ww]eights.only'):
            load()
        assert not os.path.exists(marker)


@pytest.mark.slow
@pytest.mark.parametrize('planted', ['meta'], indirect=True)
def test_scripts_run_no_planted_code(planted, run, errors_of_scripts,
                                     tmp_path):
    """train.py with load_from or a backbone, and test.py, refuse it, too."""
    path, marker = planted
    train = ('train.py', run.config)
    backbone = 'model.backbone.init_cfg.checkpoint'
    calls = dict(
        test=('test.py', run.config, path),
        load_from=(*train, '--cfg-options', f'load_from={path}'),
        resume=(*train, '--resume', path),
        backbone=(*train, '--cfg-options', f'{backbone}={path}'))
    messages, _ = errors_of_scripts(calls, tmp_path)
    assert messages.keys() == calls.keys()
    for name, message in messages.items():
        assert 'Weights only load failed' in message, name
    assert not marker.exists()


@pytest.mark.slow
def test_load_from_takes_everything(run, tmp_path):
    """load_from between models of equal classes is silent and complete."""
    config = write_config(tmp_path / 'tuned.py', run.root, image_size=128)
    done = run_tool(
        'train.py',
        config,
        '--cfg-options',
        f'load_from={run.work_dir / "epoch_2.pth"}',
        'train_cfg.max_epochs=1',
        'optim_wrapper.optimizer.lr=0.',
        'model.backbone.norm_eval=True',
        cwd=tmp_path)
    assert done.code == 0, done.output
    assert 'do not match' not in done.output
    before, after = (
        torch.load(path, weights_only=True)['state_dict']
        for path in (run.work_dir / 'epoch_2.pth',
                     tmp_path / 'work_dirs' / 'tuned' / 'epoch_1.pth'))
    assert set(before) == set(after)
    # With a learning rate of zero the weights are those that were loaded.
    for key in before:
        if not key.endswith(('running_mean', 'running_var', 'tracked')):
            assert torch.equal(before[key], after[key]), key


def test_loading_says_nothing_when_it_fits(checkpoint, tmp_path, capsys):
    """No warning about keys, for a checkpoint that fits."""
    torch.save(dict(state_dict=checkpoint['state_dict']), tmp_path / 'x.pth')
    model = build()
    capsys.readouterr()
    load_checkpoint(model, str(tmp_path / 'x.pth'))
    printed = ''.join(capsys.readouterr())
    assert 'x.pth' in printed  # mmengine's line that it loads
    assert 'match' not in printed and 'key' not in printed


@pytest.fixture
def planted_texts(checkpoint, tmp_path):
    """A checkpoint with code in every text of a config, and the marker."""
    marker = tmp_path / 'marker'
    code = f'made = __import__("os").mkdir({str(marker)!r})'
    text = f'{checkpoint["meta"]["cfg"]}\n{code}\n'
    hub = checkpoint['message_hub']
    path = tmp_path / 'planted.pth'
    torch.save(
        dict(
            checkpoint,
            meta=dict(checkpoint['meta'], cfg=text, config=text),
            message_hub=dict(
                hub, runtime_info=dict(hub['runtime_info'], cfg=text))), path)
    return path, marker


@pytest.mark.slow
def test_apis_execute_no_text(planted_texts, run, tmp_path):
    """Except the inferencer without a config, as docs/weights.md says."""
    path, marker = planted_texts
    config, init_cfg = Config.fromfile(run.config), dict(
        type='Pretrained', checkpoint=str(path), prefix='backbone.')
    converted = str(tmp_path / 'converted.pth')

    def convert():
        for checkpoint in (convert_file(str(path), config),
                           transfer_file(str(path), config, ['red', 'cat'])):
            torch.save(checkpoint, converted)
            DetInferencer(weights=converted, device='cpu')

    for load in (
            lambda: DetInferencer(str(run.config), str(path), device='cpu'),
            lambda: init_detector(str(run.config), str(path), device='cpu'),
            lambda: load_checkpoint(build(), str(path)), convert,
            lambda: EfficientNet('lite0', init_cfg=init_cfg).init_weights()):
        load()
        assert not marker.exists()
    DetInferencer(weights=str(path), device='cpu')
    assert marker.exists()


@pytest.mark.slow
def test_scripts_execute_no_text(planted_texts, run, errors_of_scripts,
                                 tmp_path):
    """Neither test.py nor train.py with load_from or --resume."""
    path, marker = planted_texts
    train = ('train.py', run.config)
    calls = dict(
        test=('test.py', run.config, path),
        load_from=(*train, '--cfg-options', f'load_from={path}'),
        resume=(*train, '--resume', path))
    messages, output = errors_of_scripts(calls, tmp_path)
    assert not messages, messages
    assert 'resumed epoch: 2, iter: 6' in output
    assert not marker.exists()
