"""A release as a checkpoint by name, for MMDetection's tools."""
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from mmdet.apis import DetInferencer
from mmengine.config import Config
from mmengine.runner.checkpoint import CheckpointLoader

from mmdet_efficientdet.deploy.releases import SUMS
from mmdet_efficientdet.weights.schemes import config_text

ROOT = Path(__file__).resolve().parents[2]
TREES = ROOT / 'zoo' / 'trees'


@pytest.fixture
def release(tmp_path):
    """A copy of the release, and its checkpoint."""
    folder = shutil.copytree(TREES, tmp_path / 'release')
    checkpoint, = folder.glob('*.pth')
    return folder, checkpoint


def load(name):
    return CheckpointLoader.load_checkpoint(name, 'cpu')


@pytest.mark.slow
def test_inferencer_by_name():
    """Without a config, from any folder."""
    checkpoint, = TREES.glob('*.pth')
    photo = str(ROOT / 'resources' / 'forest.jpg')
    found, expected = (
        DetInferencer(weights=str(weights), device='cpu')(photo)['predictions']
        for weights in ('release://trees', checkpoint))
    assert found == expected and len(found[0]['bboxes']) == 300


def test_text_in_the_checkpoint_is_not_used(release):
    """mmengine executes the cfg, which is made from data instead."""
    folder, checkpoint = release
    data = torch.load(checkpoint, weights_only=True)
    text = 'raise SystemExit("executed")'
    data['meta']['cfg'] = text
    data['message_hub'] = dict(runtime_info=dict(cfg=text))
    torch.save(data, checkpoint)
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    lines = (folder / SUMS).read_text().splitlines()
    lines = [
        f'{digest}  {checkpoint.name}' if checkpoint.name in line else line
        for line in lines
    ]
    (folder / SUMS).write_text('\n'.join(lines))
    loaded = load(f'release://{folder}')
    assert loaded.keys() == {'state_dict', 'meta'}
    cfg = loaded['meta']['cfg']
    assert 'executed' not in cfg and 'mmdet_efficientdet.BiFPN' in cfg


@pytest.mark.parametrize('name', ['checkpoint', 'training_config.json'])
def test_changed(name, release):
    folder, checkpoint = release
    path = checkpoint if name == 'checkpoint' else folder / name
    path.write_bytes(path.read_bytes() + b' ')
    with pytest.raises(ValueError, match=f'{path.name} is missing, damaged'):
        load(f'release://{folder}')


def test_unknown():
    with pytest.raises(ValueError, match="Did you mean 'trees'"):
        load('release://treees')


def breaking(text):
    """Strings, keys and bases that mmengine would execute or fill in."""
    key = f"a': {text}, 'b"
    return [
        dict(model=dict(type='EfficientDet', text=key)),
        {
            key: 1
        },
        dict(model={key: 1}),
        dict(visualizer=dict(name=['{{$HOME:x}}', "{{'$NONE:1'}}"])),
        dict(visualizer=dict(name='{{ fileDirname }} {{_base_.model}}')),
        dict(_base_='/etc/passwd', custom_imports=dict(imports=['this'])),
    ]


@pytest.mark.parametrize('index', range(6))
def test_text_of_a_config(index, tmp_path):
    """Whatever strings are in it, the text has nothing but values."""
    mark = tmp_path / 'executed'
    config = breaking(f'open({str(mark)!r},"w")')[index]
    path = tmp_path / 'training_config.json'
    path.write_text(json.dumps(config))
    found = Config.fromstring(config_text(path), '.py')
    assert not mark.exists()
    kept = {k: v for k, v in config.items() if k in ('model', 'visualizer')}
    assert found.to_dict() == kept


@pytest.mark.parametrize('config', [
    dict(model=dict(type='subprocess.Popen', args=['true'])),
    dict(model=dict(type='EfficientDet', neck=[dict(type='os.system')])),
    dict(model=dict(_scope_='os', type='Popen')),
    dict(default_scope='subprocess'),
    dict(test_dataloader=dict(collate_fn=dict(type='os.system'))),
    dict(test_dataloader=dict(collate_fn='os.system')),
    dict(model=dict(type=['subprocess.Popen'])),
])  # yapf: disable
def test_type_that_is_imported(config, tmp_path):
    path = tmp_path / 'training_config.json'
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match='no class of MMDetection'):
        config_text(path)


def test_no_config(tmp_path):
    path = tmp_path / 'training_config.json'
    for text in ('', '[]', '{"model": NaN}', '{"model": {"a": Infinity}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match='is no config'):
            config_text(path)


def test_file_of_an_init_cfg(tmp_path):
    """It would be downloaded and unpickled."""
    path = tmp_path / 'training_config.json'
    init = dict(type='Pretrained', checkpoint='http://localhost/x.pth')
    path.write_text(
        json.dumps(dict(model=dict(type='EfficientDet', init_cfg=init))))
    assert 'http' not in config_text(path)
