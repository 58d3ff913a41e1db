"""A release as a checkpoint by name, for MMDetection's tools."""
import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from mmdet.apis import DetInferencer
from mmengine.runner.checkpoint import CheckpointLoader

from mmdet_efficientdet.deploy.releases import SUMS

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
    data['meta']['cfg'] = 'raise SystemExit("executed")'
    torch.save(data, checkpoint)
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    lines = (folder / SUMS).read_text().splitlines()
    lines = [
        f'{digest}  {checkpoint.name}' if checkpoint.name in line else line
        for line in lines
    ]
    (folder / SUMS).write_text('\n'.join(lines))
    cfg = load(f'release://{folder}')['meta']['cfg']
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
