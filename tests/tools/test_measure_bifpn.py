"""tools/studies/measure_bifpn.py: necks that are not equal are refused."""
import measure_bifpn
import pytest
import torch

UTILS = 'from torch import nn\n'
BIFPN = '''
from .utils import nn

class BiFPN(nn.Conv2d):
    def __init__(self, num_stages, in_channels, out_channels):
        super().__init__(in_channels[0], out_channels, num_stages)

    def forward(self, feats):
        return super().forward(feats[0]),
'''


@pytest.fixture
def small(monkeypatch):
    """Measures 256 pixels, where levels are 32x32 to 2x2."""
    row = measure_bifpn.SCALING['d0']
    monkeypatch.setitem(measure_bifpn.SCALING, 'd0',
                        type(row)(**{
                            **vars(row), 'image_size': 256
                        }))


@pytest.mark.slow
def test_table(small, tmp_path, capsys):
    (tmp_path / 'utils.py').write_text(UTILS)
    (tmp_path / 'bifpn.py').write_text(BIFPN)
    with pytest.raises(SystemExit) as end:
        measure_bifpn.main(['--repeats', '2', '--project', str(tmp_path)])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split('|')[1:-1]]
            for line in lines[2:-1]]
    assert [row[:2] for row in rows] == [
        ['ours, fast_normalized', '196,281'],
        ['effdet', '196,281'],
        # three layers: 40 x 64 kernels of 3x3, and biases
        ["MMDetection's project", '23,104'],
        ['ours, softmax', '196,281'],
        # without 3 x (5 x 2 + 3 x 3) weights
        ['ours, sum', '196,224'],
        ['ours, unbounded', '196,281'],
        # 64 weights in place of each
        ['ours, channel_fast_normalized', '199,872']
    ]
    assert rows[0][2].endswith(' ms') and rows[1][3].startswith('x ')
    assert 'd0, one image of 256 px, one thread, median of 2' in lines[-1]


@pytest.mark.slow
def test_unequal_necks_are_refused(small, monkeypatch, capsys):
    build = measure_bifpn.build_necks

    def changed(*args):
        necks = build(*args)
        with torch.no_grad():
            necks['effdet'].cell[2].fnode[7].combine.edge_weights += 0.01
        return necks

    monkeypatch.setattr(measure_bifpn, 'build_necks', changed)
    with pytest.raises(SystemExit) as end:
        measure_bifpn.main(['--repeats', '1'])
    assert end.value.code == 1
