"""Show on this machine that the network is effdet's, to the number.

For each size effdet 0.4.1 builds its network, which gets random weights:
kernels, biases, fusion weights, scales and statistics of norms. The converter
of published weights brings them into ours, and both see the same images, even
and odd, square and oblong. What is printed, as a Markdown table, is the
largest difference of each part in units of the part's largest value; beyond
1e-5 the size fails, and the exit status is 1. A second table shows the same
weights written in the layout of each source and converted back.

Needs effdet: pip install effdet==0.4.1
"""
import argparse
import math
import sys
from importlib.metadata import version

import mmdet
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine import ProgressBar
from mmengine.config import Config

from mmdet_efficientdet.scaling import SCALING, scale_config
from mmdet_efficientdet.utils import config_file
from mmdet_efficientdet.weights.convert import build_on_meta, outline
from mmdet_efficientdet.weights.layouts import LAYOUTS
from mmdet_efficientdet.weights.matching import convert

try:
    import effdet
except ImportError as error:
    raise SystemExit(f'verify_parity.py compares with effdet ({error}). '
                     'Install it: pip install effdet==0.4.1') from error

BOUND = 1e-5
VERDICTS = ('DIFFERENT', 'equal')
PARTS = ('backbone', 'neck', 'classes', 'boxes')
# (height, width). On no level below the highest is an axis of one pixel:
# there effdet pools nothing and its sizes are not the official ones.
SIDES = ((256, 256), (320, 192), (225, 225), (193, 322))


def effdet_network(size, sides, **settings):
    """effdet's network for inputs of (height, width), without weights.

    Args:
        size (str): A key of ``SCALING``.
        sides (tuple[int]): Height and width, of which effdet builds its neck.
        settings: Other values of effdet's config.
    """
    config = effdet.get_efficientdet_config(f'tf_efficientdet_{size}')
    config.update(dict(image_size=tuple(sides), **settings))
    with torch.device('meta'):
        return effdet.EfficientDet(config, pretrained_backbone=False).eval()


def random_weights(size, seed=0, **settings):
    """Weights for effdet's network of a size, none of them trivial.

    Statistics of norms are those of noise: so values keep their magnitude
    through the deepest network, and every tensor shows in the outputs.

    Args:
        size (str): A key of ``SCALING``.
        seed (int): Of all that is random.
        settings: Other values of effdet's config.
    """
    generator = torch.Generator().manual_seed(seed)
    network = effdet_network(size, (320, 320), **settings)
    weights = {}
    for key, value in network.state_dict().items():
        new = torch.zeros(value.shape, dtype=value.dtype)
        if value.ndim == 4:
            new.normal_(0, value[0].numel()**-0.5, generator=generator)
        elif key.endswith('edge_weights'):
            new.uniform_(0.5, 1.5, generator=generator)
            new[-1] -= 0.6  # some are negative, and count as nothing
        elif key.endswith('bias'):
            new.normal_(0, 0.2, generator=generator)
        elif key.endswith('weight'):
            new.uniform_(0.5, 1.5, generator=generator)
        weights[key] = new
    network.load_state_dict(weights, assign=True)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)  # of stochastic depth, too
        network.train()(torch.randn(2, 3, 320, 320))
    return network.state_dict()


def our_network(weights, size, num_classes=90, side=None):
    """Our detector with converted weights.

    Args:
        weights (dict): State dict of effdet's network.
        size (str): A key of ``SCALING``.
        num_classes (int): Classes of those weights.
        side (int): Of the input. Defaults to the size's own.
    """
    cfg = Config.fromfile(config_file(size))
    scale_config(cfg, size, image_size=side)
    cfg.model.backbone.init_cfg = None
    cfg.model.bbox_head.num_classes = num_classes
    model = build_on_meta(cfg).eval()
    state_dict, _ = convert(weights, *outline(model))
    model.load_state_dict(state_dict, assign=True)
    # Mean and deviation are in no checkpoint.
    model.data_preprocessor = MODELS.build(cfg.model.data_preprocessor)
    model.cfg = cfg
    return model


def swap_xy(boxes, dim=1):
    """(y, x, h, w) of each anchor as (x, y, w, h), or back."""
    return boxes.unflatten(dim, (-1, 4)).index_select(
        dim + 1, torch.tensor([1, 0, 3, 2])).flatten(dim, dim + 1)


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


def in_layout(state_dict, layout, arch, num_levels):
    """Our tensors as another project stores them.

    Args:
        state_dict (dict): Ours.
        layout (Layout): One of ``LAYOUTS``.
        arch (str): Architecture of the backbone.
        num_levels (int): Number of pyramid levels.
    """
    stored = {}
    for key, value in state_dict.items():
        if layout.y_first and key.startswith('bbox_head.conv_reg.pointwise'):
            value = swap_xy(value, 0)
        values = [value]
        if layout.tensorflow:
            value = value.numpy()
            if value.ndim == 4:
                depthwise = 'depthwise' in key
                value = value.transpose((2, 3, 0, 1) if depthwise else (2, 3,
                                                                        1, 0))
            values = list(value) if key.endswith('fusion_weights') else [value]
        names = layout.names(key, arch, num_levels)
        stored.update(zip(names, values, strict=True))
    return stored


def source_difference(model, layout):
    """What changes when the weights go through a layout and back."""
    shapes, *numbers = outline(model)
    own = {
        k: v
        for k, v in model.state_dict().items()
        if not k.endswith('num_batches_tracked')
    }
    again, _ = convert(in_layout(own, layout, *numbers), shapes, *numbers)
    return max((again[k] - v).abs().max().item() for k, v in own.items())


def table(titles, rows):
    """Lines of a Markdown table."""
    rows = [list(map(str, row)) for row in [titles, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ['-' * width for width in widths])
    return [
        '| ' + ' | '.join(map(str.ljust, row, widths)) + ' |' for row in rows
    ]


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
    rows = []
    for size, (height, width), parts in outputs:
        good = all(value < BOUND for value in parts.values())
        values = [f'{value:.1e}' for value in parts.values()]
        rows.append((size, f'{height}x{width}', *values, VERDICTS[good]))
    lines = table(['size', 'sides', *PARTS, 'verdict'], rows) + ['']
    good = all(row[-1] == VERDICTS[True] for row in rows)
    rows = []
    for layout in LAYOUTS:
        found = {size: x for size, other, x in sources if other is layout}
        wrong = [size for size, value in found.items() if value]
        verdict = f'{VERDICTS[not wrong]} {", ".join(wrong)}'.rstrip()
        rows.append(
            (layout.title, len(found), f'{max(found.values()):.1e}', verdict))
        good = good and not wrong
    return lines + table(['source', 'sizes', 'difference', 'verdict'],
                         rows), good


def main():
    """Run the tool."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--size',
        nargs='+',
        default=['all'],
        choices=['all', *SCALING],
        metavar='SIZE',
        help=f'all (the default), or some of {", ".join(SCALING)}')
    args = parser.parse_args()
    register_all_modules()
    sizes = list(SCALING) if 'all' in args.size else args.size
    print(f'effdet {version("effdet")}, torch {torch.__version__}, mmdet '
          f'{mmdet.__version__}: differences relative to the largest value, '
          f'below {BOUND:g} equal\n')
    progress = ProgressBar(len(sizes) * (len(SIDES) + 1), file=sys.stderr)
    lines, good = report(*verify(sizes, progress.update))
    print(file=sys.stderr)
    print('\n'.join(lines))
    if not good:
        raise SystemExit('verify_parity.py: not everything is equal')


if __name__ == '__main__':
    main()
