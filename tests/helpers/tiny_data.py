"""A synthetic dataset, a user's config on it, and the host's own tools.

Importing this file imports neither torch nor the package, so that a process
which starts from it knows nothing of them.
"""
import json
import multiprocessing
import os
import resource
import runpy
import sys
import traceback
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
from filelock import FileLock

CONFIGS = Path(__file__).parents[2] / 'configs' / 'efficientdet'
LITE0 = CONFIGS / 'efficientdet_lite0_8xb16-300e_coco.py'
D0 = CONFIGS / 'efficientdet_d0_8xb16-300e_coco.py'
TOOLS = Path(find_spec('mmdet').origin).parent / '.mim' / 'tools'
CLASSES = ('red', 'green', 'blue')
COLOURS = ((200, 30, 30), (30, 200, 30), (30, 30, 200))  # RGB

# (height, width) and (class, x, y, width, height) of each image. The third
# has no box, and the last box of the fifth is a crowd.
IMAGES = (
    ((128, 128), ((0, 10, 10, 50, 40), (1, 70, 60, 40, 50))),
    ((96, 128), ((2, 20, 20, 60, 60), )),
    ((128, 128), ()),
    ((128, 96), ((0, 5, 60, 50, 50), (2, 50, 5, 40, 40))),
    ((128, 128), ((1, 30, 30, 45, 45), (1, 80, 10, 40, 30))),
    ((64, 128), ((0, 60, 10, 50, 45), (2, 5, 10, 40, 40))),
)
CROWD = (4, 1)  # image, box


def make_dataset(root):
    """Writes the images once, with annotations as COCO and as VOC.

    ``root`` is made to hold coco.json, ids.txt, JPEGImages and Annotations,
    the layout of a data set of VOC.
    """
    root = Path(root)
    for folder in ('JPEGImages', 'Annotations'):
        (root / folder).mkdir(parents=True)
    generator = np.random.default_rng(0)
    images, annotations = [], []
    for i, ((height, width), boxes) in enumerate(IMAGES):
        pixels = generator.integers(90, 160, (height, width, 3), np.uint8)
        objects = ''
        for j, (label, x, y, w, h) in enumerate(boxes):
            pixels[y:y + h, x:x + w] = COLOURS[label][::-1]
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=i + 1,
                    category_id=10 * label + 5,  # neither dense nor from 0
                    bbox=[x, y, w, h],
                    area=w * h,
                    iscrowd=int((i, j) == CROWD)))
            objects += (f'<object><name>{CLASSES[label]}</name><difficult>0'
                        f'</difficult><bndbox><xmin>{x + 1}</xmin><ymin>'
                        f'{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}'
                        '</ymax></bndbox></object>')
        name = f'{i + 1:06}'
        cv2.imwrite(str(root / 'JPEGImages' / f'{name}.jpg'), pixels)
        images.append(
            dict(
                id=i + 1, file_name=f'{name}.jpg', height=height, width=width))
        (root / 'Annotations' / f'{name}.xml').write_text(
            f'<annotation><size><width>{width}</width><height>{height}'
            f'</height><depth>3</depth></size>{objects}</annotation>')
    categories = [
        dict(id=10 * label + 5, name=name)
        for label, name in enumerate(CLASSES)
    ]
    (root / 'coco.json').write_text(
        json.dumps(
            dict(
                images=images, annotations=annotations,
                categories=categories)))
    (root / 'ids.txt').write_text('\n'.join(f'{i + 1:06}'
                                            for i in range(len(IMAGES))))
    return root


def write_config(path,
                 root,
                 size='lite0',
                 image_size=64,
                 classes=CLASSES,
                 extra=''):
    """Writes what a user writes to train on own data; returns the path."""
    base = LITE0 if size.startswith('lite') else D0
    # The ImageNet weights of D0 would have to be downloaded.
    init = '' if size == 'lite0' else 'backbone=dict(init_cfg=None)'
    path.write_text(f'''_base_ = {str(base)!r}

from mmdet_efficientdet.scaling import scale_config

scale_config(_base_, {size!r}, image_size={image_size}, classes={classes})
model = dict({init})
dataset = dict(
    data_root={str(root) + '/'!r},
    ann_file='coco.json',
    data_prefix=dict(img='JPEGImages/'))
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False, dataset=dataset)
val_dataloader = dict(
    num_workers=0, persistent_workers=False, dataset=dataset)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file={str(root / 'coco.json')!r})
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=2, val_interval=2)
optim_wrapper = dict(optimizer=dict(lr=0.01))
default_hooks = dict(
    logger=dict(interval=1), checkpoint=dict(interval=1, save_best=None))
randomness = dict(seed=0)
{extra}
''')
    return path


def new_process(target, *args):
    """A process that has imported the host, and not the package.

    All tests fork from one server, whose imports are set before it starts.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([
        'matplotlib.pyplot', 'mmdet.apis', 'mmdet.datasets', 'mmdet.engine',
        'mmdet.evaluation', 'mmdet.models', 'mmdet.visualization'
    ])
    return context.Process(target=target, args=args)


def run_tool(name, *args, cwd, source=None, timeout=1200):
    """Runs a script of the host, or a source text, in a process of its own.

    Args:
        name (str): Path of the script under the host's tools.
        args: Its command line.
        cwd (Path): Its working directory, which receives its output, too.
        source (str, optional): Run instead of a script.
        timeout (float): In seconds.

    Returns:
        SimpleNamespace: ``code``, the exit status, and ``output``, all that
        was printed.
    """
    log = Path(cwd) / f'{Path(name).stem}.txt'
    script = str(TOOLS / name)
    process = new_process(_run, script, [str(a) for a in args], str(cwd),
                          source, str(log), dict(os.environ))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
    return SimpleNamespace(code=process.exitcode, output=log.read_text())


@contextmanager
def files_up_to(size):
    """Larger files cannot be written, as on a full disk (errno EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def run_convert(*args, cwd):
    """Runs tools/convert_checkpoint.py as :func:`run_tool` does the host's."""
    tool = CONFIGS.parents[1] / 'tools' / 'convert_checkpoint.py'
    return run_tool(tool.name, *args, cwd=cwd, source=tool.read_text())


def _run(script, args, cwd, source, log, environ):
    # The server of processes keeps the environment of its first test.
    os.environ.clear()
    os.environ.update(environ)
    file = open(log, 'w')
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(1, 'w', buffering=1)
    os.chdir(cwd)
    sys.argv = [script, *args]
    try:
        if source is None:
            runpy.run_path(script, run_name='__main__')
        else:
            exec(compile(source, '<source>', 'exec'), {'__name__': '__main__'})
    except Exception:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
    sys.stdout.flush()


@lru_cache
def trained_run(folder):
    """One short training by the host's script, shared by all processes.

    Args:
        folder (Path): Where to put it; pytest's ``getbasetemp()``.

    Returns:
        SimpleNamespace: ``root`` of the data, ``config``, ``work_dir`` with
        epoch_1.pth and epoch_2.pth of three steps each, and ``output``.
    """
    if 'PYTEST_XDIST_WORKER' in os.environ:
        folder = folder.parent
    folder = folder / 'trained'
    run = SimpleNamespace(
        root=folder / 'data',
        config=folder / 'tiny.py',
        work_dir=folder / 'work_dir')
    log = folder / 'output.txt'
    with FileLock(f'{folder}.lock'):
        if not log.exists():
            make_dataset(run.root)
            write_config(run.config, run.root)
            done = run_tool(
                'train.py', run.config, '--work-dir', run.work_dir, cwd=folder)
            assert done.code == 0, done.output
            log.write_text(done.output)
    run.output = log.read_text()
    return run
