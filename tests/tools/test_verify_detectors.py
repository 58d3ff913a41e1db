"""tools/proof/verify_detectors.py: what passes, fails and is kept."""
import json
from types import SimpleNamespace

import pytest
import small_configs
import verify_detectors
from torch import nn

CONFIG = verify_detectors.CONFIGS / 'retinanet_r50_bifpn_1x_coco.py'


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Verifies a config with parts that only say what ``job`` tells them."""
    data = tmp_path / 'data'
    data.mkdir()
    for name in ('train.json', 'test.json'):
        (data / name).write_text(json.dumps(dict(annotations=[])))
    job = SimpleNamespace(losses=(2.0, 1.0), onnx=1e-6, trained=0)

    def train(config, steps):
        job.trained += 1
        if isinstance(job.losses, Exception):
            raise job.losses
        folder = config.parent / 'train'
        folder.mkdir(exist_ok=True)
        (folder / f'iter_{10 + steps}.pth').touch()
        return job.losses

    def verify(steps=20):
        return verify_detectors.verify(CONFIG, tmp_path / 'out' / CONFIG.stem,
                                       128, steps)

    job.verify = verify
    monkeypatch.setattr(small_configs, 'DATA', data)
    monkeypatch.setattr(verify_detectors, 'train', train)
    monkeypatch.setattr(verify_detectors, 'test', lambda *args: 0.25)
    monkeypatch.setattr(verify_detectors, 'infer', lambda inferencer: 7)
    monkeypatch.setattr(verify_detectors, 'export', lambda model: job.onnx)
    monkeypatch.setattr(verify_detectors, 'DetInferencer',
                        lambda *args, **kwargs: SimpleNamespace(model=None))
    monkeypatch.setattr(verify_detectors.MODELS, 'build',
                        lambda cfg: nn.Linear(2, 2))
    return job


def test_row_of_a_sound_detector(job):
    row = job.verify()
    del row['seconds']
    lines = len(CONFIG.read_text().splitlines())
    assert row == dict(
        config=CONFIG.stem,
        lines=lines,
        parameters=6,
        first=2.0,
        last=1.0,
        ap50=0.25,
        boxes=7,
        onnx=1e-6,
        error='')
    text = verify_detectors.report([dict(row, seconds=3)])
    cells = text.splitlines()[-1].replace(' ', '')
    assert f'|{lines}|0.0M|2.000|1.000|0.250|7|1e-06|3s|' in cells


@pytest.mark.slow
def test_keeps_what_is_done_by_the_same_recipe(job):
    first = job.verify()
    assert job.verify() == first and job.trained == 1
    job.verify(steps=25)
    assert job.trained == 2


@pytest.mark.parametrize('losses, onnx, words', [
    ((1.0, 1.0), 1e-6, 'the losses did not fall'),
    ((1.0, float('nan')), 1e-6, 'the losses did not fall'),
    ((float('inf'), 1.0), 1e-6, 'the losses did not fall'),
    ((2.0, 1.0), 1e-3, 'ONNX differs by 1.0e-03'),
    ((2.0, 1.0), float('nan'), 'ONNX differs'),
    (RuntimeError('train.py: no'), 1e-6, 'RuntimeError: train.py: no'),
])
def test_names_what_is_wrong_and_tries_again(job, losses, onnx, words):
    job.losses, job.onnx = losses, onnx
    row = job.verify()
    assert words in row['error']
    text = verify_detectors.report([row])
    assert f'{CONFIG.stem}: {row["error"]}' in text
    assert ('| failed ' in text) == isinstance(losses, Exception)
    job.losses, job.onnx = (2.0, 1.0), 1e-6
    assert not job.verify()['error'] and job.trained == 2


@pytest.mark.slow
def test_a_failing_script(tmp_path):
    with pytest.raises(RuntimeError, match='train.py: .*unrecognized arg'):
        verify_detectors.run('train.py', tmp_path / 'log', 'config.py',
                             '--nonsense')


def test_everything_is_trained():
    pretrained = dict(type='Pretrained', checkpoint='weights.pth')
    model = dict(
        backbone=dict(
            init_cfg=pretrained,
            frozen_stages=1,
            norm_cfg=dict(type='BN', requires_grad=False),
            norm_eval=True),
        neck=dict(init_cfg=dict(type='Xavier')),
        heads=[dict(num_classes=80),
               dict(num_classes=80)])
    small_configs.to_random_weights(model)
    assert model == dict(
        backbone=dict(
            init_cfg=None,
            frozen_stages=-1,
            norm_cfg=dict(type='BN', requires_grad=True),
            norm_eval=False),
        neck=dict(init_cfg=dict(type='Xavier')),
        heads=[dict(num_classes=1), dict(num_classes=1)])
