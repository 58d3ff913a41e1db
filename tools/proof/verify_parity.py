"""Verify that our networks compute the same numbers as effdet's.

For each size, effdet 0.4.1 builds its network, and all of its tensors get
random values. The converter of published weights copies them to our network,
and both networks process the same images: even and odd, square and oblong.

Example:
    python tools/proof/verify_parity.py --size d0 lite0

Prints two Markdown tables. The first shows the largest difference between the
outputs of each part, relative to the part's largest value. The second shows
what changes when our weights are written in the layout of each source and
converted back. The exit status is 1 if a difference of the first table
reaches 1e-5, or if one of the second is not zero.

Needs effdet: pip install effdet==0.4.1
"""
import argparse
import math
import sys
from importlib.metadata import version

from mmdet_efficientdet.scaling import SCALING


def parse_args(argv=None):
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--size',
        nargs='+',
        default=['all'],
        choices=['all', *SCALING],
        metavar='SIZE',
        help=f'all, or some of {", ".join(SCALING)} (default: all)')
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # answers --help before the libraries are imported

import mmdet
import torch
from effdet_bridge import (effdet_network, in_layout, our_network,
                           random_weights, swap_xy)
from mmdet.utils import register_all_modules
from mmengine import ProgressBar
from terminaltables import GithubFlavoredMarkdownTable

from mmdet_efficientdet.weights.convert import model_signature
from mmdet_efficientdet.weights.layouts import LAYOUTS
from mmdet_efficientdet.weights.matching import match

BOUND = 1e-5
VERDICTS = ('DIFFERENT', 'equal')
PARTS = ('backbone', 'neck', 'classes', 'boxes')
# (height, width). On no level below the highest is an axis of one pixel:
# there effdet pools nothing and its sizes are not the official ones.
SIDES = ((256, 256), (320, 192), (225, 225), (193, 322))


def compare(theirs, ours, image):
    """The largest difference of each part, relative to its largest value.

    Args:
        theirs (nn.Module): effdet's network.
        ours (nn.Module): Our detector with the same weights.
        image (Tensor): ``(N, 3, H, W)``.

    Returns:
        dict: Part to difference; infinite where shapes are different or
        values are not finite.
    """
    expected, got = {}, {}
    with torch.no_grad():
        expected['backbone'] = theirs.backbone(image)
        expected['neck'] = theirs.fpn(list(expected['backbone']))
        expected['classes'] = theirs.class_net(expected['neck'])
        expected['boxes'] = list(
            map(swap_xy, theirs.box_net(expected['neck'])))
        got['backbone'] = ours.backbone(image)
        got['neck'] = ours.neck(got['backbone'])
        got['classes'], got['boxes'] = ours.bbox_head(got['neck'])
    return {part: difference(got[part], expected[part]) for part in PARTS}


def difference(maps, expected):
    """The largest relative difference over several tensors."""
    if [x.shape for x in maps] != [x.shape for x in expected]:
        return math.inf
    worst = torch.stack([(a - b).abs().max() / b.abs().max()
                         for a, b in zip(maps, expected)]).max().item()
    return worst if math.isfinite(worst) else math.inf


def source_difference(model, layout):
    """What changes when the weights go through a layout and back."""
    shapes, *numbers = model_signature(model)
    own = {
        k: v
        for k, v in model.state_dict().items()
        if not k.endswith('num_batches_tracked')
    }
    again = match(in_layout(own, layout, *numbers), shapes,
                  *numbers).state_dict()
    return max((again[k] - v).abs().max().item() for k, v in own.items())


def verify(sizes, tick=lambda: None):
    """Compares networks of several sizes.

    Args:
        sizes (Sequence[str]): Keys of ``SCALING``.
        tick (Callable): Called after each step of ``len(SIDES) + 1`` for a
            size.

    Returns:
        tuple: Rows (size, sides, a difference for each part) and rows
        (size, layout, difference).
    """
    outputs, sources = [], []
    for size in sizes:
        weights = random_weights(size)
        ours = our_network(weights, size)
        for sides in SIDES:
            theirs = effdet_network(size, sides)
            theirs.load_state_dict(weights, assign=True)
            generator = torch.Generator().manual_seed(0)
            image = torch.randn(1, 3, *sides, generator=generator)
            outputs.append((size, sides, compare(theirs, ours, image)))
            tick()
        for layout in LAYOUTS:
            sources.append((size, layout, source_difference(ours, layout)))
        tick()
    return outputs, sources


def report(outputs, sources):
    """What :func:`verify` found, as two tables and whether all is equal."""
    rows = [('size', 'sides', *PARTS, 'verdict')]
    for size, (height, width), parts in outputs:
        good = all(value < BOUND for value in parts.values())
        values = [f'{value:.1e}' for value in parts.values()]
        rows.append((size, f'{height}x{width}', *values, VERDICTS[good]))
    good = all(row[-1] == VERDICTS[True] for row in rows[1:])
    text = GithubFlavoredMarkdownTable(rows).table
    rows = [('source', 'sizes', 'difference', 'verdict')]
    for layout in LAYOUTS:
        found = {size: x for size, other, x in sources if other is layout}
        wrong = [size for size, value in found.items() if value]
        verdict = f'{VERDICTS[not wrong]} {", ".join(wrong)}'.rstrip()
        rows.append(
            (layout.title, len(found), f'{max(found.values()):.1e}', verdict))
        good = good and not wrong
    return f'{text}\n\n{GithubFlavoredMarkdownTable(rows).table}', good


def main():
    """Compares the networks of all chosen sizes and prints the tables."""
    args = parse_args()
    register_all_modules()
    sizes = list(SCALING) if 'all' in args.size else args.size
    print(f'effdet {version("effdet")}, torch {torch.__version__}, mmdet '
          f'{mmdet.__version__}: differences relative to the largest value, '
          f'below {BOUND:g} equal\n')
    progress = ProgressBar(len(sizes) * (len(SIDES) + 1), file=sys.stderr)
    text, good = report(*verify(sizes, progress.update))
    print(file=sys.stderr)
    print(text)
    if not good:
        raise SystemExit('verify_parity.py: not everything is equal')


if __name__ == '__main__':
    main()
