"""How mmdet and mmengine find the package's classes."""
import re
import subprocess
import sys
from configparser import ConfigParser

import doctor
import pytest
import torch
from helpers.models import batch
from helpers.tiny_data import D0, LITE0, TOOLS, run_tool
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import DefaultScope

import mmdet_efficientdet

RETINANET = TOOLS.parent / 'configs' / 'retinanet'
# The public classes, by the registry of mmdet that they belong to.
CLASSES = dict(
    MODELS=[
        'BiFPN', 'EfficientDet', 'EfficientDetHead', 'EfficientNet',
        'FocalLoss', 'ForeachEMA', 'RectDataPreprocessor'
    ],
    TASK_UTILS=['AnchorBoxCoder', 'AnchorGenerator'],
    HOOKS=[
        'BatchScaleHook', 'ClassTransferHook', 'PreflightHook',
        'SafeCheckpointHook', 'SeedHook'
    ],
    DATA_SAMPLERS=['SeededSampler'],
    LOOPS=['SeededIterBasedTrainLoop'],
    OPTIM_WRAPPER_CONSTRUCTORS=['GroupedOptimWrapperConstructor'],
    OPTIM_WRAPPERS=['LocalClipOptimWrapper'],
    PARAM_SCHEDULERS=['WarmupCosineLR'],
    RUNNERS=['DetRunner'],
    TRANSFORMS=['ResizeCrop', 'SeedTransforms'])


@pytest.fixture
def run(tmp_path):
    """Runs a source text where mmdet is known and the package is not."""

    def run_source(source, **values):
        lines = [f'{key} = {value!r}' for key, value in values.items()]
        head = ("import sys\nassert 'mmdet' in sys.modules\n"
                "assert 'mmdet_efficientdet' not in sys.modules\n")
        done = run_tool(
            'source', cwd=tmp_path, source='\n'.join([head, *lines, source]))
        assert done.code == 0, done.output
        return done.output

    return run_source


@pytest.mark.slow
def test_import_is_light():
    """The package alone imports neither torch nor mmdet; names come later."""
    source = '''
import sys
import mmdet_efficientdet as package
assert not {'torch', 'mmcv', 'mmdet'} & set(sys.modules)
assert set(package.__all__) <= set(dir(package))
for name in package.__all__:
    value = getattr(package, name)
    assert getattr(value, '__name__', name) == name
try:
    package.BiFPNN
except AttributeError as error:
    assert "'mmdet_efficientdet' has no attribute 'BiFPNN'" in str(error)
else:
    raise AssertionError
'''
    done = subprocess.run([sys.executable, '-c', source],
                          cwd=D0.parents[2],
                          capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr


def test_public_names():
    """What users may import from the package itself."""
    expected = [name for names in CLASSES.values() for name in names]
    assert sorted(mmdet_efficientdet.__all__) == sorted(expected + [
        '__version__', 'SCALING', 'CompoundScaling', 'DetInferencer',
        'Detections', 'Detector', 'PlainNetwork', 'load_detector',
        'load_plain', 'plain_network', 'save_plain', 'scale_config'
    ])


@pytest.mark.slow
def test_prefix_is_enough(run):
    """mmdet finds a class by its prefix, with no custom_imports."""
    run('''
import mmdet.registry
from mmengine.registry import init_default_scope
init_default_scope('mmdet')
for registry, names in CLASSES.items():
    for name in names:
        found = getattr(mmdet.registry, registry).get(
            f'mmdet_efficientdet.{name}')
        assert found.__name__ == name, name
        assert found.__module__.startswith('mmdet_efficientdet.')
''', CLASSES=CLASSES)  # yapf: disable


@pytest.mark.slow
def test_whole_config_from_both_scopes(run):
    """A config builds by prefixes in mmdet's scope, and without in ours."""
    run('''
import re
from mmengine.config import Config
from mmengine.registry import HOOKS, TRANSFORMS, MODELS, init_default_scope
text = Config.fromfile(FILE).pretty_text
bare = re.sub(r"mmdet_efficientdet\\.", '', text)
assert bare.count('type=') == text.count('type=') and bare != text
# Ours first: what it needs, the other has not imported yet.
for text, scope in ((bare, 'mmdet_efficientdet'), (text, 'mmdet')):
    config = Config.fromstring(text, '.py')
    assert config.default_scope == 'mmdet'
    init_default_scope(scope)
    model = MODELS.build(config.model)
    for module in (model, model.backbone, model.neck, model.bbox_head,
                   model.bbox_head.prior_generator,
                   model.bbox_head.bbox_coder, model.bbox_head.loss_cls):
        assert type(module).__module__.startswith('mmdet_efficientdet.')
    for module in (model.data_preprocessor, model.bbox_head.loss_bbox):
        assert type(module).__module__.startswith('mmdet.')
    for pipeline in (config.train_pipeline, config.test_pipeline):
        for transform in pipeline:
            built = TRANSFORMS.build(transform)
            # mmcv has a LoadAnnotations, too
            expected = {'ResizeCrop': 'mmdet_efficientdet',
                        'SeedTransforms': 'mmdet_efficientdet',
                        'LoadImageFromFile': 'mmcv'}
            name = type(built).__name__
            assert type(built).__module__.split('.')[0] == expected.get(
                name, 'mmdet'), name
    for name in ('batch_scale', 'class_transfer', 'checkpoint', 'preflight',
                 'sampler_seed'):
        hook = HOOKS.build(config.default_hooks[name])
        assert type(hook).__module__.startswith('mmdet_efficientdet.')
''', FILE=str(LITE0))  # yapf: disable


@pytest.mark.slow
def test_registries_of_mmdet_stay_as_they_are(run):
    """Loading every class of ours adds nothing to mmdet's own scope."""
    run('''
import mmdet.registry
import mmengine.registry
from mmdet.utils import register_all_modules
from mmengine.registry import Registry
register_all_modules()

def snapshot():
    return {(module.__name__, name): dict(registry.module_dict)
            for module in (mmdet.registry, mmengine.registry)
            for name, registry in vars(module).items()
            if isinstance(registry, Registry)}

before = snapshot()
assert before
import mmdet_efficientdet
import mmdet_efficientdet.registry as ours
for name in mmdet_efficientdet.__all__:
    getattr(mmdet_efficientdet, name)
assert snapshot() == before

# Every registry of mmdet has a child, which holds our classes and no other.
held = {}
for name, registry in vars(mmdet.registry).items():
    if isinstance(registry, Registry) and registry.scope == 'mmdet':
        child = getattr(ours, name)
        assert child.parent is registry and child.name == registry.name
        assert child.scope == 'mmdet_efficientdet'
        if child.module_dict:
            held[name] = sorted({value.__name__
                                 for value in child.module_dict.values()})
assert held == CLASSES, held
''', CLASSES=CLASSES)  # yapf: disable


@pytest.mark.slow
def test_project_of_mmdet_beside_ours(run):
    """Those who registered mmdet's EfficientDet project can use both."""
    run('''
from mmdet.registry import MODELS
from mmdet.models.backbones import EfficientNet
from mmengine.registry import init_default_scope
from torch import nn
init_default_scope('mmdet')
names = ('BiFPN', 'EfficientDet', 'EfficientDetSepBNHead', 'HuberLoss',
         'Conv2dSamePadding')
theirs = {name: type(name, (nn.Module, ), {}) for name in names}
for early in names[:3]:
    MODELS.register_module(module=theirs[early])
import mmdet_efficientdet.models as ours
import mmdet_efficientdet.datasets.transforms
for late in names[3:]:
    MODELS.register_module(module=theirs[late])
for name in names:
    assert MODELS.get(name) is theirs[name]
for name in ('BiFPN', 'EfficientDet', 'EfficientNet'):
    assert MODELS.get(f'mmdet_efficientdet.{name}') is getattr(ours, name)
assert MODELS.get('EfficientNet') is EfficientNet
assert EfficientNet.__module__ == 'mmdet.models.backbones.efficientnet'
built = MODELS.build(dict(type='EfficientNet', arch='b0'))
assert type(built) is EfficientNet
assert type(MODELS.build(dict(type='BiFPN'))) is theirs['BiFPN']
''')  # yapf: disable


def retinanet(**model):
    """A shipped RetinaNet of mmdet, on a ResNet-18, with parts replaced."""
    config = Config.fromfile(RETINANET / 'retinanet_r50_fpn_1x_coco.py')
    config.model.backbone.update(depth=18, init_cfg=None)
    config.model.neck.in_channels = [64, 128, 256, 512]
    config.merge_from_dict(dict(model=model))
    return MODELS.build(config.model).eval()


@pytest.mark.parametrize('part', ['neck', 'backbone'])
def test_part_in_a_stock_detector(part):
    """Neck and backbone work in a detector of mmdet, alone."""
    if part == 'neck':
        model = retinanet(
            neck=dict(
                _delete_=True,
                type='mmdet_efficientdet.BiFPN',
                in_channels=[64, 128, 256, 512],
                start_level=1,
                out_channels=32,
                num_outs=5,
                stack_times=1),
            bbox_head=dict(in_channels=32, feat_channels=32))
    else:
        model = retinanet(
            backbone=dict(
                _delete_=True,
                type='mmdet_efficientdet.EfficientNet',
                arch='lite0'),
            neck=dict(
                in_channels=[40, 112, 320], start_level=0, out_channels=32),
            bbox_head=dict(in_channels=32, feat_channels=32))
    assert type(model).__module__.startswith('mmdet.models')
    model.init_weights()
    data = model.data_preprocessor(batch((128, 96), (96, 128)), training=True)
    assert [x.shape[-2:]
            for x in model.extract_feat(data['inputs'])] == [(16, 16), (8, 8),
                                                             (4, 4), (2, 2),
                                                             (1, 1)]
    losses = model(**data, mode='loss')
    assert set(losses) == {'loss_cls', 'loss_bbox'}
    sum(sum(loss) for loss in losses.values()).backward()
    for key, parameter in getattr(model, part).named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    with torch.no_grad():
        results = model(**data, mode='predict')
    assert len(results) == 2
    for result in results:
        assert result.pred_instances.bboxes.shape[1] == 4


def test_register_all_modules():
    """What mmengine calls makes the package the scope, or leaves the scope."""
    from mmdet_efficientdet.utils import register_all_modules as register
    try:
        register()
        scope = DefaultScope.get_current_instance().scope_name
        assert scope == 'mmdet_efficientdet'
        neck = dict(type='BiFPN', in_channels=[8], out_channels=8, num_outs=2)
        assert isinstance(MODELS.build(neck), mmdet_efficientdet.BiFPN)
        neck = dict(type='FPN', in_channels=[8], out_channels=8, num_outs=2)
        assert type(MODELS.build(neck)).__module__ == 'mmdet.models.necks.fpn'

        register_all_modules()
        register(init_default_scope=False)
        assert DefaultScope.get_current_instance().scope_name == 'mmdet'
    finally:
        register_all_modules()


def test_base_by_name_of_the_package():
    """A config may have a base of the package, wherever that is installed."""
    config = Config.fromstring(
        f"_base_ = 'mmdet_efficientdet::efficientdet/{D0.name}'", '.py')
    assert config.model.backbone.arch == 'b0'
    assert config.image_size == 512


def test_base_where_the_package_is_unknown(run):
    """The line of the docs, for scripts that import the package later."""
    page = (D0.parents[2] / 'docs' / 'training.md').read_text()
    line, = re.findall(r'^_base_ = __import__.*\n.*', page, re.M)
    run('''
from mmengine.config import Config
try:
    Config.fromstring(line.replace('__import__', 'str'), '.py')
except AssertionError as error:
    assert 'does not support to load mmdet_efficientdet' in str(error)
else:
    raise ValueError('the line could be shorter')
assert Config.fromstring(line, '.py').image_size == 512
''',
        line=line)


def test_versions_are_the_same_everywhere():
    """Files that import nothing of each other agree about versions.

    They are setup.cfg, requirements.txt and doctor.py.
    """
    root = D0.parents[2]
    setup = ConfigParser()
    setup.read(root / 'setup.cfg')
    classifiers = re.findall(r'Python :: (3\.\d+)',
                             setup['metadata']['classifiers'])
    assert classifiers == list(doctor.PYTHONS)
    assert setup['options']['python_requires'] == f'>={doctor.PYTHONS[0]}'
    pins = dict(
        re.findall(r'^(?:# )?([\w-]+)==([\d.]+)',
                   (root / 'requirements.txt').read_text(), re.MULTILINE))
    pins['cv2'] = pins['opencv-python-headless'].rpartition('.')[0]
    for name, versions in doctor.TESTED.items():
        assert versions[0] == pins[name], name
