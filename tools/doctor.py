"""Check that this machine can train and run detectors, or say how to fix it.

Example:
    python -m mmdet_efficientdet doctor

Prints the versions of the libraries, the hardware, the folders for weights and
their free space. Runs an operator of mmcv. Prints a command for each problem.
A version that the tests did not run with is only a warning. The exit status is
1 if there is a problem.
"""
import argparse
import importlib
import os
import platform
import shutil
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

PIP = f'{sys.executable} -m pip'
PYTHONS = ('3.10', '3.11', '3.12')
# What the tests ran with: the pins of requirements.txt, then those of onedl-*
# and the newest PyTorch that the wheels of mmcv run with.
TESTED = dict(
    setuptools=['80.9.0'],
    torch=['2.9.1', '2.12.1'],
    torchvision=['0.24.1', '0.27.1'],
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
FIX['mmpretrain'] = f'{PIP} uninstall -y mmpretrain  # it is optional'
GIGABYTE = 1e9
# The largest published file and a training's checkpoints; one batch of D0's.
SMALLEST_DISK, SMALLEST_SHARED_MEMORY = 2 * GIGABYTE, GIGABYTE


def dist(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return ''


def reason(error):
    return (str(error).strip() or repr(error)).splitlines()[0]


class Doctor:
    """Collects what is installed, and what is wrong with it.

    Attributes:
        table (dict): What is printed: name to text.
        warnings (list): What works, but not as well as it could.
        problems (list): What does not work, each with its fix.
    """

    def __init__(self):
        self.table, self.warnings, self.problems = {}, [], []

    def load(self, module):
        """Imports a module; an error becomes one of the problems."""
        try:
            return importlib.import_module(module)
        except Exception as error:  # a broken library may raise anything
            self.problems.append(f'{module} does not import '
                                 f'({reason(error)}). Fix: {FIX[module]}')

    def check_distributions(self):
        """Finds combinations that pip installs although they cannot work."""
        mmcv = dist('mmcv')
        if dist('mmcv-lite'):
            self.problems.append('mmcv-lite has no compiled operators. Fix: '
                                 f'{PIP} uninstall -y mmcv-lite && '
                                 f'{FIX["mmcv"]}')
        if mmcv and dist('mmdet') and not mmcv.startswith(('2.0.', '2.1.')):
            self.problems.append(f'mmdet refuses mmcv {mmcv}, it wants '
                                 f'>=2.0,<2.2. Fix: {FIX["mmcv"]}')
        for name in ('mmcv', 'mmengine', 'mmdet'):
            fork = 'onedl-' + name.replace('mmdet', 'mmdetection')
            if dist(name) and dist(fork):
                self.problems.append(
                    f'{name} and {fork} overwrite each other. Fix: '
                    f'{PIP} uninstall -y {name} {fork}, and install the one '
                    'you want again')

    def check_libraries(self):
        """Imports each library and compares its version with the tests'."""
        self.table['python'] = platform.python_version()
        python = '.'.join(platform.python_version_tuple()[:2])
        if python not in PYTHONS or sys.platform != 'linux':
            self.warnings.append(f'Python {PYTHONS[0]} to {PYTHONS[-1]} on '
                                 'Linux is supported; the tests ran with 3.11')
        if dist('mmengine').startswith('0.10.'):
            self.load('pkg_resources')  # mmengine does, at a `package::` base
        for name, tested in TESTED.items():
            # On a broken base mm* fails as well, and its message misleads.
            skip = self.problems and name[:2] == 'mm' and find_spec(name)
            module = None if skip else self.load(name)
            found = getattr(module, '__version__', '') or dist(name)
            self.table[name] = found or 'missing'
            if module and found.split('+')[0] not in tested:
                self.warnings.append(f'{name} {found} is untested, the tests '
                                     f'ran with {" and ".join(tested)}')

    def check_operators(self):
        """Runs an operator of mmcv on each kind of device."""
        # mmdet.apis imports mmpretrain, if it is there: one error less to read
        if find_spec('mmpretrain') and not self.load('mmpretrain'):
            return
        if not (self.load('mmcv._ext') and self.load('mmdet.apis')):
            return
        import torch
        if fault := nms_fault(torch, 'cpu'):
            self.problems.append(
                f'NMS of mmcv fails: {fault}. Fix: {FIX["mmcv"]}')
        cuda = torch.version.cuda or 'none'
        if not torch.cuda.is_available():
            self.table['GPU'] = f'none usable (torch has CUDA {cuda})'
            if Path('/dev/nvidiactl').exists():
                self.warnings.append(
                    'there is an NVIDIA GPU, but torch cannot use it: compare '
                    f'the CUDA version of nvidia-smi with that of torch, '
                    f'{cuda}, and install a torch that fits')
            return
        gpu = torch.cuda.get_device_properties(0)
        self.table['GPU'] = (
            f'{torch.cuda.device_count()} x {gpu.name}, '
            f'{gpu.total_memory / GIGABYTE:.0f} GB, CUDA {cuda}')
        if fault := nms_fault(torch, 'cuda'):
            self.warnings.append(
                f'mmcv works on the CPU only ({fault}). Hide the GPU with '
                f'CUDA_VISIBLE_DEVICES= or, with nvcc {cuda}, run '
                f'{FIX["mmcv"]}')

    def check_machine(self):
        """Cores, memory, and the folders that training and weights need."""
        cores = len(os.sched_getaffinity(0))
        pages = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
        threads = os.environ.get('OMP_NUM_THREADS', 'not set')
        self.table['CPU'] = (f'{cores} cores, {pages / GIGABYTE:.0f} GB, '
                             f'OMP_NUM_THREADS {threads}')
        cache = Path(os.environ.get('XDG_CACHE_HOME', '~/.cache')).expanduser()
        hub = Path(os.environ.get('TORCH_HOME', cache / 'torch')) / 'hub'
        weights = os.path.expanduser(
            os.environ.get('MMDET_EFFICIENTDET_WEIGHTS', ''))
        self.check_folder('downloads', hub / 'checkpoints', SMALLEST_DISK)
        if weights:
            self.table['weights'] = weights
            if not Path(weights).is_dir():
                self.problems.append(
                    f'MMDET_EFFICIENTDET_WEIGHTS is {weights!r}, which is not '
                    'a folder. Fix: unset MMDET_EFFICIENTDET_WEIGHTS, or name '
                    'the folder of your weights')
        self.check_folder('this folder', Path.cwd(), SMALLEST_DISK)
        if Path('/dev/shm').is_dir():
            self.check_folder(
                'shared memory', Path('/dev/shm'), SMALLEST_SHARED_MEMORY,
                'start the container with --shm-size=8g, or train with '
                'train_dataloader.num_workers=0')

    def check_folder(self,
                     name,
                     folder,
                     smallest,
                     advice='free some space, or use another folder'):
        """Whether a folder, or the one it will be made in, can be written."""
        there = next(f for f in (folder, *folder.parents) if os.path.exists(f))
        free = shutil.disk_usage(there).free
        self.table[name] = f'{folder}, {free / GIGABYTE:.1f} GB free'
        if not os.access(there, os.W_OK | os.X_OK):
            self.warnings.append(f'{there} cannot be written: {advice}')
        elif free < smallest:
            self.warnings.append(
                f'{there} has {free / GIGABYTE:.1f} GB free, which may be too '
                f'little (less than {smallest / GIGABYTE:.0f} GB): {advice}')

    def report(self):
        """The table, the warnings, the problems and the verdict."""
        lines = [f'{name:13} {found}' for name, found in self.table.items()]
        lines += [f'WARNING: {text}.' for text in self.warnings]
        lines += [f'PROBLEM: {text}' for text in self.problems]
        lines.append(f'{len(self.problems)} problems to fix.' if self.problems
                     else f'OK: no problems, {len(self.warnings)} warnings.')
        if self.problems and not find_spec('mmdet') and detects():
            lines.append('Training needs MMDetection. To find objects with '
                         'load_detector and detect, all is there.')
        return '\n'.join(lines)


def detects():
    """Whether what finds objects without MMDetection can be imported."""
    try:
        from mmdet_efficientdet import load_detector
    except ImportError:
        return False
    return callable(load_detector)


def nms_fault(torch, device):
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
    """Prints the report; returns the exit status."""
    argparse.ArgumentParser(
        prog='python -m mmdet_efficientdet doctor',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    warnings.simplefilter('ignore')  # those of other projects
    doctor = Doctor()
    doctor.check_distributions()
    doctor.check_libraries()
    if not doctor.problems:
        doctor.check_operators()
    doctor.check_machine()
    print(doctor.report())
    return 1 if doctor.problems else 0


if __name__ == '__main__':
    sys.exit(main())
