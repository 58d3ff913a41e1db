"""MMDetection's train.py, where mim looks for it."""
import runpy
from importlib.util import find_spec
from pathlib import Path

import mmdet_efficientdet  # noqa: F401, for _base_ = 'mmdet_efficientdet::...'

if __name__ == '__main__':
    package = Path(find_spec('mmdet').origin).parent
    runpy.run_path(
        str(package / '.mim' / 'tools' / 'train.py'), run_name='__main__')
