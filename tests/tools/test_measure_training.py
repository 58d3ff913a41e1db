"""The tool that measures memory and time of a training step."""
import re

import measure_training
import pytest


def test_nothing_to_measure(monkeypatch, capsys):
    """Fewer than one step is refused by the command line."""
    monkeypatch.setattr('sys.argv', ['measure_training.py', '--steps', '0'])
    with pytest.raises(SystemExit):
        measure_training.main()
    assert '--steps' in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_measuring_tool(monkeypatch, capsys):
    """It trains in processes of their own and prints sound figures."""
    monkeypatch.setattr('sys.argv', [
        'measure_training.py', '--size', 'd0', '--image-size', '256',
        '--steps', '1', '--threads', '1'
    ])
    measure_training.main()
    conditions, _, *lines = capsys.readouterr().out.splitlines()
    assert '1 image(s) with 20 boxes each' in conditions
    cells = [cell.strip() for cell in lines[2].strip('|').split('|')]
    assert cells[:2] == ['d0', '256']
    before, peak, less = (int(n.replace(',', '')) for n in cells[2:5])
    assert 100 < before < less < peak
    assert re.fullmatch(r'x 0\.\d\d', cells[5])
    assert float(cells[6]) > 0 and float(cells[7]) > 0
