"""What the demo prints and keeps; the training itself is not run."""
import sys

import pytest
from helpers.tiny_data import CONFIGS
from mmengine.config import Config

sys.path.append(str(CONFIGS.parents[1] / 'tools'))
import demo  # noqa: E402

SCRIPT = '''
import os
print('noise', os.environ['OMP_NUM_THREADS'])
for step in range(1, 42):
    print(f'11/30 22:00:00 - mmengine - INFO - Iter(train) [{step}/41]')
print('11/30 22:00:00 - mmengine - INFO - Iter(val) [1/1] AP')
'''


def test_progress_and_log(tmp_path, capfd, monkeypatch):
    """The first step is shown at once; a resumed training keeps its log."""
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    script, log = tmp_path / 'script.py', tmp_path / 'logs' / 'log'
    script.write_text(SCRIPT)
    for _ in range(2):
        demo.run('training', log, str(script), mode='a')
    shown = [line.strip() for line in capfd.readouterr().out.splitlines()]
    assert [line for line in shown if 'Iter' in line] == [
        *(f'Iter(train) [{step}/41]'
          for step in (1, 21, 41)), 'Iter(val) [1/1] AP'
    ] * 2
    text = log.read_text()
    assert text.count('noise 1') == 2 and text.count('Iter(train)') == 82
    demo.run('training', log, str(script))
    assert log.read_text().count('noise') == 1


def test_failure(tmp_path):
    """The end of the output, and where all of it is."""
    script = tmp_path / 'script.py'
    script.write_text('print("the reason")\nraise SystemExit(3)')
    with pytest.raises(SystemExit) as error:
        demo.run('training', tmp_path / 'log', str(script))
    assert 'the reason' in str(error.value)
    assert str(tmp_path / 'log') in str(error.value)


def test_expected_values():
    """They are there for each length that the demo trains for."""
    steps = Config.fromfile(demo.CONFIG).train_cfg.max_iters
    assert demo.EXPECTED.keys() == {steps, demo.QUICK}
    for sets in demo.EXPECTED.values():
        assert list(sets) == ['test', 'osbs']
        assert all(0 < x < 1 for values in sets.values() for x in values)
