"""Weights of others become ours: every tensor once, bit for bit."""
import dataclasses
import gzip
import hashlib
import io
import os
import resource
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from helpers.models import shapes_of
from helpers.tensorflow_files import levels_of, tf_shapes, values, write_bundle
from mmdet.apis import DetInferencer
from mmdet.models.task_modules import AnchorGenerator
from mmdet.registry import MODELS, TASK_UTILS
from mmengine.config import Config
from oracles import effdet_reference as reference
from safetensors.torch import save_file

from mmdet_efficientdet.scaling import SCALING, scale_config
from mmdet_efficientdet.utils import config_file
from mmdet_efficientdet.weights import published, sources
from mmdet_efficientdet.weights.convert import (convert_file, save,
                                                select_coco_classes)
from mmdet_efficientdet.weights.layouts import LAYOUTS
from mmdet_efficientdet.weights.matching import match
from mmdet_efficientdet.weights.sources import open_source
from mmdet_efficientdet.weights.tensorflow import masked_crc32c, read_bundle

ROOT = Path(__file__).parents[2]
BIAS = 'class_net.predict.conv_pw.bias'  # of effdet
VARIABLES, OBJECTS, EFFDET, LEVEL_FIRST, ZYLO117, PROJECT, OWN = LAYOUTS
# Of the sorted names in the official checkpoints, joined by line ends, as
# recomputed from the official code: the start of their SHA-256.
OFFICIAL_NAMES = {
    'd0': '75879e0e8552f905',
    'd1': '7817b6f2f5e120ca',
    'd2': '16f3c4b8af0f8713',
    'd3': '7dc48a924e1b12a5',
    'd4': '58207b8e49944ead',
    'd5': 'eeb91e39dada9ccb',
    'd6': '8e954ca27e4b1ad9',
    'd7': '8e954ca27e4b1ad9',
    'd7x': 'f263a1bcf0a91a0d',
    'lite0': '675378222f56a2f0',
    'lite1': '9c0bde8db7f58ea5',
    'lite2': '17c20838141437a0',
    'lite3': '85f56e31da13509a',
    'lite3x': '85f56e31da13509a',
    'lite4': 'adfa66cad09e9609'
}
OFFICIAL_OBJECTS_D0 = '17e0ff8926ac8b90'
# One of each kind, written by hand.
EXAMPLES = [
    (VARIABLES, 'd0', 'backbone.blocks.1.expand_conv.bn.weight',
     'efficientnet-b0/blocks_1/tpu_batch_normalization/gamma'),
    (VARIABLES, 'd0', 'backbone.blocks.1.depthwise_conv.bn.weight',
     'efficientnet-b0/blocks_1/tpu_batch_normalization_1/gamma'),
    (VARIABLES, 'd0', 'backbone.blocks.1.linear_conv.bn.running_var',
     'efficientnet-b0/blocks_1/tpu_batch_normalization_2/moving_variance'),
    (VARIABLES, 'd0', 'backbone.blocks.0.linear_conv.bn.bias',
     'efficientnet-b0/blocks_0/tpu_batch_normalization_1/beta'),
    (VARIABLES, 'd0', 'backbone.blocks.1.expand_conv.conv.weight',
     'efficientnet-b0/blocks_1/conv2d/kernel'),
    (VARIABLES, 'd0', 'backbone.blocks.1.se.conv1.conv.bias',
     'efficientnet-b0/blocks_1/se/conv2d/bias'),
    (VARIABLES, 'd0', 'bbox_head.conv_cls.pointwise.bias',
     'class_net/class-predict/bias'),
    (VARIABLES, 'd0', 'bbox_head.conv_reg.depthwise.weight',
     'box_net/box-predict/depthwise_kernel'),
    (VARIABLES, 'd0', 'bbox_head.reg_convs.2.pointwise.weight',
     'box_net/box-2/pointwise_kernel'),
    (VARIABLES, 'd0', 'bbox_head.cls_norms.1.3.weight',
     'class_net/class-1-bn-6/gamma'),
    (VARIABLES, 'd0', 'neck.layers.0.nodes.3.resamples.0.norm.weight',
     'fpn_cells/cell_0/fnode3/resample_0_0_8/bn/gamma'),
    (ZYLO117, 'd0', 'backbone.blocks.0.depthwise_conv.bn.running_mean',
     'backbone_net.model._blocks.0._bn1.running_mean'),
    (ZYLO117, 'd0', 'neck.layers.0.nodes.4.resamples.0.norm.weight',
     'bifpn.0.p4_down_channel_2.1.weight'),
    (ZYLO117, 'd0', 'neck.layers.2.nodes.3.fusion_weights', 'bifpn.2.p3_w1'),
    (ZYLO117, 'd7x', 'neck.layers.1.nodes.9.conv.pointwise.bias',
     'bifpn.1.conv8_down.pointwise_conv.bias'),
    (ZYLO117, 'd0', 'bbox_head.reg_norms.2.4.bias',
     'regressor.bn_list.4.2.bias'),
    (PROJECT, 'd0', 'backbone.blocks.9.linear_conv.conv.weight',
     'backbone.layers.4.4.linear_conv.conv.weight'),
    (PROJECT, 'd0', 'neck.layers.0.nodes.5.resamples.0.conv.bias',
     'neck.bifpn.0.p5_level_connection.down_conv.bias'),
    (PROJECT, 'd0', 'bbox_head.cls_norms.1.3.weight',
     'bbox_head.cls_bn_list.1.3.weight'),
    (LEVEL_FIRST, 'd0', 'bbox_head.cls_norms.1.3.weight',
     'class_net.bn_rep.3.1.weight'),
    (OBJECTS, 'd0', 'backbone.blocks.0.linear_conv.bn.running_var',
     'backbone/_blocks/0/_bn2/moving_variance/.ATTRIBUTES/VARIABLE_VALUE'),
]  # yapf: disable


def names_of(layout, shapes, name):
    return [n for key in shapes for n in layout.names(key, *levels_of(name))]


@pytest.mark.parametrize('name', OFFICIAL_NAMES)
def test_names_are_the_official_ones(name):
    """The names of all variables, for every size."""

    def digest(layout):
        names = names_of(layout, shapes_of(name), name)
        joined = '\n'.join(sorted(names))
        return hashlib.sha256(joined.encode()).hexdigest()[:16]

    assert digest(VARIABLES) == OFFICIAL_NAMES[name]
    if name == 'd0':
        assert digest(OBJECTS) == OFFICIAL_OBJECTS_D0


@pytest.mark.parametrize('name', ['d0', 'd7x', 'lite0'])
def test_names_are_different(name):
    """No two tensors of ours share a name in any layout."""
    own = shapes_of(name)
    for layout in LAYOUTS:
        names = names_of(layout, own, name)
        assert len(set(names)) == len(names) >= len(own)


@pytest.mark.parametrize('layout, size, ours, theirs', EXAMPLES)
def test_examples_of_names(layout, size, ours, theirs):
    """One tensor of each kind."""
    assert layout.names(ours, *levels_of(size)) == [theirs]


def test_order_of_fusion_weights():
    """The first scalar has no number; inputs keep the official order."""
    node = 'fpn_cells/cell_1/fnode5/'
    assert VARIABLES.names('neck.layers.1.nodes.5.fusion_weights',
                           *levels_of('d0')) == [
                               f'{node}WSM', f'{node}WSM_1', f'{node}WSM_2'
                           ]


def test_one_lost_bias(effdet_file):
    """Redundant biases are absent all together, or one was lost."""
    theirs = torch.load(effdet_file, weights_only=True)
    del theirs['class_net.conv_rep.0.conv_pw.bias']
    with pytest.raises(ValueError, match=r'\+ bbox_head.cls_convs.0.pointw'):
        match(theirs, shapes_of('lite0'), *levels_of('lite0')).state_dict()


def test_read_bundle():
    """A file that TensorFlow 2.15 wrote: types, shapes and values."""
    tensors = read_bundle(ROOT / 'tests' / 'data' / 'tensorflow')
    norm = 'efficientnet-b0/blocks_10/tpu_batch_normalization'
    expected = [
        (f'{norm}/gamma', 'f4', (7, ), [-0.80193144, -1.3243589]),
        (f'{norm}/gamma/ExponentialMovingAverage', 'f4', (7, ),
         [-0.7847804, 0.7487458]),
        (f'{norm}_1/moving_variance', 'f4', (3, 3, 4, 2), [-0.7133134]),
        ('half', 'f2', (5, 2), [-0.517, -1.26]),
        ('brain', 'f4', (4, 3), [0.16015625, -0.38085938]),
        ('long', 'i8', (3, 2), [-365072169885769372, 987162338997014011]),
        ('global_step', 'i8', (), [281100]),
        ('int', 'i4', (9, ), [-666821427, 1540840573]),
        ('flag', '?', (3, 5), [True]),
        ('double', 'f8', (2, 2), [-0.33770479, 0.79322085]),
        ('scalar', 'f4', (), [-1.5]),
        ('empty', 'f4', (0, 3), []),
        ('ubyte', 'u1', (10, ), [200, 201, 202])
    ]  # yapf: disable
    for name, dtype, shape, start in expected:
        array = tensors[name]
        assert array.dtype == dtype and array.shape == shape, name
        np.testing.assert_allclose(
            array.ravel()[:len(start)],
            start,
            rtol=5e-4 if dtype == 'f2' else 1e-6)


def same_axes(array, key):
    if array.ndim == 4:
        axes = [2, 3, 0, 1] if 'depthwise' in key else [3, 2, 0, 1]
        array = array.transpose(axes)
    if key.startswith('bbox_head.conv_reg.pointwise'):
        array = array.reshape(9, 4, *array.shape[1:])[:, [1, 0, 3, 2]].reshape(
            array.shape)
    return torch.from_numpy(np.ascontiguousarray(array))


@pytest.mark.slow
@pytest.mark.parametrize('name, form', [('d0', 'prefix'), ('lite0', 'tgz'),
                                        ('lite0', 'h5'), ('lite0', 'folder'),
                                        ('d0', 'objects')])
def test_convert_tensorflow(tmp_path, name, form):
    """Averages are preferred, optimizer slots ignored, all else equal."""
    own = shapes_of(name)
    layout = OBJECTS if form == 'objects' else VARIABLES
    sizes = tf_shapes(own, name, layout)
    raw = values(sizes, 0)
    means = raw if form == 'h5' else values(sizes, 1)
    if form == 'h5':
        source = tmp_path / 'x.h5'
        with h5py.File(source, 'w') as file:
            layers = sorted({key.split('/')[0] for key in raw})
            file.attrs['layer_names'] = layers
            for layer in layers:
                keys = [k for k in raw if k.split('/')[0] == layer]
                file.create_group(layer)
                # What is longer than 64 kB Keras cuts in parts.
                half = len(keys) // 2
                file[layer].attrs['weight_names0'] = [
                    f'{k}:0' for k in keys[:half]
                ]
                file[layer].attrs['weight_names1'] = [
                    f'{k}:0' for k in keys[half:]
                ]
                for key in keys:
                    file[layer][f'{key}:0'] = raw[key]
    else:
        step, mean, slot = ('global_step', '{}/ExponentialMovingAverage',
                            '{}/Momentum')
        if form == 'objects':
            end = '/.ATTRIBUTES/VARIABLE_VALUE'
            step, mean, slot = (f'save_counter{end}',
                                '{}/.OPTIMIZER_SLOT/optimizer/average' + end,
                                '{}/.OPTIMIZER_SLOT/optimizer/momentum' + end)
        tensors = {**raw, step: np.int64(7)}
        for key in raw:
            variable = key.removesuffix('/.ATTRIBUTES/VARIABLE_VALUE')
            tensors[mean.format(variable)] = means[key]
            if 'moving_' not in key:
                tensors[slot.format(variable)] = np.zeros(1, 'f4')
        folder = tmp_path / f'efficientdet-{name}'
        folder.mkdir()
        write_bundle(folder / 'model', tensors)
        source = folder / 'model' if form == 'prefix' else folder
        if form == 'tgz':
            source = tmp_path / 'x.tgz'
            with tarfile.open(source, 'w:gz', compresslevel=1) as archive:
                archive.add(folder, folder.name)
    checkpoint = convert_file(source, config_of(name), num_classes=90)
    if form != 'h5':
        receipt = '\n'.join(checkpoint['meta']['source']['receipt'])
        assert f'used: {len(raw)} moving averages, 0 raw' in receipt
        slots = sum('moving_' not in key for key in raw)
        assert f'ignored: {slots} optimizer slots' in receipt
        assert 'ignored: 1 counters and settings' in receipt
    state_dict = checkpoint['state_dict']
    assert state_dict.keys() == own.keys()
    for key, value in state_dict.items():
        parts = layout.names(key, *levels_of(name))
        expected = np.stack([
            means[p] for p in parts
        ]) if key.endswith('fusion_weights') else means[parts[0]]
        assert torch.equal(value, same_axes(expected, key)), key


@pytest.mark.parametrize(
    'name', ['d0', pytest.param('d7x', marks=pytest.mark.slow), 'lite0'])
def test_convert_effdet(name):
    """effdet's own state dict, and the one with level-first norms."""
    theirs = {
        key: torch.randn(value.shape)
        for key, value in reference.effdet_network(name, (
            128, 128)).state_dict().items()
    }
    expected = reference.convert(theirs, SCALING[name].backbone)
    own = shapes_of(name)
    found = match(theirs, own, *levels_of(name))
    state_dict = found.state_dict()
    assert state_dict.keys() == own.keys()
    for key, value in state_dict.items():
        assert torch.equal(value, expected[key]), key
    assert any('batch counters' in line for line in found.receipt)
    other = {}
    for key, value in theirs.items():
        parts = key.split('.')
        if 'bn_rep' in parts:  # net, bn_rep, repeat, level, bn, tensor
            key = '.'.join([*parts[:2], parts[3], parts[2], parts[5]])
        elif key.endswith('conv_pw.bias') and 'predict' not in key:
            continue  # without the redundant biases
        other[key] = value
    assert len(other) < len(theirs)
    found = match(other, own, *levels_of(name))
    assert any('set to zero' in line for line in found.receipt)
    for key, value in found.state_dict().items():
        if key.endswith('pointwise.bias') and 'conv_cls' not in key and \
                'conv_reg' not in key:
            assert not value.any()
        else:
            assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize('layout', [ZYLO117, PROJECT])
@pytest.mark.parametrize('sums', [False, True])
def test_convert_torch_layouts(layout, sums):
    """The torch layouts, and fusion weights where the model sums."""
    name = 'd0'
    own = {
        key: shape
        for key, shape in shapes_of(name).items()
        if not (sums and key.endswith('fusion_weights'))
    }
    generator = torch.Generator().manual_seed(0)
    ours = {k: torch.randn(s, generator=generator) for k, s in own.items()}
    theirs = {
        layout.names(key, *levels_of(name))[0]: value
        for key, value in ours.items()
    }
    if layout is ZYLO117:
        theirs = {
            k.replace('_conv.weight', '_conv.conv.weight'): v
            for k, v in theirs.items()
        }
    if sums:
        theirs['bifpn.0.p6_w1' if layout is
               ZYLO117 else 'neck.bifpn.0.p6_w1'] = torch.ones(2)
    found = match(theirs, own, *levels_of(name))
    for key, value in found.state_dict().items():
        expected = ours[key]
        if key.startswith('bbox_head.conv_reg.pointwise'):
            expected = same_axes(expected.numpy().reshape(36, -1), key)
        assert torch.equal(value, expected.reshape(value.shape)), key
    if sums:
        assert any('a sum does not use' in line for line in found.receipt)


def test_select_coco_classes():
    """Row c of 90 is category c + 1; ids that nothing has are left out."""
    key = 'bbox_head.conv_cls.pointwise.bias'
    bias, = select_coco_classes({key: torch.arange(810.)}, 9).values()
    first = (bias[:80] + 1).int().tolist()
    assert first[:12] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13]
    assert first[-3:] == [88, 89, 90] and len(first) == 80
    assert (bias[80:160] == bias[:80] + 90).all() and len(bias) == 720


@pytest.mark.slow
def test_converted_file_infers(effdet_file, run_converter, tmp_path):
    """Without a config, reproducibly, and with names of the classes."""
    for name in ('a.pth', 'b.pth'):
        code, output = run_converter(effdet_file, tmp_path / name, '--config',
                                     config_file('lite0'))
        assert code == 0, output
    assert 'classes: 80 of 90 slots' in output
    assert (tmp_path / 'a.pth').read_bytes() == (tmp_path /
                                                 'b.pth').read_bytes()
    meta = torch.load(tmp_path / 'a.pth', weights_only=True)['meta']
    digest = hashlib.sha256(effdet_file.read_bytes()).hexdigest()
    assert meta['source']['sha256'] == digest
    assert meta['aspect_pairs'][1] == [1.4, 0.7] and meta['mean'] == [127.] * 3
    inferencer = DetInferencer(
        weights=str(tmp_path / 'a.pth'), device='cpu', show_progress=False)
    assert inferencer.visualizer.dataset_meta['classes'][79] == 'toothbrush'
    result, = inferencer(np.zeros((96, 128, 3), np.uint8))['predictions']
    assert len(result['scores']) == 100


def broken(path, effdet_file):
    """What is wrong: (how it is written, words of the message)."""
    data = effdet_file.read_bytes()
    state_dict = torch.load(effdet_file, weights_only=True)

    class Call:

        def __reduce__(self):
            return (Path.touch, (path.parent / 'executed', ))

    def edited(**changes):
        torch.save({**state_dict, **changes}, path)

    stem = 'backbone.conv_stem.weight'
    return dict(
        missing_file=(lambda: None, 'does not exist'),
        empty=(lambda: path.write_bytes(b''), 'is empty'),
        html=(lambda: path.write_text('<!DOCTYPE html>'), 'a web page'),
        text=(lambda: path.write_text('weights'), 'in no known format'),
        cut_off=(lambda: path.write_bytes(data[:len(data) // 2]), 'damaged'),
        pickle=(lambda: torch.save(dict(a=Call()), path), 'never executed'),
        other_model=(lambda: torch.save(dict(fc=torch.ones(1)), path),
                     'of no known EfficientDet'),
        left_over=(lambda: edited(extra=torch.ones(1)), '  - extra'),
        missing=(lambda: torch.save(
            {
                k: v
                for k, v in state_dict.items() if k != stem
            }, path), '  + backbone.stem.conv.weight (32, 3, 3, 3)'),
        nan=(lambda: edited(**{stem: state_dict[stem] * float('nan')}),
             '1 tensors hold NaN or infinity: backbone.stem.conv.weight'),
        list=(lambda: torch.save([torch.ones(1)], path), 'holds list'),
        numbers=(lambda: torch.save({0: torch.ones(1)}, path),
                 '0 is not the name of a tensor'),
        nothing=(lambda: torch.save(dict(a=1), path), 'holds no tensors'),
        twice=(lambda: edited(**{f'module.{stem}': state_dict[stem]}),
               f'holds {stem} twice'),
        quantised=(lambda: edited(**{stem: state_dict[stem].char()}),
                   'torch.int8'),
        rows=(lambda: edited(**{BIAS: torch.zeros(720)}),
              '1 differ in shape'),
        keras=(lambda: path.write_bytes(b'\x89HDF\r\n\x1a\n' + b'0' * 99),
               'damaged or cut off'),
        other_hdf=(lambda: h5py.File(path, 'w').close(),
                   'no weights of Keras'),
        safetensors=(lambda: path.write_bytes(b'\xff' + b'\0' * 7 + b'{"'),
                     'damaged or cut off'),
        gzip=(lambda: path.write_bytes(gzip.compress(b'x' * 999)),
              'damaged or cut off'),
        other_tar=(lambda: packed({'readme.txt': b'x'}, path),
                   'holds no TensorFlow checkpoint'),
        two=(lambda: packed({'a.index': b'', 'b/c.index': b''}, path),
             "holds 2 TensorFlow checkpoints ['a', 'b/c']"),
        outside=(lambda: packed({'../a.index': b''}, path),
                 'outside the destination'))  # yapf: disable


def packed(members, path):
    """An archive of files."""
    with tarfile.open(path, 'w:gz') as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize('what', [
    'missing_file', 'empty', 'html', 'text', 'cut_off', 'pickle',
    'other_model', 'left_over', 'missing', 'nan', 'list', 'numbers', 'nothing',
    'twice', 'quantised', 'rows', 'keras', 'other_hdf', 'safetensors', 'gzip',
    'other_tar', 'two', 'outside'
])
def test_bad_input(effdet_file, tmp_path, what):
    """One clear error, and nothing is executed."""
    path = tmp_path / 'x.pth'
    write, words = broken(path, effdet_file)[what]
    write()
    with pytest.raises(ValueError) as error:
        tensors = open_source(path).tensors
        match(tensors, shapes_of('lite0'), *levels_of('lite0')).state_dict()
    assert words in str(error.value)
    assert not (tmp_path / 'executed').exists()


def test_bad_bundles(tmp_path):
    """Missing, cut off and compressed parts of a TensorFlow checkpoint."""
    prefix = tmp_path / 'x'
    write_bundle(prefix, dict(a=np.ones(300, 'f4')))
    index = Path(f'{prefix}.index').read_bytes()
    data = Path(f'{prefix}.data-00000-of-00001')
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(
            ValueError,
            match='x: a is damaged or cut off.* at byte 1200 of 100'):
        read_bundle(prefix)
    data.unlink()
    with pytest.raises(ValueError, match='is missing'):
        read_bundle(prefix)
    for content, words in ((index[:60], 'cut off'),
                           (b'\xff' * len(index[:-8]) + index[-8:],
                            'damaged')):
        Path(f'{prefix}.index').write_bytes(content)
        with pytest.raises(ValueError, match=words):
            read_bundle(prefix)
    write_bundle(prefix, dict(a=np.ones(3, 'f4')), compression=b'\1')
    with pytest.raises(ValueError, match='compressed'):
        read_bundle(prefix)
    write_bundle(prefix, dict(a=np.ones(3, 'f4')))
    index = bytearray(Path(f'{prefix}.index').read_bytes())
    index[index.index(b'a')] ^= 2  # the name becomes `c`
    Path(f'{prefix}.index').write_bytes(index)
    with pytest.raises(ValueError, match='checksum'):
        read_bundle(prefix)


def test_checksum():
    """The check value of CRC-32C, 0xe3069283, with TensorFlow's mask."""
    crc = 0xe3069283
    masked = (crc >> 15 | crc << 17 & 0xffffffff) + 0xa282ead8
    assert masked_crc32c(b'123456789') == masked % (1 << 32)


@pytest.mark.parametrize(
    'name', ['', 'x', 'x.index', 'x.data-00000-of-00001', 'x.meta'])
def test_digest_of_a_checkpoint(tmp_path, name):
    """Of both files, whichever name it is opened by."""
    write_bundle(tmp_path / 'x', dict(a=np.ones(3, 'f4')))
    (tmp_path / 'x.meta').write_bytes(b'graph')
    both = [(tmp_path / f'x.{part}').read_bytes()
            for part in ('data-00000-of-00001', 'index')]
    source = open_source(tmp_path / name)
    assert list(source.tensors) == ['a']
    assert source.sha256 == hashlib.sha256(b''.join(both)).hexdigest()


@pytest.mark.slow
def test_wrong_size_is_named(effdet_file, run_converter, tmp_path):
    """The tool says which size it is, and writes nothing."""
    code, output = run_converter(effdet_file, tmp_path / 'x.pth', '--config',
                                 config_file('lite1'))
    assert code == 1
    assert 'The weights are of lite0; give the config' in output
    assert 'Nothing was written' in output
    assert not list(tmp_path.iterdir())


def test_save_leaves_nothing_half_written(tmp_path):
    """An impossible target raises and leaves no file."""
    with pytest.raises(ValueError, match='cannot write'):
        save(dict(), str(tmp_path / 'missing' / 'x.pth'))
    (tmp_path / 'folder').mkdir()
    with pytest.raises(ValueError, match='cannot write'):
        save(dict(), str(tmp_path / 'folder'))
    assert [p.name for p in tmp_path.iterdir()] == ['folder']
    (tmp_path / 'fixed').write_text('mine')
    (tmp_path / 'fixed').chmod(0o444)
    with pytest.raises(ValueError, match='read-only'):
        save(dict(), str(tmp_path / 'fixed'))
    assert (tmp_path / 'fixed').read_text() == 'mine'
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # as on a full disk, after half of the data
        resource.setrlimit(resource.RLIMIT_FSIZE, (50000, old[1]))
        with pytest.raises(ValueError, match='cannot write'):
            save(dict(a=torch.ones(25000)), str(tmp_path / 'x'))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['fixed', 'folder']


def test_config_in_the_file_builds(effdet_file, run_converter, tmp_path):
    """The config that goes with the weights is complete."""
    code, output = run_converter(effdet_file, tmp_path / 'x.pth', '--config',
                                 config_file('lite0'), '--num-classes', 90)
    assert code == 0, output
    meta = torch.load(tmp_path / 'x.pth', weights_only=True)['meta']
    config = Config.fromstring(meta['cfg'], '.py')
    assert config.model.bbox_head.num_classes == 90
    assert len(meta['dataset_meta']['classes']) == 90
    assert meta['dataset_meta']['classes'][11] == 'unused 12'


def config_of(name, classes=None):
    """The config of a size, perhaps for other classes."""
    config = Config.fromfile(config_file(name))
    if classes:
        scale_config(config, name, classes=classes)
    return config


@pytest.fixture(scope='module')
def converted(effdet_file):
    """Checkpoints of Lite0 with 80 and 90 classes; not to be changed."""
    return {
        count: convert_file(effdet_file, config_of('lite0'), count)
        for count in (80, 90)
    }


@pytest.mark.slow
def test_own_checkpoint_stays(converted, tmp_path):
    """What is ours already keeps tensors and names, and 90 become 80."""
    first, expected = converted[90], converted[80]
    save(first, tmp_path / 'x.pth')
    again = convert_file(tmp_path / 'x.pth', config_of('lite0'), 90)
    assert list(again['state_dict']) == list(first['state_dict'])
    for key, value in first['state_dict'].items():
        assert torch.equal(again['state_dict'][key], value), key
    assert again['meta']['dataset_meta'] == first['meta']['dataset_meta']
    fewer = convert_file(tmp_path / 'x.pth', config_of('lite0'))
    for key, value in expected['state_dict'].items():
        assert torch.equal(fewer['state_dict'][key], value), key
    assert fewer['meta']['dataset_meta'] == expected['meta']['dataset_meta']
    with pytest.raises(ValueError, match='the 90 slots cannot be made'):
        save(fewer, tmp_path / 'x.pth')
        convert_file(tmp_path / 'x.pth', config_of('lite0'), 90)


@pytest.mark.slow
def test_converting_again_changes_nothing(effdet_file, tmp_path):
    """A file of ours keeps its conventions and origin, byte for byte."""
    config = config_of('lite0')
    config.model.bbox_head.anchor_generator.aspect_pairs = [(1.0, 1.0),
                                                            (1.5, 0.6),
                                                            (0.6, 1.5)]
    config.model.data_preprocessor.update(
        mean=[127.5] * 3, std=[127.5] * 3, pad_value=-1.0)
    first = convert_file(effdet_file, config)
    first['meta']['published'] = dict(name='x')
    save(first, tmp_path / 'x.pth')
    save(
        convert_file(tmp_path / 'x.pth', config_of('lite0')),
        tmp_path / 'y.pth')
    assert (tmp_path / 'x.pth').read_bytes() == (tmp_path /
                                                 'y.pth').read_bytes()


@pytest.mark.parametrize('count',
                         [pytest.param(80, marks=pytest.mark.slow), 90])
def test_own_classes_are_not_those_of_coco(effdet_file, tmp_path, count):
    """As many as COCO has, named by the config or by the file."""
    theirs = reference.with_classes(
        torch.load(effdet_file, weights_only=True), count)
    torch.save(theirs, tmp_path / 'x.pth')
    own = [f'own {i}' for i in range(count)]
    first = convert_file(tmp_path / 'x.pth', config_of('lite0', own))
    assert first['meta']['dataset_meta'] == dict(classes=own)
    save(first, tmp_path / 'y.pth')
    again = convert_file(tmp_path / 'y.pth', config_of('lite0'))
    assert again['meta']['dataset_meta'] == dict(classes=own)
    key = 'bbox_head.conv_cls.pointwise.bias'
    assert len(again['state_dict'][key]) == 9 * count
    assert torch.equal(again['state_dict'][key],
                       theirs['class_net.predict.conv_pw.bias'])


def test_config_of_another_model(effdet_file):
    """Said at once, with what to give."""
    config = Config(dict(model=dict(type='RetinaNet')))
    with pytest.raises(
            ValueError, match='is not of an EfficientDet; use configs/'):
        convert_file(effdet_file, config)


@pytest.mark.parametrize('config', ['missing.py', 'README.md'])
def test_tool_without_a_config(effdet_file, run_converter, tmp_path, config):
    """It says which file is no config, and writes nothing."""
    code, output = run_converter(effdet_file, tmp_path / 'x.pth', '--config',
                                 ROOT / config)
    assert code == 1 and f'{config} cannot be read as a config' in output
    assert not (tmp_path / 'x.pth').exists()


@pytest.mark.slow
def test_other_classes(effdet_lite0, tmp_path):
    """Names come from the file or the config; without them it is refused."""
    theirs = reference.with_classes(effdet_lite0, 1)
    torch.save(theirs, tmp_path / 'x.pth')
    with pytest.raises(
            ValueError, match='predicts 1 classes.*config.*80.*classes='):
        convert_file(tmp_path / 'x.pth', config_of('lite0'))
    trees = config_of('lite0', ['tree'])
    checkpoint = convert_file(tmp_path / 'x.pth', trees)
    assert checkpoint['meta']['dataset_meta'] == dict(classes=['tree'])
    text = Config.fromstring(checkpoint['meta']['cfg'], '.py')
    assert text.model.bbox_head.num_classes == 1
    save(checkpoint, tmp_path / 'y.pth')
    again = convert_file(tmp_path / 'y.pth', config_of('lite0'))
    assert again['meta']['dataset_meta'] == dict(classes=['tree'])


@pytest.mark.parametrize('form', ['effdet', 'mmengine'])
def test_averages_in_torch_files(effdet_file, tmp_path, form):
    """Training checkpoints hold both; averages are preferred."""
    means = torch.load(effdet_file, weights_only=True)
    raw = {k: v + 1 if v.is_floating_point() else v for k, v in means.items()}
    if form == 'effdet':
        saved = dict(state_dict=raw, state_dict_ema=means)
    else:
        raw = {f'module.{key}': value for key, value in raw.items()}
        saved = dict(
            state_dict=means, ema_state_dict=dict(raw, steps=torch.tensor(3)))
    torch.save(saved, tmp_path / 'x.pth')
    key = 'backbone.stem.conv.weight'
    stem = means['backbone.conv_stem.weight']
    own = shapes_of('lite0'), *levels_of('lite0')
    found = match(open_source(tmp_path / 'x.pth').tensors, *own)
    assert torch.equal(found.state_dict()[key], stem)
    assert 'used: 588 moving averages, 0 raw' in found.receipt
    checkpoint = convert_file(
        tmp_path / 'x.pth', config_of('lite0'), averages=False)
    assert torch.equal(checkpoint['state_dict'][key], stem + 1)
    assert ('used: 588 raw, not the 588 moving averages'
            in checkpoint['meta']['source']['receipt'])


def test_half_precision_and_safetensors(effdet_file, tmp_path):
    """Halves become floats of the same value; safetensors are read."""
    halves = {
        key: value.half()
        for key, value in torch.load(effdet_file, weights_only=True).items()
        if value.is_floating_point()
    }
    torch.save(halves, tmp_path / 'x.pth')
    save_file(halves, tmp_path / 'x.safetensors')
    own = shapes_of('lite0'), *levels_of('lite0')
    one, other = (
        match(open_source(tmp_path / name).tensors, *own).state_dict()
        for name in ('x.pth', 'x.safetensors'))
    stem = one['backbone.stem.conv.weight']
    assert stem.dtype == torch.float32
    assert torch.equal(stem, halves['backbone.conv_stem.weight'].float())
    assert all(torch.equal(other[key], value) for key, value in one.items())


@pytest.mark.slow
def test_equal_sizes_are_told(tmp_path):
    """Nothing in the weights tells D6 from D7."""
    own = shapes_of('d6', 80)
    torch.save({k: torch.ones(s) for k, s in own.items()}, tmp_path / 'x.pth')
    receipt = convert_file(tmp_path / 'x.pth',
                           config_of('d7'))['meta']['source']['receipt']
    line, = [line for line in receipt if line.startswith('size:')]
    assert 'd6 and d7' in line and 'anchor scale of the config, 5.0' in line


@pytest.mark.slow
def test_anchors_of_mmdet(tmp_path):
    """A head that mmdet's project trained: every anchor keeps its outputs."""
    own = shapes_of('d0', 2)
    generator = torch.Generator().manual_seed(0)
    theirs = {
        PROJECT.names(key, *levels_of('d0'))[0]:
        torch.rand(shape, generator=generator)
        for key, shape in own.items()
    }
    cfg = "model = dict(bbox_head=dict(type='EfficientDetSepBNHead'))"
    meta = dict(cfg=cfg, dataset_meta=dict(classes=('cat', 'dog')))
    torch.save(dict(meta=meta, state_dict=theirs), tmp_path / 'x.pth')
    checkpoint = convert_file(tmp_path / 'x.pth', config_of('d0'))
    config = Config.fromstring(checkpoint['meta']['cfg'], '.py')
    assert checkpoint['meta']['dataset_meta']['classes'] == ['cat', 'dog']
    ours = TASK_UTILS.build(config.model.bbox_head.anchor_generator)
    # The settings of the project's configs.
    stock = AnchorGenerator(
        octave_base_scale=4,
        scales_per_octave=3,
        ratios=[1.0, 0.5, 2.0],
        strides=[8],
        center_offset=0.5)
    stock, = stock.grid_priors([(1, 1)], device='cpu')
    ours = ours.grid_priors([(1, 1)], device='cpu', input_size=(8, 8))[0]
    distances = torch.cdist(stock, ours.reshape(-1, 4))
    assert distances.min(1).values.max() < 1e-4
    places = distances.argmin(1)
    assert sorted(places.tolist()) == list(range(9))
    assert places.tolist() != list(range(9))
    for net, width in (('cls', 2), ('reg', 4)):
        for leaf in ('weight', 'bias'):
            given = theirs[f'bbox_head.{net}_header.pointwise_conv.{leaf}']
            got = checkpoint['state_dict'][
                f'bbox_head.conv_{net}.pointwise.{leaf}']
            given, got = (x.unflatten(0, (9, width)) for x in (given, got))
            assert torch.equal(got[places], given)


@pytest.mark.slow
def test_backbone_of_mmdet(run_converter, tmp_path):
    """mmdet's own EfficientNet, as MMPretrain saves it: equal features."""
    theirs = MODELS.build(
        dict(type='mmdet.EfficientNet', arch='b1', out_indices=(3, 4, 5)))
    generator = torch.Generator().manual_seed(0)
    for key, value in theirs.state_dict().items():
        if key.endswith('running_var'):
            value.uniform_(0.5, 1.5, generator=generator)
        elif key.endswith(('running_mean', 'bn.bias')):
            value.normal_(0, 0.1, generator=generator)
    saved = {f'backbone.{k}': v for k, v in theirs.state_dict().items()}
    saved['backbone.layers.6.conv.weight'] = torch.ones(1280, 320, 1, 1)
    saved['head.fc.bias'] = torch.ones(1000)
    torch.save(dict(state_dict=saved), tmp_path / 'x.pth')
    code, output = run_converter(tmp_path / 'x.pth', tmp_path / 'y.pth',
                                 '--config', config_file('d1'))
    assert code == 0 and 'ignored: 2 tensors of the classifier' in output
    ours = MODELS.build(
        dict(
            type='mmdet_efficientdet.EfficientNet',
            arch='b1',
            init_cfg=dict(
                type='Pretrained', checkpoint=str(tmp_path / 'y.pth'))))
    ours.init_weights()
    image = torch.randn(1, 3, 96, 129)
    ours.eval()
    theirs.eval()
    with torch.no_grad():
        outputs, expected = ours(image), theirs(image)
    for one, other in zip(outputs, expected):
        assert (one - other).abs().max() < 1e-5 * other.abs().max()
    with pytest.raises(ValueError, match='The weights are of d1; give'):
        convert_file(tmp_path / 'x.pth', config_of('d2'))


def test_backbone_of_tensorflow(tmp_path):
    """An ImageNet checkpoint: TensorFlow's axes, the classifier ignored."""
    own = {k: v for k, v in shapes_of('lite0').items() if k[:9] == 'backbone.'}
    tensors = values(tf_shapes(own, 'lite0'), 0)
    more = {
        'efficientnet-lite0/head/dense/kernel': np.ones((4, 5), 'f4'),
        'efficientnet-lite0/stem/conv2d/kernel/RMSProp_1': np.ones(3, 'f4')
    }
    write_bundle(tmp_path / 'x', {**tensors, **more})
    checkpoint = convert_file(tmp_path / 'x', config_of('lite0'))
    assert checkpoint['meta'].keys() == {'source'}
    assert {f'backbone.{k}' for k in checkpoint['state_dict']} == own.keys()
    for key, value in checkpoint['state_dict'].items():
        name, = VARIABLES.names(f'backbone.{key}', 'lite0', 5)
        assert torch.equal(value, same_axes(tensors[name], key)), key


@pytest.mark.parametrize('src, dst', [('x', 'x'), ('x', 'x.index'),
                                      ('x.index', 'x.data-00000-of-00001'),
                                      ('folder', 'folder/x.index')])
def test_source_is_not_overwritten(run_converter, tmp_path, src, dst):
    """A part of it as target is refused before anything is read."""
    code, output = run_converter(tmp_path / src, tmp_path / dst, '--config',
                                 config_file('lite0'))
    assert code == 1 and 'DST is SRC itself' in output


def test_target_is_a_file(converted, effdet_file, tmp_path):
    """Devices and pipes stay, and a missing folder is said."""
    checkpoint = converted[80]
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(ValueError, match='is not a file'):
        save(checkpoint, tmp_path / 'pipe')
    assert (tmp_path / 'pipe').is_fifo()
    with pytest.raises(ValueError, match='cannot write'):
        save(checkpoint, effdet_file / 'x.pth')


@pytest.mark.slow
def test_tool_takes_conventions_of_a_published_file(effdet_file, run_converter,
                                                    tmp_path, monkeypatch):
    """Known by its file's name, and then without a config."""
    path = tmp_path / 'tf_efficientdet_lite0-dfacfc78.pth'
    path.write_bytes(effdet_file.read_bytes())
    code, output = run_converter(path, tmp_path / 'x.pth')
    assert code == 1 and 'should start with dfacfc78' in output
    name = 'effdet://tf_efficientdet_lite0'
    path = path.rename(tmp_path /
                       f'lite0-{sources.sha256_of(effdet_file)[:8]}.pth')
    entry = dataclasses.replace(published.manifest()[name], file=path.name)
    monkeypatch.setattr(published, 'manifest', lambda: {name: entry})
    code, output = run_converter(path, tmp_path / 'x.pth')
    assert code == 0, output
    meta = torch.load(tmp_path / 'x.pth', weights_only=True)['meta']
    assert meta['aspect_pairs'][1] == pytest.approx([2**0.5, 0.5**0.5])
    code, output = run_converter(path, tmp_path / 'y.pth', '--config',
                                 config_file('lite0'))
    assert code == 0 and 'aspect_pairs=[[1.0,1.0],[1.414' in output
    code, output = run_converter(effdet_file, tmp_path / 'z.pth')
    assert code == 1 and 'give the config of the size' in output
