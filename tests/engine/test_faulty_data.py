"""What cannot be read is named, in training, test and inference."""
import json
import struct
import zlib
from pathlib import Path

import check_dataset
import pytest
import torch
from helpers.broken_data import (build_model, entry, lines, null, voc_config,
                                 write_broken)
from helpers.tiny_data import LITE0, make_dataset, run_tool, write_config
from mmdet.registry import RUNNERS
from mmengine.config import Config

from mmdet_efficientdet import DetInferencer, DetRunner
from mmdet_efficientdet.engine.runner import NamingPipeline


def text(change):
    """A fault of the training file as bytes."""

    def write(folder):
        path = write_broken(folder, lines(''))
        file = folder / 'data' / 'train.json'
        file.write_bytes(change(file.read_bytes()))
        return path

    return write


def content(fault):
    """A fault of what the files contain."""
    return lambda folder: write_broken(folder, fault)


def without(key):
    return content(lambda train, *_: bool(train.pop(key)) * '')


def json_lines(data):
    return b'\n'.join(
        json.dumps(image).encode() for image in json.loads(data)['images'])


# Files that MMDetection's CocoDataset cannot parse, and what is said of them
FILES = dict(
    no_area=(content(entry('area', None)), ['annotation 1', '`area`']),
    null_area=(content(null('area')), ['annotation 1', '$.area', 'null']),
    empty_area=(content(entry('area', '')), ['annotation 1', '$.area']),
    text_area=(content(entry('area', '9')), ['annotation 1', '$.area']),
    no_id=(content(entry('id', None)), ['annotation number 1', '`id`']),
    no_image_id=(content(entry('image_id', None)), ['`image_id`']),
    no_category_id=(content(entry('category_id', None)), ['`category_id`']),
    no_bbox=(content(entry('bbox', None)), ['annotation 1', '`bbox`']),
    null_bbox=(content(null('bbox')), ['annotation 1', '$.bbox']),
    empty_bbox=(content(entry('bbox', [])), ['annotation 1', '$.bbox']),
    text_bbox=(content(entry('bbox', list('1234'))), ['$.bbox[0]', 'str']),
    three=(content(entry('bbox', [1, 2, 3])), ['length 4, got 3']),
    text_width=(content(entry('width', '128', kind='images')),
                ['image 1', '$.width']),
    no_file_name=(content(entry('file_name', None, kind='images')),
                  ['image 1', '`file_name`']),
    no_images=(content(lambda train, *_: train.update(images=[])),
               ['no images']),
    no_key=(without('images'), ['`images`']),
    no_categories=(without('categories'), ['`categories`']),
    two_ids=(content(entry('id', 2)), ['id 2', 'number the annotations']),
    filtered=(content(lambda train, *_: train.update(annotations=[]) or
                      "dataset['filter_cfg']=dict(filter_empty_gt=True)"),
              ['no box is left']),
    mark=(text(lambda data: b'\xef\xbb\xbf' + data), ['BOM', 'UTF-8']),
    utf_16=(text(lambda data: data.decode().encode('utf-16')), ['UTF-8']),
    json_lines=(text(json_lines), ['line 2', 'one object']),
    truncated=(text(lambda data: data[:len(data) // 2]), ['JSON']),
    empty=(text(lambda _: b''), ['empty file']),
    list=(text(lambda _: b'[1]'), ['object', 'array'])
)  # yapf: disable


def error_of(config):
    """The words of an error before the first step."""
    with pytest.raises(ValueError) as error:
        DetRunner.build_dataloader(config.train_dataloader)
    return str(error.value)


@pytest.mark.parametrize('name', FILES)
def test_faulty_file(name, tmp_path, capsys):
    """The host cannot build it; the error has the words of the tool."""
    write, values = FILES[name]
    path = write(tmp_path)
    said = error_of(Config.fromfile(path))
    for value in ('train.json', 'fix: ', *values):
        assert value in said
    assert check_dataset.main([str(path), '--no-images']) == 1
    errors = [line for line in said.splitlines() if 'VERDICT' not in line]
    assert '\n'.join(errors) in capsys.readouterr().out


WRAPPED = """
part = dict(type='CocoDataset', pipeline=_base_.train_pipeline, **dataset)
train_dataloader['dataset'] = dict(
    _delete_=True, type='RepeatDataset', times=2,
    dataset=dict(type='ConcatDataset', datasets=[
        dict(part, ann_file='val.json', data_prefix=dict(img='val/')), part]))
"""


def test_file_inside_wrappers(tmp_path):

    def fault(train, *_):
        del train['annotations'][0]['area']
        return WRAPPED

    said = error_of(Config.fromfile(write_broken(tmp_path, fault)))
    assert 'train.json' in said and '`area`' in said


@pytest.mark.parametrize('old, new', [('<xmin>11', '<xmin>'),
                                      ('</annotation>', '')])
def test_faulty_xml(old, new, tmp_path):
    root = make_dataset(tmp_path / 'data')
    config = Config.fromfile(voc_config(root, tmp_path))
    file = root / 'Annotations' / '000001.xml'
    file.write_text(file.read_text().replace(old, new))
    said = error_of(config)
    assert 'ERROR annotation_file: ' in said and 'ids.txt' in said


def test_other_errors_stay(tmp_path):
    """A fault of the config is no fault of the file."""
    config = Config.fromfile(write_broken(tmp_path, lines('')))
    config.train_dataloader.sampler.type = 'NoSampler'
    with pytest.raises(KeyError, match='NoSampler'):
        DetRunner.build_dataloader(config.train_dataloader)
    config.train_dataloader.dataset.type = 'NoDataset'
    with pytest.raises(KeyError, match='NoDataset'):
        DetRunner.build_dataloader(config.train_dataloader)


def test_all_shipped_configs_have_the_runner():
    runner = Config.fromfile(LITE0).runner_type
    assert RUNNERS.get(runner) is DetRunner


@pytest.mark.slow
@pytest.mark.parametrize('tool', ['train.py', 'test.py'])
def test_scripts_of_the_host(tool, tmp_path):
    """With a plain CocoDataset."""
    split = ('train.py', 'test.py').index(tool)
    config = write_broken(tmp_path, entry('area', None, split=split))
    arguments = ['no.pth'] if split else []
    done = run_tool(tool, config, *arguments, cwd=tmp_path)
    assert done.code == 1
    file = ('train.json', 'val.json')[split]
    for value in (f'{file}: 1 entries', 'annotation 1: ', '`area`'):
        assert value in done.output


def huge_header(width=60000):
    """A small file of PNG that declares 3.6 thousand million pixels."""

    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack(
            '>I', zlib.crc32(kind + data))

    size = struct.pack('>IIBBBBB', width, width, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', size) + chunk(
        b'IDAT', zlib.compress(bytes(100))) + chunk(b'IEND', b'')


IMAGES = pytest.mark.parametrize(
    'image', [b'', huge_header(), b'no image'], ids=['empty', 'huge', 'text'])


@pytest.mark.slow
@IMAGES
@pytest.mark.parametrize('workers', [0, 1])
def test_image_is_named(image, workers, tmp_path):
    config = Config.fromfile(write_broken(tmp_path, lines('')))
    file = tmp_path / 'data' / 'val' / '000003.jpg'
    file.write_bytes(image)
    config.val_dataloader.update(num_workers=workers, persistent_workers=False)
    loader = DetRunner.build_dataloader(config.val_dataloader)
    with pytest.raises(ValueError) as error:
        list(loader)
    assert f'{file} cannot be read' in str(error.value)
    assert 'check_dataset' in str(error.value)


def test_other_transforms_keep_their_errors():

    def fail(data):
        data['img'] = 'read'
        raise KeyError('mine')

    with pytest.raises(KeyError, match='mine'):
        NamingPipeline([fail])(dict(img_path='a.jpg'))


@pytest.fixture(scope='module')
def inferencer(tmp_path_factory):
    folder = tmp_path_factory.mktemp('inferencer')
    config = Config.fromfile(write_config(folder / 'a.py', Path('data')))
    weights = folder / 'weights.pth'
    meta = dict(dataset_meta=dict(classes=('red', 'green', 'blue')))
    state = build_model(config).state_dict()
    torch.save(dict(state_dict=state, meta=meta), weights)
    return DetInferencer(
        str(folder / 'a.py'), str(weights), device='cpu', show_progress=False)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('batch_size', [1, 2, 10])
def test_inference_on_a_folder(batch_size, inferencer, tmp_path):
    """The others are done, and drawn; those that cannot be read are listed."""
    folder = make_dataset(tmp_path / 'data') / 'JPEGImages'
    bad = {'000002.jpg': b'', '000005.jpg': huge_header(), '000006.jpg': b'a'}
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    with pytest.warns(UserWarning, match='000005.jpg'):
        results = inferencer(
            str(folder), batch_size=batch_size, out_dir=str(tmp_path / 'out'))
    assert len(results['predictions']) == 3
    assert sorted(Path(name).name
                  for name, _ in inferencer.unreadable) == [*sorted(bad)]
    assert all(error for _, error in inferencer.unreadable)
    assert {path.name
            for path in (tmp_path / 'out' / 'vis').iterdir()
            } == {path.name
                  for path in folder.iterdir()} - bad.keys()
    good = inferencer(str(folder / '000001.jpg'))
    assert len(good['predictions']) == 1 and not inferencer.unreadable


@IMAGES
@pytest.mark.filterwarnings('ignore')
def test_no_image_can_be_read(image, inferencer, tmp_path):
    (tmp_path / 'a.png').write_bytes(image)
    with pytest.raises(ValueError, match='a.png'):
        inferencer(str(tmp_path / 'a.png'))
