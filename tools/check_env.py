"""Check that the installed libraries work together, or say how to fix them.

Example:
    python -m mmdet_efficientdet check_env

Prints one table of versions, runs an operator of mmcv, and prints a command
for each problem. A version that the tests did not run with is only a warning.
The exit status is 1 if there is a problem.
"""
import argparse
import importlib
import platform
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

PIP = f'{sys.executable} -m pip'
PYTHONS = ('3.10', '3.11', '3.12')
# What the tests ran with: the pins of requirements.txt, then the onedl-* ones.
TESTED = dict(
    setuptools=['80.9.0'],
    torch=['2.9.1'],
    torchvision=['0.24.1'],
    numpy=['2.4.6'],
    cv2=['5.0.0'],
    pycocotools=['2.0.11'],
    mmengine=['0.10.7', '0.10.12'],
    mmcv=['2.1.0', '2.3.6'],
    mmdet=['3.3.0', '3.5.1'])
FIX = {name: f'{PIP} install {name}=={v[0]}' for name, v in TESTED.items()}
FIX['pkg_resources'] = FIX['setuptools']  # dropped by setuptools 82
# The windowed OpenCV needs libGL, which a bare Linux does not have.
FIX['cv2'] = (f'{PIP} uninstall -y opencv-python && '
              f'{PIP} install --force-reinstall opencv-python-headless')
# In pip's isolated build mmcv sees no torch and leaves its operators out.
FIX['mmcv'] = FIX['mmcv._ext'] = (
    f'{PIP} install setuptools==80.9.0 wheel ninja && MMCV_WITH_OPS=1 {PIP} '
    'install --no-build-isolation --no-deps --force-reinstall --no-cache-dir '
    'mmcv==2.1.0')
FIX['mmdet.apis'] = FIX['mmdet']
problems, cautions = [], []


def dist(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return ''


def reason(error):
    return (str(error).strip() or repr(error)).splitlines()[0]


def load(module):
    """Imports a module; an error becomes one of the problems."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken library may raise anything
        problems.append(f'{module} does not import ({reason(error)}). Fix: '
                        f'{FIX[module]}')


def check_distributions():
    """Finds combinations that pip installs although they cannot work."""
    mmcv = dist('mmcv')
    if dist('mmcv-lite'):
        problems.append('mmcv-lite has no compiled operators. Fix: '
                        f'{PIP} uninstall -y mmcv-lite && {FIX["mmcv"]}')
    if mmcv and dist('mmdet') and not mmcv.startswith(('2.0.', '2.1.')):
        problems.append(f'mmdet refuses mmcv {mmcv}, it wants >=2.0,<2.2. '
                        f'Fix: {FIX["mmcv"]}')
    for name in ('mmcv', 'mmengine', 'mmdet'):
        fork = 'onedl-' + name.replace('mmdet', 'mmdetection')
        if dist(name) and dist(fork):
            problems.append(f'{name} and {fork} overwrite each other. Fix: '
                            f'{PIP} uninstall -y {name} {fork}, and install '
                            'the one you want again')


def check_nms(torch, device):
    """Runs one operator of mmcv; returns what is wrong with its answer."""
    boxes = torch.tensor([[0., 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]])
    scores = torch.tensor([.8, .9, .7])
    try:
        nms = importlib.import_module('mmcv.ops').nms
        kept = nms(boxes.to(device), scores.to(device), .5)[1].tolist()
    except Exception as error:
        return reason(error)
    return '' if kept == [1, 2] else f'it keeps boxes {kept}, not [1, 2]'


def main():
    """Prints the table; returns the exit status."""
    argparse.ArgumentParser(
        prog='python -m mmdet_efficientdet check_env',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    warnings.simplefilter('ignore')  # those of other projects
    check_distributions()
    table = dict(python=platform.python_version())
    python = '.'.join(platform.python_version_tuple()[:2])
    if python not in PYTHONS or sys.platform != 'linux':
        cautions.append(f'Python {PYTHONS[0]} to {PYTHONS[-1]} on Linux is '
                        'supported; the tests ran with 3.11')
    if dist('mmengine').startswith('0.10.'):
        load('pkg_resources')  # mmengine does, at a `package::` base config
    for name, tested in TESTED.items():
        # On a broken base mm* fails as well, and its message misleads.
        skip = problems and name[:2] == 'mm' and find_spec(name)
        module = None if skip else load(name)
        found = getattr(module, '__version__', '') or dist(name)
        table[name] = found or 'missing'
        if module and found.split('+')[0] not in tested:
            cautions.append(f'{name} {found} is untested, the tests ran with '
                            f'{" and ".join(tested)}')
    if not problems and load('mmcv._ext') and load('mmdet.apis'):
        import torch
        cuda = torch.cuda.is_available()
        table['cuda'] = f'{torch.version.cuda}, usable: {cuda}'
        if fault := check_nms(torch, 'cpu'):
            problems.append(f'NMS of mmcv fails: {fault}. Fix: {FIX["mmcv"]}')
        if cuda and (fault := check_nms(torch, 'cuda')):
            cautions.append(f'mmcv works on the CPU only ({fault}). Hide the '
                            'GPU with CUDA_VISIBLE_DEVICES= or, with nvcc '
                            f'{torch.version.cuda}, run {FIX["mmcv"]}')

    lines = [f'{name:12} {found}' for name, found in table.items()]
    lines += [f'WARNING: {text}.' for text in cautions]
    lines += [f'PROBLEM: {text}' for text in problems]
    lines.append(f'{len(problems)} problems to fix.' if problems else
                 f'OK: no problems, {len(cautions)} warnings.')
    print('\n'.join(lines))
    return 1 if problems else 0


if __name__ == '__main__':
    sys.exit(main())
