"""A release reproduces its AP, says where it comes from, or is not made."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
import release
import torch
import yaml
from huggingface_hub import parse_eval_result_entries
from mmengine.config import Config
from PIL import Image
from release_parts import card, releasing, settings

from mmdet_efficientdet import load_detector
from mmdet_efficientdet.deploy import releases
from mmdet_efficientdet.weights.sources import open_source

ROOT = Path(__file__).resolve().parents[2]
TREES = ROOT / 'zoo' / 'trees'
FILES = {
    'README.md', 'SHA256SUMS', 'config.json', 'curves.png', 'metafile.yml',
    'model.safetensors', 'training.jsonl', 'training_config.json'
}


@pytest.fixture(scope='module')
def training(tmp_path_factory):
    """A work directory of the released detector, and data that it knows.

    The objects are the middle 72.5 % of its boxes above the widest gap of the
    scores. So every IoU is far from the thresholds of the AP, and the order
    of true and false boxes is certain.
    """
    folder = tmp_path_factory.mktemp('home') / 'work_dir'
    (folder / '1' / 'vis_data').mkdir(parents=True)
    picture = Image.open(ROOT / 'resources' / 'forest.jpg').crop(
        (0, 0, 300, 200))
    picture.save(folder.parent / 'photo.png')
    found = load_detector(TREES, 'cpu')(np.asarray(picture), threshold=0.2)
    last = 6 + np.diff(found.scores)[5:25].argmin()
    boxes = [[x1 + 0.1375 * (x2 - x1), y1, 0.725 * (x2 - x1), y2 - y1]
             for x1, y1, x2, y2 in found.boxes[:last].tolist()]
    assert len(boxes) > 5
    (folder.parent / 'boxes.json').write_text(
        json.dumps(
            dict(
                images=[
                    dict(id=7, file_name='photo.png', width=300, height=200)
                ],
                categories=[dict(id=3, name='Tree')],
                annotations=[
                    dict(
                        id=i + 1,
                        image_id=7,
                        category_id=3,
                        bbox=box,
                        area=box[2] * box[3],
                        iscrowd=0) for i, box in enumerate(boxes)
                ])))
    config = json.loads((TREES / 'training_config.json').read_text())
    config = Config(config)
    dataset = dict(
        data_root=f'{folder.parent}/',
        ann_file='boxes.json',
        data_prefix=dict(img=''))
    for loader in (config.test_dataloader, config.train_dataloader):
        loader.dataset.update(dataset)
    config.work_dir = config.load_from = str(folder)
    config.dump(str(folder / 'my_config.py'))
    checkpoint, = TREES.glob('*.pth')
    data = open_source(str(checkpoint)).checkpoint
    data['meta'].update(
        cfg=config.pretty_text, iter=1000, seed=3, work_dir=str(folder))
    data['optimizer'] = dict(state=torch.zeros(10**6))
    torch.save(data, folder / 'best_coco_bbox_mAP_iter_1000.pth')
    (folder / 'last_checkpoint').write_text('/other/iter_1000.pth')
    records = [dict(step=i, loss=2 - i / 10, lr=0.1) for i in range(1, 9)]
    (folder / '1' / 'vis_data' / 'scalars.json').write_text(''.join(
        json.dumps(x) + '\n' for x in records))
    (folder / '1' / '1.log').write_text(f'    PyTorch: 2.9\n {folder}\n')
    return folder


def make(training, out, *options):
    """Runs the tool in this process; returns the folder."""
    args = [str(training), '--out', str(out), '--name', 'mine', *options]
    return releasing.release(release.parse_args(args))


@pytest.fixture(scope='module')
def made(training, tmp_path_factory):
    out = tmp_path_factory.mktemp('out')
    (out / '.mine.partial').mkdir()  # what a killed run has left
    (out / '.mine.partial' / 'draft.pth').touch()
    return make(training, out, '--limits', 'Has <b>never</b> | seen\nsnow.',
                '--data-licence', 'CC0-1.0', '--hub-dataset', 'owner/data',
                'detection')


@pytest.mark.slow
def test_files(made, training):
    """All have their hashes, and none a path of this machine."""
    checkpoint, = made.glob('*.pth')
    names = {*releasing.files_of(made)}
    assert names == FILES | {checkpoint.name, '.eval_results/results.yaml'}
    sums = releases.read_sums(made)
    assert {*sums} == names - {'SHA256SUMS'}
    releases.check(made, sums)
    assert re.fullmatch(r'my_config_\d{8}-[0-9a-f]{8}\.pth', checkpoint.name)
    assert sums[checkpoint.name].startswith(checkpoint.stem[-8:])
    assert checkpoint.stat().st_size < 16e6  # without the optimizer
    for name in names:
        data = (made / name).read_bytes()
        for private in (training, training.parent, Path.home(), ROOT):
            assert str(private).encode() not in data, name
    assert list(made.parent.iterdir()) == [made]


@pytest.mark.slow
def test_what_it_says(made):
    """AP of both files, provenance, licences, limits; the card is YAML."""
    source = json.loads((made / 'config.json').read_text())['provenance']
    results = source['results']
    assert 40 < results['AP'] < 55
    for name in ('AP_in_MMDetection', 'trained_checkpoint'):
        assert abs(results[name] - results['AP']) <= 0.1
    assert source['training']['seed'] == 3
    assert source['checkpoint_kind'] == 'best of the validation'
    assert source['environment'] == dict(PyTorch='2.9')
    assert source['licences']['data'] == 'CC0-1.0'
    text = (made / 'README.md').read_text()
    _, header, body = text.split('---\n', 2)
    header = yaml.safe_load(header)
    assert header['pipeline_tag'] == 'object-detection'
    metric = header['model-index'][0]['results'][0]['metrics'][0]
    assert metric == dict(type='ap', name='box AP', value=results['AP'])
    assert f'| Tree | {results["classes"][0][1]} | {results["AP"]:.2f} |' \
        in body
    assert '<b>' not in body.replace('\\<b\\>', '')
    assert 'not stated' in body
    entry, = parse_eval_result_entries(
        yaml.safe_load((made / '.eval_results/results.yaml').read_text()))
    assert (entry.dataset_id, entry.task_id) == ('owner/data', 'detection')
    assert entry.value == results['AP']
    entry, = yaml.safe_load((made / 'metafile.yml').read_text())['Models']
    assert (made / entry['Weights']).is_file()
    lines = (made / 'training.jsonl').read_text().splitlines()
    assert json.loads(lines[-1])['loss'] == 1.2


@pytest.mark.slow
def test_name_is_taken(made, training):
    before = {x: (made / x).read_bytes() for x in releasing.files_of(made)}
    with pytest.raises(ValueError, match=f'{made} exists'):
        make(training, made.parent)
    assert before == {
        x: (made / x).read_bytes()
        for x in releasing.files_of(made)
    }


@pytest.mark.slow
def test_what_does_not_reproduce_is_refused(training, tmp_path, monkeypatch):
    """A plain network that is not that of the checkpoint; nothing is left."""
    save = releasing.save_plain

    def damage(network, path):
        network.stem.conv.weight.mul_(0.8)
        save(network, path)

    monkeypatch.setattr(releasing, 'save_plain', damage)
    with pytest.raises(ValueError, match='the release has AP') as error:
        make(training, tmp_path)
    first, second, limit = re.findall(r'\d+\.\d\d', str(error.value))
    boxes = json.loads((training.parent / 'boxes.json').read_text())
    # One box, at one of ten thresholds
    allowed = 0.1 + 10 / len(boxes['annotations'])
    assert limit == f'{allowed:.2f}'
    assert float(second) - float(first) > allowed
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_paths_are_refused(training, tmp_path):
    """Also those that nobody thought of."""
    (tmp_path / 'file').write_bytes(b'abc' + str(training).encode())
    with pytest.raises(ValueError, match=str(training)):
        releasing.refuse_paths(tmp_path, training)


def test_judge():
    releasing.judge('release', 13.9, 14.0, 0.1)
    for found in (13.89, 14.11, float('nan')):
        with pytest.raises(ValueError, match=r'14\.00.*by 0\.1\. '):
            releasing.judge('release', found, 14.0, 0.1)
    with pytest.raises(ValueError, match=r'by 0\.004\. '):
        releasing.judge('release', 13.9, 14.0, 0.004)


def test_publishable():
    """Of absolute paths, only the last part stays, at any depth."""
    config = Config(
        dict(
            work_dir='/home/me/x',
            load_from='/home/me/y.pth',
            data=[dict(root='/home/me/data/', other='data/trees'), ('~/a', )]))
    assert releasing.publishable(config).to_dict() == dict(
        data=[dict(root='data', other='data/trees'), ('a', )])


@pytest.mark.parametrize('files, words', [
    ([], ['0 configs', '--config']),
    (['a.py', 'b.py'], ['2 configs']),
    (['a.py'], ['best_', 'last_checkpoint', '--checkpoint']),
], ids=['empty', 'two configs', 'no checkpoint'])  # yapf: disable
def test_no_training(files, words, tmp_path):
    for name in files:
        (tmp_path / name).touch()
    args = release.parse_args([str(tmp_path)])
    with pytest.raises(ValueError) as error:
        releasing.find_config(args)
        releasing.find_checkpoint(args)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize('step, word', [
    (dict(type='Resize', scale=(1333, 800), keep_ratio=True), '1333'),
    (dict(type='Resize', scale_factor=2.0), 'keep_ratio'),
    (dict(type='mmdet_efficientdet.ResizeCrop', image_size=512,
          half_pixel_centers=False), 'half_pixel_centers'),
    (dict(type='mmdet_efficientdet.ResizeCrop', image_size=512,
          ratio_range=(0.5, 1)), 'ratio_range'),
    (dict(type='Albu', image_size=512), 'Albu'),
], ids=range(5))  # yapf: disable
def test_pipelines_that_cannot_be_followed(step, word):
    config = Config(dict(test_dataloader=dict(dataset=dict(pipeline=[step]))))
    with pytest.raises(ValueError, match=word):
        settings.resize_of(config)


def test_padding_that_differs():
    """A release pads to the size of ResizeCrop, so the training must, too."""
    config = Config(json.loads((TREES / 'training_config.json').read_text()))
    config.test_dataloader.dataset.pipeline[1] = dict(
        type='mmdet_efficientdet.ResizeCrop', image_size=512)
    with pytest.raises(ValueError, match='512.*256.*pad_size_divisor'):
        settings.detector_settings(config, ['Tree'])
    config.model.data_preprocessor.pad_size_divisor = 512
    found = settings.detector_settings(config, ['Tree'])
    assert (found['image_size'], found['resize']) == ([512, 512], 'pad')


def test_names_in_the_card():
    """Markdown and HTML in a class name stay text."""
    text = card.table([['a|b<script>\n# `x`', 3, 1.0, -1.0]])
    row = text.splitlines()
    assert len(row) == 3
    assert row[2] == r'| a\|b\<script\> \# \`x\` | 3 | 1.00 |  |'


@pytest.mark.parametrize(
    'arguments',
    [['.', '--name', '../x'], ['.', '--name', ''], ['.', '--data', 'x.json']],
    ids=str)
def test_arguments(arguments):
    if arguments[-1]:
        with pytest.raises(SystemExit):
            release.parse_args(arguments)
