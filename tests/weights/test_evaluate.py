"""The AP of published weights, with the settings that they want."""
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import evaluate
import pytest
from mmdet.apis import DetInferencer
from mmdet.datasets import CocoDataset
from PIL import Image

from mmdet_efficientdet.weights import published
from mmdet_efficientdet.weights.schemes import config_of

ROOT = Path(__file__).resolve().parents[2]
LITE0 = 'effdet://tf_efficientdet_lite0'


@pytest.fixture
def entry(effdet_file, tmp_path, monkeypatch):
    """The published file is one with random weights and other anchors."""
    digest = hashlib.sha256(effdet_file.read_bytes()).hexdigest()
    file = f'lite0-{digest[:8]}.pth'
    (tmp_path / 'weights').mkdir()
    shutil.copy(effdet_file, tmp_path / 'weights' / file)
    monkeypatch.setenv(published.VARIABLE, str(tmp_path / 'weights'))
    entry = replace(
        published.manifest()[LITE0],
        file=file,
        aspect_pairs=[[3.0, 3.0], [3.0, 1.0], [1.0, 3.0]],
        ap=12.5)
    monkeypatch.setitem(published.manifest(), LITE0, entry)
    return entry


@pytest.fixture
def folder(entry, tmp_path):
    """As COCO's, where the objects are what the network finds."""
    folder = tmp_path / 'coco'
    (folder / 'annotations').mkdir(parents=True)
    (folder / 'val2017').mkdir()
    photo = folder / 'val2017' / 'photo.png'
    Image.open(ROOT / 'resources' / 'forest.jpg').save(photo)
    inferencer = DetInferencer(config_of(entry), LITE0, device='cpu')
    found = inferencer(str(photo))['predictions'][0]
    boxes = [
        dict(
            id=i + 1,
            image_id=1,
            category_id=label + 1,
            bbox=[x1, y1, x2 - x1, y2 - y1],
            area=(x2 - x1) * (y2 - y1),
            iscrowd=0)
        for i, (label, (
            x1, y1, x2,
            y2)) in enumerate(zip(found['labels'][:30], found['bboxes'][:30]))
    ]
    names = CocoDataset.METAINFO['classes']
    (folder / 'annotations' / 'instances_val2017.json').write_text(
        json.dumps(
            dict(
                images=[
                    dict(id=1, file_name='photo.png', width=450, height=400)
                ],
                categories=[dict(id=i + 1, name=n)
                            for i, n in enumerate(names)],
                annotations=boxes)))  # yapf: disable
    return folder


def run(*arguments):
    return evaluate.evaluate(evaluate.parse_args([*map(str, arguments)]))


@pytest.mark.slow
def test_published(entry, folder, monkeypatch):
    """Its own anchors are used; with those of the config the AP is lower."""
    found = run(LITE0, folder)
    assert found == dict(AP=found['AP'], published=12.5)
    assert found['AP'] > 50
    config = Path(config_of(entry).filename)
    other = run(LITE0, folder, '--config', config)
    assert other['AP'] < found['AP'] - 10 and other['published'] is None


@pytest.mark.slow
def test_missing_category(folder):
    """MMDetection would give its boxes the labels of others."""
    path = folder / 'annotations' / 'instances_val2017.json'
    data = json.loads(path.read_text())
    del data['categories'][3]
    data['annotations'] = [
        box for box in data['annotations'] if box['category_id'] != 4
    ]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match='motorcycle'):
        run(LITE0, folder)


@pytest.mark.slow
def test_release(tmp_path, monkeypatch, capsys):
    """A release beside its card, in one line and as JSON."""
    photo = tmp_path / 'photo.jpg'
    shutil.copy(ROOT / 'resources' / 'forest.jpg', photo)
    data = tmp_path / 'boxes.json'
    data.write_text(
        json.dumps(
            dict(
                images=[
                    dict(id=1, file_name='photo.jpg', width=450, height=400)
                ],
                categories=[dict(id=1, name='Tree')],
                annotations=[
                    dict(
                        id=1,
                        image_id=1,
                        category_id=1,
                        bbox=[0, 0, 9, 9],
                        area=81,
                        iscrowd=0)
                ])))
    monkeypatch.setattr('sys.argv', [
        'evaluate', str(ROOT / 'zoo' / 'trees'), '--data', str(data),
        '--images', str(tmp_path), '--out', str(tmp_path / 'x.json')
    ])  # yapf: disable
    evaluate.main()
    assert 'published 13.99, difference -13.' in capsys.readouterr().out
    found = json.loads((tmp_path / 'x.json').read_text())
    assert found['classes'][0][:2] == ['Tree', 1] and found['images'] == 1


@pytest.mark.parametrize('arguments, word', [
    ([LITE0, 'nosuch'], 'nosuch'),
    (['effdet://tf_efficientdet_lite00', 'nosuch'], 'tf_efficientdet_lite0'),
    (['treess', 'nosuch'], "'trees'"),
    (['my.pth', 'nosuch'], '--config'),
], ids=['data', 'name', 'release', 'checkpoint'])  # yapf: disable
def test_mistakes(arguments, word):
    with pytest.raises(ValueError, match=word):
        run(*arguments)
