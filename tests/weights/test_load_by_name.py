"""Names of weights are known however the package comes into a process."""
import re
import subprocess
import sys

import pytest
from helpers.tiny_data import D0, LITE0, run_tool

NAME = 'automl://efficientdet-lite0'
SIMILAR = 'effdet://tf_efficientdet_d0'

# The first use of the package where mmengine.runner is imported already.
FIRST_USES = dict(
    package='import mmdet_efficientdet',
    class_='from mmdet_efficientdet import EfficientDet',
    build='''
from mmdet.registry import MODELS
MODELS.build(dict(type='mmdet_efficientdet.BiFPN', in_channels=[8],
                  out_channels=8, num_outs=2))''')  # yapf: disable
UNKNOWN = '''
from mmengine.runner.checkpoint import CheckpointLoader
try:
    CheckpointLoader.load_checkpoint('effdet://tf_efficientdet_d00')
except ValueError as error:
    print(error)
'''


@pytest.mark.slow
@pytest.mark.parametrize('use', FIRST_USES)
def test_after_mmengine(use, tmp_path):
    """Our loader answers, and suggests a similar name for an unknown one."""
    known = "import sys\nassert 'mmengine.runner.checkpoint' in sys.modules\n"
    done = run_tool(
        'source', cwd=tmp_path, source=known + FIRST_USES[use] + UNKNOWN)
    assert done.code == 0, done.output
    assert SIMILAR in re.split('[,.]? ', done.output)


@pytest.mark.slow
def test_before_mmengine():
    """The import alone is enough, and imports no loader of checkpoints."""
    source = '''
import sys
import mmdet_efficientdet
assert 'mmengine.runner' not in sys.modules
'''
    done = subprocess.run([sys.executable, '-c', source + UNKNOWN],
                          cwd=D0.parents[2],
                          capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert SIMILAR in re.split('[,.]? ', done.stdout)


LOADS = dict(
    runner='''
from mmengine.config import Config
from mmengine.runner import Runner
config = Config.fromfile(CONFIG)
assert config.default_scope == 'mmdet'
config.work_dir, config.load_from = '.', NAME
del config.default_hooks['ema']  # it has no model before the training starts
runner = Runner.from_cfg(config)
runner.load_or_resume()
model = runner.model
''',
    inferencer='''
import mmdet_efficientdet
from mmdet.apis import DetInferencer
model = DetInferencer(weights=NAME, device='cpu').model
''')


@pytest.mark.slow
@pytest.mark.parametrize('way', LOADS)
def test_load(way, automl_lite0, tmp_path):
    """load_from of a config, and an inferencer, get the file's values."""
    folder = str(automl_lite0.folder)
    source = f'''
import os
os.environ['MMDET_EFFICIENTDET_WEIGHTS'] = {folder!r}
CONFIG, NAME = {str(LITE0)!r}, {NAME!r}
{LOADS[way]}
print('row', *model.backbone.stem.conv.weight[0, 0, 0].tolist())
'''
    done = run_tool('source', cwd=tmp_path, source=source)
    assert done.code == 0, done.output
    row, = [x for x in done.output.splitlines() if x.startswith('row ')]
    kernel = automl_lite0.tensors['efficientnet-lite0/stem/conv2d/kernel']
    assert [float(x) for x in row.split()[1:]] == kernel[0, :, 0, 0].tolist()
