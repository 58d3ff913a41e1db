"""The support matrix: which size goes to which format, and what is proved.

It imports neither torch nor mmdet, so a combination that is blocked is
refused at once.
"""
from dataclasses import dataclass
from typing import Tuple

from mmdet_efficientdet.scaling import SCALING

D = tuple(size for size in SCALING if size.startswith('d'))
LITE = tuple(size for size in SCALING if size.startswith('lite'))
CUSTOM = 'custom'  # a model whose widths are in no row of SCALING
SIZES = (*SCALING, CUSTOM)
# Format: its precisions, the first of which is the default; what it writes.
FORMATS = dict(
    torch=(('fp32', ), 'the plain network: .safetensors and .json'),
    onnx=(('fp32', ), '.onnx: raw heads, or boxes with --nms'),
    openvino=(('fp32', 'fp16', 'int8'), '.xml and .bin: raw heads'),
    litert=(('fp32', 'fp16', 'int8'), '.tflite: raw heads'),
    mediapipe=(('fp32', 'fp16', 'int8'),
               '.tflite: raw heads, with labels and anchors'),
    frigate=(('int8', ), '.tflite: boxes, classes, scores and count'),
    coral=(('int8', ), 'the same file as frigate'),
    tensorrt=(('fp32', ), 'no file'),
    executorch=(('fp32', ), 'no file'))
SUFFIXES = dict(
    torch=('.safetensors', '.json'),
    onnx=('.onnx', ),
    openvino=('.xml', '.bin', '.json'),
    litert=('.tflite', '.json'),
    mediapipe=('.tflite', ),
    frigate=('.tflite', '.labels.txt'),
    coral=('.tflite', '.labels.txt'))


@dataclass(frozen=True)
class Cell:
    """One combination.

    Args:
        state (str): 'validated' if an AP was measured in the runtime,
            'available' if not, 'blocked' if it is refused.
        reason (str): Why it is in this state; for 'blocked' also the way out.
        max_ap_loss (float, optional): Points of AP, of 100, that an export may
            lose; None if the loss is only reported.
    """
    state: str
    reason: str
    max_ap_loss: float = 0.1


_RUN = 'AP measured in the runtime, see docs/deploy.md'
_HOLDS = 'same code as a validated size; AP not measured'
_UNSEEN = 'not compiled for the Edge TPU, nor run on a Coral'
_FLOATS = ('fp32', 'fp16')
# Formats, precisions, sizes, cell: the first row that fits counts.
_ROWS = (
    (('executorch', ), None, None,
     Cell('blocked', 'the outputs of ExecuTorch 1.5.1 are wrong by 14.7, for '
          'an unknown reason; use --to torch --pt2, or --to litert')),
    (('tensorrt', ), None, None,
     Cell('blocked', 'no engine can be built without a GPU; write --to onnx '
          '--nms hard --candidates 3840 and give that file to trtexec')),
    (None, _FLOATS, ('lite0', ), Cell('validated', _RUN)),
    (None, _FLOATS, None, Cell('available', _HOLDS)),
    (None, None, (*D, CUSTOM),
     Cell('available', 'AP not measured; the loss is reported, not limited',
          max_ap_loss=None)),
    (('coral', ), None, ('lite3x', ),
     Cell('available', _UNSEEN, max_ap_loss=0.8)),
    (('coral', ), None, None, Cell('available', _UNSEEN, max_ap_loss=0.4)),
    (('frigate', ), None, ('lite0', ),
     Cell('validated', 'AP measured in LiteRT; not run in Frigate itself',
          max_ap_loss=0.4)),
    (None, None, ('lite0', ), Cell('validated', _RUN, max_ap_loss=0.4)),
    (None, None, ('lite3x', ), Cell('available', _HOLDS, max_ap_loss=0.8)),
    (None, None, None, Cell('available', _HOLDS, max_ap_loss=0.4)),
)  # yapf: disable


def cell(size: str, format: str, precision: str) -> Cell:
    """The cell of a combination.

    Raises:
        ValueError: If the combination does not exist.
    """
    if format not in FORMATS:
        raise ValueError(f'--to {format} must be one of {", ".join(FORMATS)}')
    precisions = FORMATS[format][0]
    if precision not in precisions:
        raise ValueError(f'--to {format} has no precision {precision}; '
                         f'allowed is {", ".join(precisions)}')
    for *keys, found in _ROWS:
        if all(key is None or value in key
               for key, value in zip(keys, (format, precision, size))):
            return found
    raise AssertionError((size, format, precision))


def check(size: str, format: str, precision: str) -> Cell:
    """The cell of a combination that is not blocked.

    Raises:
        ValueError: If it is blocked, with the way out.
    """
    found = cell(size, format, precision)
    if found.state == 'blocked':
        raise ValueError(f'--to {format} is blocked: {found.reason}')
    return found


def rows() -> Tuple[Tuple[str, ...], ...]:
    """Format, precision, state, sizes and reason; equal sizes together."""
    found = {}
    for format, (precisions, _) in FORMATS.items():
        for precision in precisions:
            for size in SIZES:
                one = cell(size, format, precision)
                key = format, precision, one.state, one.reason
                found.setdefault(key, []).append(size)
    return tuple(
        (*key[:3], _span(sizes), key[3]) for key, sizes in found.items())


def _span(sizes) -> str:
    """Names of sizes, the families as one word."""
    text = ' '.join(sizes)
    for family, word in ((SIZES, 'all'), (D, 'd0-d7x'), (LITE, 'lite0-lite4')):
        text = text.replace(' '.join(family), word)
    return text


def table() -> str:
    """The matrix as text, for ``--help``."""
    lines = [('format', 'precision', 'state', 'sizes', 'reason'), *rows()]
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    return '\n'.join(
        '  '.join([*(text.ljust(n) for text, n in zip(line, widths)), line[4]])
        for line in lines)
