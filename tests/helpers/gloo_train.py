"""MMDetection's train.py on ranks that have no GPU.

mmengine selects a GPU before it opens the group of processes, unless the group
is open already. To be started like train.py itself::

    torchrun --nproc-per-node 2 tests/helpers/gloo_train.py CONFIG \\
        --launcher pytorch

with ``CPU_RANKS`` of this file in the config.
"""
import runpy
from importlib.util import find_spec
from pathlib import Path

import torch.distributed

# No GPU of the rank's number, and norms that only GPUs can synchronise.
CPU_RANKS = '''
model_wrapper_cfg = dict(
    type='MMDistributedDataParallel',
    device_ids=None,
    broadcast_buffers=False)
sync_bn = None
'''

if __name__ == '__main__':
    torch.distributed.init_process_group('gloo')
    tools = Path(find_spec('mmdet').origin).parent / '.mim' / 'tools'
    runpy.run_path(str(tools / 'train.py'), run_name='__main__')
