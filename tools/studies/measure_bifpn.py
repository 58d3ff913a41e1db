"""Measure the time of our BiFPN, of effdet's and of each kind of fusion.

effdet's neck gets our weights, and its outputs must be the same as ours. Then
all necks run in turn on one thread, forward in evaluation mode, and forward
and backward in training mode. Do not use the machine for anything else
meanwhile.

Example:
    python tools/studies/measure_bifpn.py --size d0

Prints a Markdown table of the median times of our neck, and of the times of
the other necks relative to it. The exit status is 1 if the outputs differ.

Needs effdet: pip install effdet==0.4.1
"""
import argparse
import importlib.util
import statistics
import sys
import time
from functools import partial
from pathlib import Path

from mmdet_efficientdet.scaling import SCALING


def parse_args(argv=None):
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--size',
        default='d0',
        choices=SCALING,
        metavar='SIZE',
        help=f'one of {", ".join(SCALING)} (default: d0)')
    parser.add_argument(
        '--project',
        type=Path,
        help="the folder projects/EfficientDet/efficientdet of MMDetection's "
        'repository, whose neck is then measured as well (default: none)')
    parser.add_argument(
        '--repeats',
        default=40,
        type=int,
        help='runs whose median is printed (default: %(default)s)')
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # answers --help before the libraries are imported

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from terminaltables import GithubFlavoredMarkdownTable

from mmdet_efficientdet.utils import config_file

sys.path.append(str(Path(__file__).resolve().parents[1] / 'proof'))
from effdet_bridge import (as_effdet, effdet_network, our_network,
                           random_weights)

BOUND = 1e-5  # of the outputs' errors, relative to the largest value
OTHER_FUSIONS = ('softmax', 'sum', 'unbounded', 'channel_fast_normalized')


def project_neck(folder, row, in_channels):
    """The BiFPN of a folder with MMDetection's project, of equal size."""
    # As a package, without what its own __init__ registers
    spec = importlib.util.spec_from_loader('project', None, is_package=True)
    package = importlib.util.module_from_spec(spec)
    package.__path__ = [str(folder)]
    sys.modules['project'] = package
    return importlib.import_module('project.bifpn').BiFPN(
        num_stages=row.bifpn_layers,
        in_channels=list(in_channels),
        out_channels=row.bifpn_channels)


def build_necks(size, project=None):
    """Necks of one size by their names; the first two have equal weights.

    Args:
        size (str): A key of ``SCALING``.
        project (Path, optional): See above.
    """
    row = SCALING[size]
    sides = (row.image_size, row.image_size)
    weights = random_weights(size)
    ours = our_network(weights, size)
    theirs = effdet_network(size, sides)
    theirs.load_state_dict(as_effdet(ours.state_dict(), size), assign=True)
    necks = {f'ours, {row.fusion}': ours.neck, 'effdet': theirs.fpn}
    if project:
        necks["MMDetection's project"] = project_neck(project, row,
                                                      ours.neck.in_channels)
    for fusion in OTHER_FUSIONS:
        if fusion != row.fusion:
            cfg = Config.fromfile(config_file(size)).model.neck
            necks[f'ours, {fusion}'] = MODELS.build(dict(cfg, fusion=fusion))
    return necks


def largest_error(necks, feats):
    """Of the first two necks' outputs, relative to the largest value."""
    with torch.no_grad():
        expected, found = (
            neck.eval()(list(feats)) for neck in list(necks.values())[:2])
    return max((x - y).abs().max().item() / x.abs().max().item()
               for x, y in zip(expected, found, strict=True))


def forward(neck, feats):
    """One call in evaluation mode, as when testing."""
    with torch.no_grad():
        neck(list(feats))


def forward_backward(neck, feats):
    """One call in training mode and the gradients of all weights."""
    sum(x.sum() for x in neck(list(feats))).backward()
    neck.zero_grad()


def measure(necks, feats, repeats):
    """The median seconds of both ways, all necks in turn.

    Returns:
        dict: Name of the neck to seconds forward, and forward and backward.
    """
    found = {name: [] for name in necks}
    for function, training in ((forward, False), (forward_backward, True)):
        times = {name: [] for name in necks}
        calls = {
            name: partial(function, neck.train(training), feats)
            for name, neck in necks.items()
        }
        for _ in range(repeats + 1):  # the first does not count
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
        for name, values in times.items():
            found[name].append(statistics.median(values[1:]))
    return found


def rows_of(found, necks):
    """Rows of the table: times of the first, and ratios of the others."""
    yield 'neck', 'parameters', 'forward', 'forward and backward'
    first, *_ = found.values()
    for name, times in found.items():
        parameters = sum(x.numel() for x in necks[name].parameters())
        yield (name, f'{parameters:,}',
               *(f'{1000 * own:.1f} ms'
                 if times is first else f'x {own / reference:.2f}'
                 for own, reference in zip(times, first)))


def main(argv=None):
    """Compares, measures and prints."""
    args = parse_args(argv)
    register_all_modules()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    necks = build_necks(args.size, args.project)
    side = SCALING[args.size].image_size
    feats = [
        torch.randn(1, channels, side // stride, side // stride)
        for channels, stride in zip(
            next(iter(necks.values())).in_channels, (8, 16, 32))
    ]
    error = largest_error(necks, feats)
    found = measure(necks, feats, args.repeats)
    print(GithubFlavoredMarkdownTable(list(rows_of(found, necks))).table)
    print(f'{args.size}, one image of {side} px, one thread, median of '
          f'{args.repeats}; outputs differ from effdet\'s by {error:.1e}')
    sys.exit(not error < BOUND)


if __name__ == '__main__':
    main()
