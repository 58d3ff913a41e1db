"""Builds the files of one export in a folder, and opens them."""
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Dict, Iterator, Optional

import numpy as np
import torch

from mmdet_efficientdet.deploy.network import save_plain
from mmdet_efficientdet.deploy.settings import DetectorSettings

from . import onnx_file
from .heads import Heads
from .runtimes import RuntimeProcess
from .support import SUFFIXES

ROOT = Path(__file__).resolve().parents[2]
TFLITE = ('litert', 'mediapipe', 'frigate', 'coral')
# Format: the package that its environment must have, and its extra.
NEEDS = {
    **dict.fromkeys(TFLITE, ('mediapipe', 'litert')), 'litert':
    ('litert_torch', 'litert'),
    'openvino': ('openvino', 'openvino'),
    'onnx': ('onnxruntime', 'onnx')
}


def environment() -> dict:
    """Variables of another process that runs this package's code."""
    found = dict(
        os.environ,
        PYTHONUTF8='1',  # names of classes are written and printed
        OMP_NUM_THREADS='1')
    if (ROOT / 'mmdet_efficientdet').is_dir():  # a checkout
        found['PYTHONPATH'] = str(ROOT)
    return found


def find_python(format: str, given: Optional[str]) -> str:
    """The interpreter of an environment that can write a format.

    Args:
        format (str): A key of ``FORMATS``.
        given (str, optional): The user's choice. Defaults to this one if it
            has the package, else to that of .venv-deploy.

    Raises:
        ValueError: If none has the package, with what to install.
    """
    if format not in NEEDS:
        return sys.executable
    package, extra = NEEDS[format]
    if given is None and find_spec(package):
        return sys.executable
    python = Path(given or ROOT / '.venv-deploy' / 'bin' / 'python')
    code = ('from importlib.util import find_spec; '
            f'exit(not find_spec("{package}"))')
    if python.is_file() and not subprocess.run([python, '-c', code],
                                               env=environment()).returncode:
        return str(python)
    raise ValueError(
        f'--to {format} needs the package {package}, which neither this '
        f'environment nor {python} has. ' +
        (f"Run \"pip install '.[{extra}]'\" in the checkout" if format ==
         'onnx' else 'Run "make deploy" in the checkout, or "pip '
         f"install '.[{extra}]'\" in another environment than that of "
         'MMDetection, and give its interpreter with --python'))


def build(folder: Path, format: str, precision: str, python: str,
          detector_parts: tuple, nms: str, candidates: Optional[int],
          images: Optional[np.ndarray], pt2: bool,
          dynamic: bool) -> Dict[str, Path]:
    """Builds an export; returns its files by suffix.

    Args:
        folder (Path): Gets all files; the caller removes it.
        format, precision (str): What to build.
        python (str): Interpreter that can write the format.
        detector_parts (tuple): Plain network, settings, anchors, test_cfg.
        nms (str): 'none', 'hard' or 'soft'; for ONNX.
        candidates (int, optional): For ONNX with suppression.
        images (np.ndarray, optional): For int8.
        pt2 (bool): Whether 'torch' writes an exported program, too.
        dynamic (bool): Whether 'onnx' has no fixed size.

    Raises:
        ValueError: If the exporter fails, with its last words.
    """
    network, settings, anchors, config = detector_parts
    save_plain(network, folder / 'plain.safetensors')
    settings.save(folder / 'plain.json')
    np.save(folder / 'anchors.npy', anchors.numpy())
    (folder / 'job.json').write_text(
        json.dumps(dict(format=format, precision=precision)))
    if images is not None:
        np.save(folder / 'images.npy', images)
    if format == 'torch':
        files = {s: folder / f'plain{s}' for s in ('.safetensors', '.json')}
        if pt2:
            files['.pt2'] = folder / 'plain.pt2'
            with _one_error():
                _save_program(network, settings, files['.pt2'])
        return files
    if format in ('onnx', 'openvino'):
        with _one_error():
            onnx_file.write(network, settings, str(folder / 'model.onnx'), nms,
                            anchors, config, candidates, dynamic)
    if format == 'onnx':
        return {'.onnx': folder / 'model.onnx'}
    writer = 'litert' if format in TFLITE else format
    script = Path(__file__).with_name(f'{writer}_file.py')
    done = subprocess.run([python, script, folder],
                          env=environment(),
                          capture_output=True,
                          text=True,
                          errors='replace')
    if done.returncode:
        raise ValueError(f'the exporter in {python} has failed: '
                         f'{done.stderr.strip()[-1500:]}')
    (folder / 'plain.json').rename(folder / 'model.json')
    (folder / 'model.labels.txt').write_text(
        '\n'.join(settings.classes) + '\n', encoding='utf-8')
    return {s: folder / f'model{s}' for s in SUFFIXES[format]}


@contextmanager
def _one_error() -> Iterator[None]:
    """Makes an error of PyTorch's exporters one for people."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError('the exporter of PyTorch has failed: '
                         f'{str(error).strip()[:1500]}') from error


def _save_program(network, settings: DetectorSettings, path: Path) -> None:
    """Writes raw heads as a ``.pt2`` of a fixed size and batch."""
    images = torch.zeros(1, *settings.image_size, 3, dtype=torch.uint8)
    program = torch.export.export(Heads(network, settings), (images, ))
    torch.export.save(program, str(path))


def open_runtime(kind: str, path: Path, python: str,
                 log: Path) -> RuntimeProcess:
    """Opens an exported file in the runtime of a format."""
    kind = 'litert' if kind in TFLITE else kind
    return RuntimeProcess(python, kind, str(path), environment(), str(log))
