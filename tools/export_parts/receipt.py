"""The receipt: what was compared between PyTorch and an exported file."""
import json
import statistics
import subprocess
import time
from typing import Callable, Optional

import numpy as np
import torch

from mmdet_efficientdet.deploy.settings import DetectorSettings

from .evaluation import (Photographs, agreement, detect, fit, read_image,
                         to_image)
from .heads import Heads
from .support import Cell

# The largest difference of a head, relative to its largest value
TOLERANCE = dict(fp32=1e-3, fp16=3e-2, int8=0.5)
PACKAGES = ('python', 'torch', 'onnx', 'onnxruntime', 'openvino', 'nncf',
            'litert-torch', 'ai-edge-litert', 'ai-edge-quantizer', 'mediapipe')


@torch.no_grad()
def compare(heads: Heads, run: Callable, settings: DetectorSettings,
            photographs: Photographs, anchors: torch.Tensor, config: dict,
            tail: str) -> dict:
    """Runs both on all images, in turn, through the same resize and tail.

    Args:
        heads (Heads): The heads in PyTorch.
        run (Callable): Image to (seconds, outputs); two outputs are heads,
            three are boxes, scores and labels in pixels of the input.
        settings (DetectorSettings): Of the input.
        photographs (Photographs): Images with boxes.
        anchors (Tensor): ``(A, 4)``.
        config (dict): The ``test_cfg`` of the detector's head.
        tail (str): See :func:`detect`.

    Returns:
        dict: The part of the receipt that was measured.
    """
    largest, scale, seconds = [0.0, 0.0], [0.0, 0.0], [[], []]
    results, agreed = ({}, {}), []
    torch.set_num_threads(1)  # as the runtimes have
    for number, path in photographs.items:
        image = read_image(path)
        given, ratio = fit(image, settings)
        start = torch.from_numpy(given)
        expected, took = _timed(heads, start)
        other_took, outputs = run(given)
        seconds[0].append(took)
        seconds[1].append(other_took)
        has_heads = len(outputs) == 2
        if has_heads:
            for i in range(2):
                # np.maximum keeps NaN, max() does not.
                scale[i] = np.maximum(scale[i], abs(expected[i]).max())
                difference = abs(outputs[i] - expected[i]).max()
                largest[i] = np.maximum(largest[i], difference)
            outputs = detect(*outputs, anchors, config, tail)
        else:
            outputs = tuple(x[0] for x in outputs)
            outputs = tuple(x[outputs[1] > 0] for x in outputs)
        ours = detect(*expected, anchors, config, tail)
        agreed += agreement(ours, outputs)
        for result, rows in zip(results, (ours, outputs)):
            result[number] = to_image(rows, ratio, image.shape)
    ours, theirs = (photographs.ap(result) for result in results)
    return dict(
        images=len(results[0]),
        annotations=photographs.annotations.name,
        resize=settings.resize,
        tail=tail,
        heads={
            name: float(largest[i] / np.maximum(scale[i], 1e-30))
            for i, name in enumerate(('deltas', 'logits'))
        } if has_heads else None,
        boxes_compared=len(agreed),
        boxes_found=sum(agreed),
        ap_pytorch=round(ours, 3),
        ap_artefact=round(theirs, 3),
        # The first runs are slower.
        seconds_pytorch=statistics.median(seconds[0][2:] or seconds[0]),
        seconds_artefact=statistics.median(seconds[1][2:] or seconds[1]))


def _timed(heads: Heads, images: torch.Tensor):
    start = time.perf_counter()
    outputs = heads(images)
    seconds = time.perf_counter() - start
    return [x.numpy() for x in outputs], seconds


@torch.no_grad()
def ap_of(heads: Heads, settings: DetectorSettings, photographs: Photographs,
          anchors: torch.Tensor, config: dict) -> float:
    """The AP of PyTorch alone, with the suppression of the config."""
    results = {}
    for number, path in photographs.items:
        image = read_image(path)
        given, ratio = fit(image, settings)
        outputs = heads(torch.from_numpy(given))
        rows = detect(*outputs, anchors, config, 'soft')
        results[number] = to_image(rows, ratio, image.shape)
    return round(photographs.ap(results), 3)


def judge(measured: dict,
          precision: str,
          cell: Cell,
          max_ap_loss: Optional[float] = None) -> None:
    """The gate.

    Raises:
        ValueError: If the heads or the AP differ too much.
    """
    for name, value in (measured['heads'] or {}).items():
        if not value <= TOLERANCE[precision]:  # also refuses NaN
            raise ValueError(
                f'the {name} differ from PyTorch by {value:.2g} of their '
                f'largest value; allowed for {precision} is '
                f'{TOLERANCE[precision]:g}')
    limit = cell.max_ap_loss if max_ap_loss is None else max_ap_loss
    loss = measured['ap_pytorch'] - measured['ap_artefact']
    if precision != 'int8':
        loss = abs(loss)
    if limit is not None and not loss <= limit + 1e-9:
        raise ValueError(
            f'the AP is {measured["ap_artefact"]:.2f} in the runtime and '
            f'{measured["ap_pytorch"]:.2f} in PyTorch, and may differ by '
            f'{limit:g}. More photographs (--data) make it less random; '
            '--max-ap-loss POINTS allows more')


def versions(python: str) -> dict:
    """Versions of Python and of the packages in an environment."""
    code = ('import json, platform\n'
            'from importlib.metadata import distributions\n'
            'found = {x.name: x.version for x in distributions()}\n'
            "print(json.dumps(dict(found, python=platform.python_version())))")
    found = subprocess.run([python, '-c', code],
                           capture_output=True,
                           text=True,
                           check=True)
    found = json.loads(found.stdout)
    return {name: found[name] for name in PACKAGES if name in found}


def text(receipt: dict) -> str:
    """The receipt for people."""
    heads = receipt['heads']
    ratio = receipt['seconds_pytorch'] / receipt['seconds_artefact']
    lines = [
        f'{receipt["file"]}  {receipt["format"]} {receipt["precision"]}, '
        f'{receipt["bytes"]:,} bytes, {receipt["state"]}',
        f'size            {receipt["size"]}, input '
        f'{receipt["image_size"][0]}x{receipt["image_size"][1]}, '
        f'{receipt["num_classes"]} classes',
        f'checkpoint      {receipt["checkpoint"]} '
        f'sha256 {receipt["checkpoint_sha256"]}',
        f'compared on     {receipt["images"]} images of '
        f'{receipt["annotations"]}, resize {receipt["resize"]}, suppression '
        f'{receipt["tail"]}',
        'heads           ' +
        (', '.join(f'{name} {value:.2g}' for name, value in heads.items()) +
         ' of the largest value' if heads else 'are no outputs of this file'),
        f'boxes           {receipt["boxes_found"]} of '
        f'{receipt["boxes_compared"]} above 0.3 agree',
        f'AP              {receipt["ap_artefact"]:.2f} in the runtime, '
        f'{receipt["ap_pytorch"]:.2f} in PyTorch',
    ]
    for name, value in receipt.get('beside', {}).items():
        lines.append(f'AP, not gated   {value:.2f} {name}')
    lines += [
        f'time            {receipt["seconds_artefact"] * 1000:.1f} ms, '
        f'{ratio:.2f} times as fast as the plain network in PyTorch (one '
        'thread)',
        'versions        ' + ', '.join(f'{k} {v}'
                                       for k, v in receipt['versions'].items())
    ]
    if receipt['ap_pytorch'] < 1:
        lines.append('The AP of PyTorch is below 1, so that the comparison of '
                     'the AP proves nothing. Use a trained detector and '
                     'photographs of its kind.')
    return '\n'.join(lines) + '\n'


def dumps(receipt: dict) -> str:
    """The receipt as JSON."""
    return json.dumps(receipt, indent=1, ensure_ascii=False) + '\n'
