"""The numbers of the family, and the function that applies them."""
import copy
import os
import subprocess
import sys
from functools import lru_cache

import pytest
import torch
from helpers.models import sizes_in
from helpers.tiny_data import CONFIGS, D0, LITE0
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from oracles.official_sizes import TABLE, TIMM
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmdet_efficientdet.scaling import BACKBONES, SCALING, scale_config

# Parameters with 90 and with 80 classes, tensors in the state dict, fusion
# weights, batch norms, and the official multiply-adds with 90 classes, which
# are not known for D7x.
COUNTS = {
    'd0': (3880067, 3874217, 676, 57, 108, 2550618821),
    'd1': (6625898, 6617888, 868, 76, 136, 6133752112),
    'd2': (8097039, 8086869, 932, 95, 144, 11045799933),
    'd3': (12032296, 12017806, 1099, 114, 171, 24982737931),
    'd4': (20723675, 20703425, 1277, 133, 197, 55346593717),
    'd5': (33653315, 33627305, 1405, 133, 217, 135729505573),
    'd6': (51871782, 51837132, 1565, 0, 253, 226033623795),
    'd7': (51871782, 51837132, 1565, 0, 253, 325473789367),
    'd7x': (77147166, 77112516, 1902, 0, 308, None),
    'lite0': (3243470, 3237620, 588, 0, 108, 977617221),
    'lite1': (4248318, 4240308, 719, 0, 131, 1973728714),
    'lite2': (5252334, 5242164, 775, 0, 139, 3383232590),
    'lite3': (8350862, 8336372, 922, 0, 166, 7503764515),
    'lite3x': (9280862, 9262772, 922, 0, 166, 14019809178),
    'lite4': (15130894, 15110644, 1068, 0, 192, 20221443966),
}


@lru_cache
def d0_config():
    return Config.fromfile(D0).to_dict()


def scaled(name, **kwargs):
    """D0's config, turned into another size."""
    base = copy.deepcopy(d0_config())
    scale_config(base, name, **kwargs)
    return base


def meta_model(name, num_classes):
    init_default_scope('mmdet')
    config = scaled(name)['model']
    config['bbox_head']['num_classes'] = num_classes
    with torch.device('meta'):
        return MODELS.build(config)


@lru_cache
def meta_model_90(name):
    return meta_model(name, 90)


def test_sizes_are_the_official_ones():
    assert list(SCALING) == list(TABLE) == list(COUNTS)


@pytest.mark.parametrize('name', TABLE)
def test_row_is_official(name):
    """Every column of the table is that of the official code."""
    row = SCALING[name]
    channels, checkpoint = BACKBONES[row.backbone]
    assert (row.backbone, channels, row.image_size, row.bifpn_channels,
            row.bifpn_layers, row.head_layers, row.anchor_scale, row.max_level,
            row.fusion, row.activation, row.epochs, checkpoint,
            (row.mean, row.std)) == TABLE[name]
    assert row.num_levels == (6 if name == 'd7x' else 5)


@pytest.mark.parametrize('name', TABLE)
def test_config_follows_table(name):
    """scale_config writes each number where a module reads it."""
    (arch, channels, side, width, layers, depth, anchor_scale, level, fusion,
     act, epochs, checkpoint, (mean, std)) = TABLE[name]
    config = scaled(name)
    model = config['model']
    head = model['bbox_head']
    assert model['data_preprocessor'] == dict(
        type='DetDataPreprocessor',
        mean=list(mean),
        std=list(std),
        bgr_to_rgb=True,
        pad_size_divisor=side)
    assert model['backbone']['arch'] == arch
    assert model['backbone']['init_cfg']['checkpoint'] == checkpoint
    neck = {
        key: model['neck'][key]
        for key in ('in_channels', 'out_channels', 'num_outs', 'stack_times',
                    'fusion')
    }
    assert neck == dict(
        in_channels=list(channels),
        out_channels=width,
        num_outs=level - 2,
        stack_times=layers,
        fusion=fusion)
    assert (head['in_channels'], head['stacked_convs'],
            head['num_levels']) == (width, depth, level - 2)
    assert head['anchor_generator']['octave_base_scale'] == anchor_scale
    for part in ('backbone', 'neck', 'bbox_head'):
        assert model[part]['act_cfg'] == dict(type=act)
    assert config['train_cfg']['max_epochs'] == epochs


@pytest.mark.parametrize('name', COUNTS)
def test_counts_with_90_classes(name):
    """Parameters, tensors, fusion weights and norms are the official ones."""
    model = meta_model_90(name)
    tensors = [
        key for key in model.state_dict()
        if not key.endswith('num_batches_tracked')
    ]
    weights = [
        parameter.numel() for key, parameter in model.named_parameters()
        if key.endswith('fusion_weights')
    ]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    total = sum(parameter.numel() for parameter in model.parameters())
    assert (total, len(tensors), sum(weights),
            len(norms)) == (COUNTS[name][0], *COUNTS[name][2:5])
    # One weight for each input of each node.
    assert set(weights) <= {2, 3}


@pytest.mark.parametrize('name', [n for n in COUNTS if COUNTS[n][5]])
def test_multiply_adds(name):
    """Convolutions and swishes make up 99 % of the official multiply-adds.

    The official counter adds element-wise operations, of which a swish, one
    for every element, is the largest; ReLU6 is not counted.
    """
    model = meta_model_90(name).eval()
    swishes = []
    handles = [
        module.register_forward_hook(
            lambda module, args, output: swishes.append(output.numel()))
        for module in model.modules() if isinstance(module, nn.SiLU)
    ]
    side = TABLE[name][2]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, side, side, device='meta'))
    for handle in handles:
        handle.remove()
    ours = counter.get_total_flops() // 2 + sum(swishes)
    assert 0.99 <= ours / COUNTS[name][5] <= 1


@pytest.mark.parametrize('name', COUNTS)
def test_parameters_with_80_classes(name):
    model = meta_model(name, 80)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name][1]


def test_d0_is_a_fixed_point():
    """The literals of D0's config are its row of the table."""
    assert scaled('d0') == d0_config()


@pytest.mark.parametrize('name', TABLE)
def test_path_does_not_matter(name):
    """A size is the same from whichever size it is made."""
    direct = scaled(name)
    for other in TABLE:
        config = scaled(other)
        scale_config(config, name)
        assert config == direct, other


def test_config_file_is_scaled_d0():
    """A config that mmengine loads for a size can be scaled, too."""
    config = Config.fromfile(LITE0)
    scale_config(config, 'd0')
    assert config.to_dict() == d0_config()


def test_missing_parts_stay_missing():
    """No weights and no schedule are invented where the base has none."""
    base = copy.deepcopy(d0_config())
    base['model']['backbone']['init_cfg'] = None
    for key in ('train_cfg', 'param_scheduler', 'train_dataloader',
                'val_dataloader', 'test_dataloader', 'image_size'):
        del base[key]
    keys = set(base)
    scale_config(base, 'd3', classes=['tree'])
    assert base['model']['backbone']['init_cfg'] is None
    assert set(base) == keys


def test_own_weights_and_schedule_stay():
    """What a user has set is no part of the table."""
    base = copy.deepcopy(d0_config())
    base['model']['backbone']['init_cfg']['checkpoint'] = 'mine.pth'
    base['train_cfg']['max_epochs'] = 12
    schedule = copy.deepcopy(base['param_scheduler'])
    scale_config(base, 'd7')
    assert base['model']['backbone']['init_cfg']['checkpoint'] == 'mine.pth'
    assert base['train_cfg']['max_epochs'] == 12
    assert base['param_scheduler'] == schedule
    base['load_from'] = 'mine.pth'
    base['model']['data_preprocessor'].update(mean=[127.5] * 3, std=[1.] * 3)
    scale_config(base, 'lite1')
    assert base['load_from'] == 'mine.pth'
    assert base['model']['data_preprocessor']['mean'] == [127.5] * 3
    assert base['model']['data_preprocessor']['std'] == [1.] * 3


def test_no_mean_in_the_preprocessor():
    """Images that are prepared elsewhere have none, and none is invented."""
    base = copy.deepcopy(d0_config())
    del base['model']['data_preprocessor']['mean']
    scale_config(base, 'lite0')
    assert 'mean' not in base['model']['data_preprocessor']


def test_published_detector_follows_the_size():
    """Fine-tuning of another size starts from that size's file."""
    base = copy.deepcopy(d0_config())
    base['load_from'] = 'effdet://tf_efficientdet_d0'
    scale_config(base, 'd3')
    assert base['load_from'] == 'effdet://tf_efficientdet_d3'


@pytest.mark.parametrize('name', ['d0', 'd1', 'd7x', 'lite3'])
@pytest.mark.parametrize('recipe', [
    '1xb8-gn-300e',
    '1xb8-finetune-50e',
    '1xb8-adamw-1k',
    '8xb16-advprop-300e',
])
def test_recipes_in_another_size(recipe, name):
    """Each recipe takes its weights along, and stays what it is."""
    config = Config.fromfile(CONFIGS / f'efficientdet_d0_{recipe}_coco.py')
    recipes_own = copy.deepcopy({
        key: config[key]
        for key in ('optim_wrapper', 'auto_scale_lr', 'param_scheduler')
    })
    scale_config(config, name, classes=['tree'])
    arch = dict(d0='b0', d1='b1', d7x='b7', lite3='lite3')[name]
    init_cfg = config.model.backbone.init_cfg
    if 'finetune' in recipe:
        assert config.load_from == f'effdet://tf_efficientdet_{name}'
        assert init_cfg is None and config.train_cfg.max_epochs == 50
    else:
        kind = ('in1k' if name == 'lite3' else
                'ap_in1k' if 'advprop' in recipe else 'aa_in1k')
        assert init_cfg.checkpoint == f'{TIMM}{arch}.{kind}'
        assert config.load_from is None
        assert config.train_cfg.to_dict().get(
            'max_epochs',
            0) == (0 if 'adamw' in recipe else 600 if name == 'd7x' else 300)
    mean = config.model.data_preprocessor.mean[0]
    assert mean == (127.5 if 'advprop' in recipe else
                    127 if name == 'lite3' else 123.675)
    assert {key: config[key] for key in recipes_own} == recipes_own
    config.model.backbone.init_cfg = None
    init_default_scope('mmdet')
    with torch.device('meta'):
        model = MODELS.build(config.model)
    assert model.backbone.arch == arch
    norms = {type(m)
             for m in model.neck.modules()
             } & {torch.nn.BatchNorm2d, torch.nn.GroupNorm}
    assert norms == {
        torch.nn.GroupNorm if 'gn' in recipe else torch.nn.BatchNorm2d
    }


@pytest.mark.parametrize('given, sides', [
    (None, 896),
    (640, 640),
    (64, 64),
    ((384, 640), (384, 640)),
    ([256, 256], (256, 256)),
    ((540, 960), (540, 960)),
    ((416, 736), (416, 736)),
    ((513, 64), (513, 64)),
])
def test_image_size(given, sides):
    """The size stands in every pipeline, and batches are padded to it."""
    config = scaled('d3', image_size=given)
    preprocessor = config['model']['data_preprocessor']
    assert preprocessor['pad_size_divisor'] == sides
    assert preprocessor['type'] == ('mmdet_efficientdet.RectDataPreprocessor'
                                    if isinstance(sides, tuple) else
                                    'DetDataPreprocessor')
    assert config['image_size'] == sides
    # train_pipeline, test_pipeline and the three loaders
    assert sizes_in(config) == [sides] * 5
    # Only the image changes, nothing of the network.
    config['model']['data_preprocessor'] = None
    default = scaled('d3')
    default['model']['data_preprocessor'] = None
    assert config['model'] == default['model']


@pytest.mark.parametrize('given', [
    0, 63, -512, 512.0, '512', '51', (512, ), (512, 32), (512, 512, 3),
    (512, 512.0), (512, 63), ()
])
def test_bad_image_size(given):
    """The message names the value, what is allowed, and how to write it."""
    with pytest.raises(ValueError) as error:
        scaled('d3', image_size=given)
    message = str(error.value)
    assert f'image_size={given!r}' in message
    assert 'at least 64 pixels' in message
    assert '(height, width)' in message


WRAPPERS = dict(
    plain=lambda d: d,
    repeat=lambda d: dict(type='RepeatDataset', times=2, dataset=d),
    balanced=lambda d: dict(
        type='ClassBalancedDataset', oversample_thr=0.1, dataset=d),
    concat=lambda d: dict(
        type='ConcatDataset', datasets=[d, copy.deepcopy(d)]),
    nested=lambda d: dict(
        type='RepeatDataset',
        times=2,
        dataset=dict(type='ConcatDataset', datasets=[d, copy.deepcopy(d)])),
    # The mixing transforms stand in the wrapper, as in mmdet's configs.
    mixed=lambda d: dict(
        type='MultiImageMixDataset', dataset=d,
        pipeline=[dict(type='Mosaic')]))  # yapf: disable


def datasets_in(node):
    """The datasets inside wrappers, found by their annotation file."""
    if isinstance(node, list):
        return [d for item in node for d in datasets_in(item)]
    if 'ann_file' in node:
        return [node]
    return datasets_in(node.get('datasets') or node['dataset'])


@pytest.mark.parametrize('wrapper', WRAPPERS)
@pytest.mark.parametrize('loader', ['train', 'val', 'test'])
def test_classes(loader, wrapper):
    """Head and every dataset, also inside wrappers, get the same names."""
    base = copy.deepcopy(d0_config())
    part = base[f'{loader}_dataloader']
    part['dataset'] = WRAPPERS[wrapper](part['dataset'])
    scale_config(base, 'd1', classes=['cat', 'tree'])
    assert base['model']['bbox_head']['num_classes'] == 2
    for other in ('train', 'val', 'test'):
        dataset = base[f'{other}_dataloader']['dataset']
        found = datasets_in(dataset)
        doubled = other == loader and wrapper in ('concat', 'nested')
        assert len(found) == (2 if doubled else 1)
        for item in found:
            assert item['metainfo'] == dict(classes=('cat', 'tree'))
        if found[0] is not dataset:
            assert 'metainfo' not in dataset  # wrappers take none


def test_classes_are_kept():
    """Without ``classes``, those of the base stay."""
    base = scaled('d0', classes=['tree'])
    scale_config(base, 'd2')
    assert base['model']['bbox_head']['num_classes'] == 1
    assert base['val_dataloader']['dataset']['metainfo'] == dict(
        classes=('tree', ))


@pytest.mark.parametrize(
    'given', ['tree', '', [], (), ['a', 'b', 'a'], 3, [1, 2], {'tree'}])
def test_bad_classes(given):
    """The message names the value, what is allowed, and an example."""
    with pytest.raises(ValueError) as error:
        scaled('d0', classes=given)
    message = str(error.value)
    assert f'classes={given!r}' in message
    assert 'list of different names' in message
    assert "['tree']" in message


@pytest.mark.parametrize('root, mode', [('data/VOCdevkit/VOC2007', '11points'),
                                        ('data/pets', 'area')])
def test_voc(root, mode):
    """Data sets and evaluators of VOC take nothing of COCO's."""
    base = scaled('d1', classes=['cat'], voc=root)
    for key, split in (('train', 'train'), ('val', 'val'), ('test', 'val')):
        dataset = base[f'{key}_dataloader']['dataset']
        assert dataset['ann_file'] == f'ImageSets/Main/{split}.txt'
        assert (dataset['type'], dataset['data_root']) == ('VOCDataset', root)
        assert dataset['data_prefix'] == dict(sub_data_root='')
        assert dataset['metainfo'] == dict(classes=('cat', ))
    for key in ('val_evaluator', 'test_evaluator'):
        assert base[key] == dict(type='VOCMetric', eval_mode=mode)


@pytest.mark.parametrize('given', ['d8', 'D3', '', 'efficientdet-d3', 3])
def test_unknown_size(given):
    """The message names the value and every size."""
    with pytest.raises(KeyError) as error:
        scaled(given)
    assert repr(given) in str(error.value)
    for name in TABLE:
        assert repr(name) in str(error.value)


@pytest.mark.parametrize('base', [
    {},
    dict(model=None),
    dict(model=dict(type='RetinaNet', backbone=dict(type='ResNet'))),
])
def test_base_without_model(base):
    """The message says what is missing and where the call belongs."""
    with pytest.raises(KeyError) as error:
        scale_config(base, 'd3')
    message = str(error.value)
    assert 'neck' in message
    assert 'scale_config(_base_, ...)' in message
    assert 'efficientdet_d0_8xb16-300e_coco.py' in message


def test_error_changes_nothing():
    """A base that was refused is left as it was."""
    base = copy.deepcopy(d0_config())
    for kwargs in (dict(name='d9'), dict(name='d3', image_size=10),
                   dict(name='d3', classes='tree')):
        with pytest.raises((KeyError, ValueError)):
            scale_config(base, **kwargs)
        assert base == d0_config(), kwargs


def test_standard_library_is_enough():
    """The table can be read where nothing else is installed."""
    source = '''
import sys
from mmdet_efficientdet.scaling import SCALING, scale_config
assert SCALING['d7x'].max_level == 8
roots = {name.partition('.')[0] for name in sys.modules}
print(sorted(roots - sys.stdlib_module_names - {'__main__'}))
'''
    env = dict(os.environ, PYTHONPATH=str(D0.parents[2]))
    # -S leaves out site-packages.
    done = subprocess.run([sys.executable, '-S', '-c', source],
                          env=env,
                          capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['mmdet_efficientdet']"
