"""Metadata is in setup.cfg; this file only fills mmdet_efficientdet/.mim."""
import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
MIM = ROOT / 'mmdet_efficientdet' / '.mim'


def fill_mim(copy):
    """Puts what mim and mmengine look up in an installed package into .mim.

    Links keep an editable install up to date; an archive needs copies.
    """
    for name in ('configs', 'tools', 'model-index.yml'):
        source, target = ROOT / name, MIM / name
        if not source.exists():
            continue  # in an unpacked sdist the copies are already there
        MIM.mkdir(exist_ok=True)
        if target.is_symlink() or target.is_file():
            target.unlink()
        elif target.is_dir():
            shutil.rmtree(target)
        if not copy:
            target.symlink_to(os.path.relpath(source, MIM))
        elif source.is_dir():
            shutil.copytree(
                source, target, ignore=shutil.ignore_patterns('__pycache__'))
        else:
            shutil.copyfile(source, target)


if __name__ == '__main__':
    fill_mim(copy=bool({'sdist', 'bdist_wheel'} & set(sys.argv)))
    setup()
    fill_mim(copy=False)  # the checkout must not keep copies that grow old
