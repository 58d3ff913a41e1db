"""Metadata is in setup.cfg; this file adds what needs code.

It fills mmdet_efficientdet/.mim, and makes the description for an index of
packages from README.md. PROJECT_URL in the environment is the address of a
file of the repository without its path, such as https://HOST/NAME/blob/v0.2.
"""
import os
import re
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
    for name in ('configs', 'tools', 'zoo', 'model-index.yml'):
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


def description(address=''):
    """README.md without links that only work in a checkout.

    Args:
        address (str): What such links start with elsewhere. If it is '',
            their texts stay, and pictures are left out.
    """
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    relative = r'\[([^]]*)\]\((?!https?://)([^)]+)\)'
    if address:
        picture = address.rstrip('/').replace('/blob/', '/raw/')
        text = re.sub(f'!{relative}', rf'![\1]({picture}/\2)', text)
        return re.sub(relative, rf'[\1]({address.rstrip("/")}/\2)', text)
    return re.sub(relative, r'\1', re.sub(f'!{relative}', '', text))


if __name__ == '__main__':
    fill_mim(copy=bool({'sdist', 'bdist_wheel'} & set(sys.argv)))
    setup(long_description=description(os.environ.get('PROJECT_URL', '')))
    fill_mim(copy=False)  # the checkout must not keep copies that grow old
