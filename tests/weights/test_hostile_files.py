"""What a file contains beside its weights is not trusted."""
import os
import shlex
from math import inf, nan

import numpy as np
import pytest
import torch
from helpers.tensorflow_files import write_bundle
from helpers.tiny_data import LITE0
from mmengine.config import Config

from mmdet_efficientdet import EfficientNet
from mmdet_efficientdet.weights.class_transfer import transfer_file
from mmdet_efficientdet.weights.conventions import (conventions,
                                                    differing_options, meta_of,
                                                    option, read_conventions)
from mmdet_efficientdet.weights.convert import COCO, convert_file

CODE = "': __import__('os').mkdir('marker'), '"
NUMBERS = {
    'mean': [
        5, 'abc', [1, 2], [1.0, 2.0, nan], [inf] * 3, ['1', '2', '3'],
        [True] * 3, {CODE: 1}, [[1, 2, 3]], [10**400] * 3, {1.0, 2.0, 3.0}
    ],
    'std': [0, [0, 1, 1], [1, 1, -1], [1, nan, 1], [1, 1], [[1], [1], [1]]],
    'pad_value': [{CODE: 1}, CODE, nan, inf, None, [1], True, 10**5000],
    'anchor_scale': [-4, 0, '4', nan, inf, [4], None, False],
    'aspect_pairs': [
        5, [], 'ab', ['ab'], [5], [[1]], [[1, 2, 3]], [[1, 0]], [[1, -1]],
        [[1, nan]], [[1, inf]], [['1', '2']], [{1: 1, 2: 2}], [[1, 1]] * 101,
        {CODE: 1}, ['\x1b[2J\n' * 1000]
    ]
}  # yapf: disable
WRONG = [(key, value) for key, values in NUMBERS.items() for value in values]
IDS = [f'{key}-{i}' for i, (key, _) in enumerate(WRONG)]


def check_message(message, key):
    """It has the name, and is short and of one line."""
    assert key in message and 'must be' in message
    assert len(message) < 300 and message.isprintable()


@pytest.mark.parametrize('key, value', WRONG, ids=IDS)
def test_wrong_conventions_are_refused(key, value):
    with pytest.raises(ValueError) as error:
        read_conventions({key: value})
    check_message(str(error.value), key)


@pytest.mark.parametrize('key, value', WRONG[::7], ids=IDS[::7])
def test_no_advice_from_wrong_conventions(key, value, log):
    """Neither of them nor of the sound ones beside them."""
    model = Config.fromfile(LITE0).model
    sound = dict(conventions(model), mean=[1.0, 2.0, 3.0])
    sound.pop(key)
    meta = {'mean': sound.get('mean'), key: value}
    assert differing_options(meta, model) == []
    line, = log
    check_message(line.partition('. The weights')[0], key)


@pytest.mark.parametrize('meta', [['mean'], 'the mean', 5, None])
def test_meta_that_is_no_dict(meta, log):
    with pytest.raises(ValueError, match='the meta .* must be a dict'):
        read_conventions(meta)
    assert differing_options(meta, Config.fromfile(LITE0).model) == []
    assert 'the meta' in log[0]


def test_right_conventions():
    """Of each config that ships, and the rare ones."""
    for meta in (conventions(Config.fromfile(LITE0).model),
                 dict(mean=None, std=None), dict(mean=[0], std=[2]), {},
                 dict(pad_value=-1, aspect_pairs=[[1, 1], [2, 0.5]])):
        assert read_conventions(meta) == meta


# Values of the meta, and the words of the error.
METAS = dict(
    pad_value=(dict(pad_value={CODE: 1}), 'the pad_value'),
    nan=(dict(mean=[nan] * 3), 'the mean'),
    number=(dict(dataset_meta=dict(classes=5)), 'the class names'),
    text=(dict(dataset_meta=dict(classes='abc')), 'the class names'),
    dicts=(dict(dataset_meta=dict(classes=[{
        CODE: 1
    }])), 'the class names'),
    list=(dict(dataset_meta=['a']), 'the class names'),
    set=(dict(dataset_meta=dict(classes={'a', 'b'})), 'the class names'),
    source=(dict(source=5), 'the source'),
    no_receipt=(dict(source=dict(file='x', sha256='0')), 'receipt'),
    receipt=(dict(source=dict(file='x', sha256='0', receipt=[5])), 'receipt'),
    file=(dict(source=dict(file=5, sha256='0', receipt=[])), 'file'),
    no_hash=(dict(source=dict(file='x', receipt=[])), 'sha256'))


@pytest.mark.parametrize('name', METAS)
def test_wrong_meta_is_refused(name, lite0, tmp_path, monkeypatch):
    """By the converter and by the transfer of classes."""
    monkeypatch.chdir(tmp_path)
    values, words = METAS[name]
    meta = dict(dict(dataset_meta=dict(classes=COCO)), **values)
    torch.save(dict(meta=meta, state_dict=lite0), 'x.pth')
    config = Config.fromfile(LITE0)
    for read in (lambda: convert_file('x.pth', config),
                 lambda: transfer_file('x.pth', config, ['dog'])):
        with pytest.raises(ValueError, match='must be') as error:
            read()
        check_message(str(error.value), words)
    assert os.listdir() == ['x.pth']


@pytest.mark.slow
def test_no_dict_as_meta(lite0, tmp_path):
    """As without any: the names are those of the config."""
    for meta in (None, ['cfg'], 'cfg', 5):
        assert meta_of(dict(meta=meta)) == meta_of({}) == {}
    path, config = tmp_path / 'x.pth', Config.fromfile(LITE0)
    torch.save(dict(meta=['cfg'], state_dict=lite0), path)
    new = convert_file(path, config)['meta']
    assert new['dataset_meta']['classes'] == COCO
    assert 'class names: of the config' in '\n'.join(new['source']['receipt'])
    assert transfer_file(
        path, config, ['dog'])['meta']['dataset_meta'] == dict(classes=['dog'])


def test_twice_the_same_class(lite0, tmp_path):
    path = tmp_path / 'x.pth'
    meta = dict(dataset_meta=dict(classes=['dog', *COCO[1:]]))
    torch.save(dict(meta=meta, state_dict=lite0), path)
    with pytest.raises(ValueError, match="'dog' occurs twice"):
        convert_file(path, Config.fromfile(LITE0))


def test_tool_refuses_code(lite0, run_converter, tmp_path, monkeypatch):
    """It would become text of the config in the file that is written."""
    monkeypatch.chdir(tmp_path)
    meta = dict(dataset_meta=dict(classes=COCO), pad_value={CODE: 1})
    torch.save(dict(meta=meta, state_dict=lite0), 'x.pth')
    code, output = run_converter('x.pth', 'y.pth', '--config', LITE0)
    assert code == 1 and 'the pad_value of the checkpoint' in output
    assert os.listdir() == ['x.pth']


@pytest.mark.parametrize('value', [[1.5, -2], "a b';$(c)`d`", 'x"\\y'])
def test_options_are_quoted(value):
    """A shell gives the value back, in one word."""
    word, = shlex.split(option('model.key', value))
    assert word == f'model.key={value}'.replace(' ', '')


CONTROL = '\x1b[2J\n\x07 $(touch marker)'


@pytest.mark.slow
def test_control_characters_of_classes(lite0, run_converter, tmp_path):
    """Of names that are allowed, and of the receipt, they are escaped."""
    path, config = tmp_path / 'x.pth', Config.fromfile(LITE0)
    origin = dict(file='x', sha256=CONTROL, receipt=[CONTROL])
    meta = dict(dataset_meta=dict(classes=[CONTROL, *COCO[1:]]), source=origin)
    torch.save(dict(meta=meta, state_dict=lite0), path)
    receipt = transfer_file(path, config, ['dog'])['meta']['source']['receipt']
    assert all(line.isprintable() for line in receipt[1:])
    assert any('[2J' in line for line in receipt[1:])
    code, output = run_converter(path, tmp_path / 'y.pth', '--config', LITE0)
    assert code == 0 and '\\x1b[2J\\n' in output
    assert output.replace('\n', '').isprintable()


def test_control_characters_of_keys(lite0, run_converter, tmp_path):
    """Of a torch file, a TensorFlow checkpoint, and what a model loads."""
    torch.save({**lite0, CONTROL: torch.ones(1)}, tmp_path / 'x.pth')
    write_bundle(tmp_path / 'model', {CONTROL: np.ones(1, 'f4')})
    torch.save(
        dict(state_dict=lite0, extra=[CONTROL, os.system]),
        tmp_path / 'code.pth')
    for name in ('x.pth', 'model', 'code.pth'):
        code, output = run_converter(tmp_path / name, tmp_path / 'y.pth',
                                     '--config', LITE0)
        assert code == 1 and output.replace('\n', '').isprintable()
    with pytest.raises(ValueError, match='x1b') as error:
        EfficientNet('lite0').load_state_dict({CONTROL: torch.ones(1)})
    assert str(error.value).replace('\n', '').isprintable()
