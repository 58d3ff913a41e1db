"""The README says what the code does."""
import re
from pathlib import Path

import pytest
from helpers.tiny_data import CONFIGS
from mmengine.config import Config

from mmdet_efficientdet.scaling import SCALING

ROOT = Path(__file__).resolve().parents[2]


def table_rows():
    """Cells of the table of sizes, by size."""
    lines = (ROOT / 'README.md').read_text().splitlines()
    start = next(i for i, x in enumerate(lines) if x.startswith('| size '))
    rows = {}
    for line in lines[start + 2:]:
        if not line.startswith('|'):
            break
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        rows[cells[0]] = cells[1:]
    return rows


def test_table_has_all_sizes():
    assert list(table_rows()) == list(SCALING)


@pytest.mark.parametrize('name', SCALING)
def test_row_equals_scaling(name):
    row = SCALING[name]
    assert table_rows()[name][:-1] == [
        row.backbone,
        str(row.image_size),
        str(row.bifpn_channels),
        str(row.bifpn_layers),
        str(row.head_layers), f'{row.anchor_scale:g}', f'P3–P{row.max_level}',
        row.fusion.replace('_', ' '), row.activation
    ]


@pytest.mark.parametrize('name', SCALING)
def test_parameters(name, build_detector):
    count = sum(p.numel()
                for p in build_detector(name, 80, 'meta').parameters())
    assert table_rows()[name][-1] == f'{count:,}'


@pytest.mark.parametrize('path', ['README.md', 'docs/training.md'])
def test_named_files_exist(path):
    path = ROOT / path
    for link in path.read_text().split('](')[1:]:
        target = link.split(')')[0].split('#')[0]
        if not target.startswith('http'):
            assert (path.parent / target).exists(), target


def test_recipes_are_those_of_the_configs():
    """Batch, rate, jitter and epochs of the table of recipes."""
    text = (ROOT / 'docs' / 'training.md').read_text()
    rows = re.findall(r'^\| `(\S+)` \|.*', text, re.M)
    found = re.findall(
        r'^\| `(\S+)` \| .* \| (\d+) \| ([\d.]+) \| .* \| '
        r'([\d.]+)–([\d.]+) \| ([\d, ]+) \|$', text, re.M)
    assert len(found) == len(rows) == 4
    for name, batch, rate, low, high, epochs in found:
        config = Config.fromfile(CONFIGS /
                                 f'{name.replace("<size>", "d0")}.py')
        assert config.auto_scale_lr.base_batch_size == int(batch)
        assert config.optim_wrapper.optimizer.lr == float(rate)
        crop = config.train_dataloader.dataset.pipeline[-2]
        assert crop.ratio_range == (float(low), float(high))
        assert config.train_cfg.max_epochs == int(epochs.split(',')[0])
