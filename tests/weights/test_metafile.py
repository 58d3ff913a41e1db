"""Models by name: the metafile, and what MMEngine and MMDetection do with it.

Nothing is downloaded: the published file is made here, with random weights.
"""
import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from make_metafile import describe_model, format_metafile
from mmdet.apis import DetInferencer
from mmengine.hub import get_config, get_model
from oracles import effdet_reference

from mmdet_efficientdet.scaling import SCALING
from mmdet_efficientdet.weights import published

ROOT = Path(__file__).parents[2]
SCOPE = 'mmdet_efficientdet'
LITE0 = 'effdet://tf_efficientdet_lite0'
LITE0_NAME = 'efficientdet_lite0_8xb16-300e_coco'
LITE0_CONFIG = f'{SCOPE}::efficientdet/{LITE0_NAME}.py'
# Table 2 of the paper: parameters in millions, multiply-adds in billions. The
# authors' counter also counts swishes and norms, for 90 classes.
PAPER = dict(
    d0=(3.9, 2.5), d1=(6.6, 6.1), d2=(8.1, 11), d3=(12, 25), d4=(21, 55),
    d5=(34, 135), d6=(52, 226), d7=(52, 325), d7x=(77, 410))  # yapf: disable


def models():
    """The metafile's entries by size, found through model-index.yml."""
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    entries = [
        entry for path in index['Import']
        for entry in yaml.safe_load((ROOT / path).read_text())['Models']
    ]
    return {entry['Alias'][0].split('-')[1]: entry for entry in entries}


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """A file like effdet's of Lite0, whose name ends with its checksum."""
    path = tmp_path_factory.mktemp('published') / 'x.pth'
    torch.save(effdet_reference.build('lite0', (64, 64)).state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path.rename(path.with_name(f'lite0-{digest[:8]}.pth'))


@pytest.fixture
def local_weights(weights, monkeypatch):
    """The manifest lists this file alone, and it lies in a local folder."""
    entry = replace(published.manifest()[LITE0], file=weights.name)
    monkeypatch.setattr(published, 'manifest', lambda: {LITE0: entry})
    monkeypatch.setenv(published.VARIABLE, str(weights.parent))
    return weights


def assert_weights(model, weights):
    """The last node of the neck is that of the file."""
    key = 'neck.layers.2.nodes.7.conv.pointwise.weight'
    theirs = effdet_reference.convert(
        torch.load(weights, weights_only=True), 'lite0')
    assert torch.equal(model.state_dict()[key], theirs[key])


# ------------------------------------------------------------- the file ----


@pytest.mark.slow
@pytest.mark.parametrize('size', SCALING)
def test_entry_is_up_to_date(size):
    """If not: python tools/studies/make_metafile.py."""
    assert models()[size] == describe_model(size)


def test_text_is_up_to_date():
    text = (ROOT / 'configs/efficientdet/metafile.yml').read_text()
    assert text == format_metafile(list(models().values()))


def test_all_sizes():
    assert list(models()) == list(SCALING)
    names = [n for m in models().values() for n in (m['Name'], *m['Alias'])]
    assert len({name.lower() for name in names}) == 2 * len(SCALING)


@pytest.mark.parametrize('size', SCALING)
def test_entry(size):
    """Names lead to files of this size that exist and can be used."""
    entry = models()[size]
    assert f'efficientdet_{size}_8xb16-' in entry['Name']
    assert entry['Alias'] == [f'efficientdet-{size}']
    config = ROOT / entry['Config']
    assert config.is_file() and config.stem == entry['Name']
    file = published.find(entry['Weights'])
    assert file.size == size and file.image_size is None
    assert entry['Metadata']['Input Size'] == SCALING[size].image_size
    assert f"-{entry['Metadata']['Epochs']}e_" in entry['Name']
    result, = entry['Results']
    assert result['Metrics'] == {'box AP': file.ap}
    assert 'effdet' in result['Source'] and 'not measured' in result['Source']


@pytest.mark.parametrize('size', PAPER)
def test_counts_of_the_paper(size):
    parameters, multiply_adds = PAPER[size]
    counts = models()[size]['Metadata']
    assert counts['Parameters'] == pytest.approx(1e6 * parameters, rel=0.02)
    assert 0.97 < counts['FLOPs'] / (1e9 * multiply_adds) < 1


# ------------------------------------------------------- its readers -----


def test_list_models():
    names = DetInferencer.list_models(SCOPE)
    assert {f'efficientdet-{size}' for size in SCALING} < set(names)
    assert DetInferencer.list_models(
        SCOPE, 'efficientdet-lite[04]') == [
            'efficientdet-lite0', 'efficientdet-lite4'
        ]  # yapf: disable


@pytest.mark.slow
@pytest.mark.parametrize('name', ['efficientdet-lite0', LITE0_NAME])
def test_inferencer(name, local_weights):
    """Config and weights come from the name alone."""
    inferencer = DetInferencer(name, scope=SCOPE, device='cpu')
    assert_weights(inferencer.model, local_weights)
    assert inferencer.model.backbone.arch == 'lite0'
    assert inferencer.model.dataset_meta['classes'][0] == 'person'
    image = torch.randint(0, 255, (64, 96, 3)).byte().numpy()
    result, = inferencer(image)['predictions']
    assert set(result) == {'labels', 'scores', 'bboxes'}


def test_get_config():
    config = get_config(LITE0_CONFIG, pretrained=True)
    assert config.model_path == LITE0
    assert config.model.backbone.arch == 'lite0'


def test_get_model(local_weights):
    assert_weights(get_model(LITE0_CONFIG, pretrained=True), local_weights)


FAKED = '''
from dataclasses import replace
from mmengine.runner.checkpoint import CheckpointLoader
assert 'effdet://' in CheckpointLoader._schemes
from mmdet_efficientdet.weights import published
entry = replace(published.manifest()[LITE0], file=FILE)
published.manifest = lambda: {LITE0: entry}
'''
ALONE = dict(
    list_models='''
from mmdet.apis import DetInferencer
assert 'efficientdet-d7x' in DetInferencer.list_models(SCOPE)
''',
    inferencer=FAKED + '''
from mmdet.apis import DetInferencer
DetInferencer('efficientdet-lite0', scope=SCOPE, device='cpu')
''',
    get_config='''
from mmengine.hub import get_config
assert get_config(CONFIG).model.backbone.arch == 'lite0'
''',
    get_model=FAKED + '''
from mmengine.hub import get_model
get_model(CONFIG, pretrained=True)
''')


@pytest.mark.slow
@pytest.mark.parametrize('what', ALONE)
def test_import_of_the_package_is_enough(what, weights, tmp_path, monkeypatch):
    """Nobody has to import a module of it, or to set a scope before."""
    monkeypatch.setenv(published.VARIABLE, str(weights.parent))
    values = dict(
        SCOPE=SCOPE, CONFIG=LITE0_CONFIG, LITE0=LITE0, FILE=weights.name)
    source = '\n'.join([
        "import sys; assert 'mmdet_efficientdet' not in sys.modules",
        'import mmdet_efficientdet',
        *[f'{key} = {value!r}' for key, value in values.items()], ALONE[what]
    ])
    # Not run_tool, whose processes have imported MMDetection already.
    done = subprocess.run([sys.executable, '-c', source],
                          cwd=tmp_path,
                          capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
