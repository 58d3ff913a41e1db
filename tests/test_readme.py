"""The README says what the code does."""
from pathlib import Path

import pytest

from mmdet_efficientdet.scaling import SCALING

ROOT = Path(__file__).resolve().parent.parent


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


def test_named_files_exist():
    text = (ROOT / 'README.md').read_text()
    for link in text.split('](')[1:]:
        target = link.split(')')[0]
        if not target.startswith('http'):
            assert (ROOT / target).exists(), target
