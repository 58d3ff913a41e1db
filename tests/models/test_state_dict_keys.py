"""Names and shapes of the tensors are frozen: files of users hold them."""
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS

DATA = Path(__file__).parents[1] / 'data'
# Tensors without batch counters, and elements (trainable, statistics) of
# the published models with 90 classes.
TOTALS = dict(
    d0=(676, 3_880_067, 47_136),
    d1=(868, 6_625_898, 71_456),
    d2=(932, 8_097_039, 81_776),
    d3=(1099, 12_032_296, 114_304),
    d4=(1277, 20_723_675, 167_312),
    d5=(1405, 33_653_315, 227_392),
    d6=(1565, 51_871_782, 311_984),
    d7=(1565, 51_871_782, 311_984),
    d7x=(1902, 77_147_166, 417_728),
    lite0=(588, 3_243_470, 47_136),
    lite1=(719, 4_248_318, 63_072),
    lite2=(775, 5_252_334, 72_560),
    lite3=(922, 8_350_862, 104_192),
    lite3x=(922, 9_280_862, 111_712),
    lite4=(1068, 15_130_894, 155_504))
# Parts of D0 and D7x: backbone, neck without and in P6's projection, nets.
PARTS = dict(
    d0=(3_595_388, 175_609, 20_672, 69_354, 19_044),
    d7x=(62_143_440, 12_865_152, 246_912, 1_094_826, 796_836),
    lite0=(2_958_848, 175_552, 20_672, 69_354, 19_044))


@pytest.mark.parametrize('name', ['d0', 'd7x', 'lite0'])
def test_keys_are_frozen(meta_detector, name):
    """Every key has its place and shape; none comes and none goes."""
    state_dict = meta_detector(name).state_dict()
    lines = [f'{k} {tuple(v.shape)}' for k, v in state_dict.items()]
    frozen = (DATA / f'keys_{name}.txt').read_text().splitlines()
    assert lines == frozen
    assert len(lines) == len(set(lines))


@pytest.mark.parametrize('name', TOTALS)
def test_totals(meta_detector, name):
    """Parameters, statistics and tensors, to the digit."""
    detector = meta_detector(name)
    num_tensors, trainable, statistics = TOTALS[name]
    assert sum(p.numel() for p in detector.parameters()) == trainable
    state_dict = {
        k: v
        for k, v in detector.state_dict().items()
        if not k.endswith('num_batches_tracked')
    }
    assert len(state_dict) == num_tensors
    assert sum(v.numel() for v in state_dict.values()) \
        == trainable + statistics


@pytest.mark.parametrize('name', PARTS)
def test_parameters_of_parts(meta_detector, name):
    """Each part has its share."""
    groups = dict.fromkeys(('backbone', 'neck', 'extra', 'cls', 'reg'), 0)
    for key, parameter in meta_detector(name).named_parameters():
        part, first = key.split('.')[:2]
        if first == 'extra_levels':
            part = 'extra'
        elif part == 'bbox_head':
            part = 'cls' if 'cls' in first else 'reg'
        groups[part] += parameter.numel()
    assert tuple(groups.values()) == PARTS[name]


@pytest.mark.parametrize('name, expected', [
    ('d0', 3_874_217),
    ('d3', 12_017_806),
    ('d7x', 77_112_516),
    ('lite0', 3_237_620),
    ('lite4', 15_110_644),
])
def test_parameters_of_80_classes(meta_detector, model_cfg, name, expected):
    """With the classes of the COCO configs."""
    detector = meta_detector(name)
    with torch.device('meta'):
        head = MODELS.build(model_cfg(name, 80).bbox_head)
    parts = (detector.backbone, detector.neck, head)
    assert sum(p.numel() for part in parts
               for p in part.parameters()) == expected
