"""The tool that times this package beside others."""
import csv
import time

import benchmark
import pytest


def test_ratio_and_turns(capsys):
    """The first function is the unit, and all run in turn."""
    calls = []

    def work(name, milliseconds):

        def run():
            calls.append(name)
            end = time.process_time() + milliseconds / 1000
            while time.process_time() < end:
                pass

        return run

    functions = dict(slow=work('slow', 40), fast=work('fast', 10))
    slow, fast = benchmark.compare('title', functions, 3, on_gpu=False)
    assert calls == ['slow', 'fast'] * 4  # the first turn warms up
    assert slow['ratio'] == 1 and 2.5 < fast['ratio'] < 5
    assert 0.04 <= slow['low'] <= slow['median'] <= slow['high'] < 0.08
    assert 'title, fast' in capsys.readouterr().out


@pytest.mark.slow
def test_all_parts(monkeypatch, tmp_path, capsys):
    """Each part is measured, and table, CSV and picture have all rows."""
    monkeypatch.setattr('sys.argv', [
        'benchmark.py', '--size', 'lite0', '--side', '128', '--repeats', '1',
        '--out',
        str(tmp_path)
    ])
    benchmark.main()
    rows = list(csv.DictReader((tmp_path / 'benchmark.csv').open()))
    assert {row['what']
            for row in rows} >= {
                'effdet', 'detector', 'plain network', 'windows', 'ResizeCrop'
            }
    assert all(float(row['ratio']) > 0 for row in rows)
    text = (tmp_path / 'benchmark.md').read_text()
    assert text.count('\n| lite0 ') == len(rows) and '1 thread(s)' in text
    assert (tmp_path / 'benchmark.png').stat().st_size > 1000
