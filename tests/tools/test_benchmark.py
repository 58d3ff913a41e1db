"""The tool that times this package beside others."""
import csv
import re
import subprocess
import sys
import time

import benchmark
import benchmark_facts
import pytest
import torch
from effdet_bridge import effdet_network
from helpers.tiny_data import LITE0


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
        '--half', '--work', 'forward', 'runtimes', 'boxes', 'train', 'targets',
        'resize', 'sizes', 'facts', '--out',
        str(tmp_path)
    ])
    benchmark.main()
    rows = list(csv.DictReader((tmp_path / 'benchmark.csv').open()))
    assert {row['what']
            for row in rows} >= {
                'effdet', 'detector', 'plain network', 'plain network, AMP',
                'plain network, ONNX Runtime', 'windows', 'ResizeCrop'
            }
    assert all(float(row['ratio']) > 0 for row in rows)
    text = (tmp_path / 'benchmark.md').read_text()
    assert text.count('\n| lite0 ') == len(rows) and '1 thread(s)' in text
    assert (tmp_path / 'benchmark.png').stat().st_size > 1000
    facts = {
        (row['what'], row['network']): row['value']
        for row in csv.DictReader((tmp_path / 'facts.csv').open())
    }
    expected = benchmark_facts.multiply_adds(
        effdet_network('lite0', (128, 128)), torch.empty(1, 3, 128, 128)) / 1e9
    found = float(facts['multiply-adds', 'plain'].split()[0])
    assert 0.1 < found == pytest.approx(expected, abs=0.006)
    assert facts['share of the GEMM peak', 'plain network, ONNX Runtime']
    calls = 'operators of a pass'
    assert (int(facts[calls, 'plain']) < int(facts[calls, 'detector']) / 1.5)
    stages = ('forward', 'loss', 'backward', 'optimizer', 'EMA')
    for name in ('effdet', 'detector'):
        parts = [
            int(facts[f'operators of training: {stage}', name])
            for stage in stages
        ]
        assert int(facts['operators of training: all', name]) == sum(parts)
        assert min(parts) > 0


def test_recompilations():
    """A graph for each size that is new in kind is counted."""

    def network(x):
        return x + (1 if x.shape[-1] > 8 else 2)

    inputs = [torch.zeros(2, side) for side in (4, 16, 32, 64)]
    assert benchmark_facts.recompilations(network, inputs[:1]) == 1
    assert 2 <= benchmark_facts.recompilations(network, inputs) <= 3


def test_what_is_counted():
    """Multiply-adds, memory, operators and graph breaks of small functions."""
    conv = torch.nn.Conv2d(2, 3, 3, bias=False)
    x = torch.zeros(1, 2, 6, 6)
    assert benchmark_facts.multiply_adds(conv, x) == 16 * 27 * 2
    assert conv.weight.device == x.device  # a copy was counted
    assert benchmark_facts.operator_calls(
        lambda: x.view(-1).add(1).mul(2)) == 2
    # larger than any free block that malloc may have kept
    used = benchmark_facts.peak_memory(lambda: torch.ones(2**27))
    assert 0.9 * 2**29 < used < 1.2 * 2**29
    kept = []

    def below():
        pieces = [torch.ones(2**12) for _ in range(2**12)]
        kept.append(torch.ones(2**12))  # malloc keeps what is below it
        return pieces

    assert 0.9 * 2**26 < benchmark_facts.peak_memory(below) < 1.2 * 2**26
    assert benchmark_facts.gemm_peak('cpu') > 1e8
    assert benchmark_facts.graph_breaks(lambda y: y + 1, x) == 0
    assert benchmark_facts.graph_breaks(lambda y: y + y.sum().item(), x) == 1
    first = benchmark_facts.top_operators(
        lambda: torch.mm(*torch.ones(2, 512, 512)))[0]
    assert first['operator'] == 'mm' and first['share'] > 0.5


@pytest.mark.slow
def test_startup():
    """The parts of a made-up training, to the end of its first step."""
    tool = LITE0.parents[2] / 'tools' / 'proof' / 'benchmark_startup.py'
    done = subprocess.run(
        [sys.executable, tool, LITE0, '--images', '24', '--boxes', '2'],
        capture_output=True,
        text=True)
    rows = dict(re.findall(r'^\| (\D+) \| ([\d.]+) \|$', done.stdout, re.M))
    seconds = {key: float(value) for key, value in rows.items()}
    assert done.returncode == 0, done.stderr
    assert seconds['first step'] > 0.1 < seconds['runner and model']
    assert len(seconds) == 10  # a negative one would not be found
    total = seconds.pop('all')
    assert sum(seconds.values()) == pytest.approx(total, abs=0.06)
