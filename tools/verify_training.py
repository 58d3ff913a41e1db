"""Show that training is effdet's, step by step, or what makes it differ.

effdet's own training bench and our detector, through MMDetection's loss and
MMEngine's optimizer wrapper, start from the same weights and see the same
batches. The recipe is the official one: ours as our config says it, effdet's
written out here with torch's optimizer. In double precision and with all that
effdet does in its own way switched off, both losses agree in every step, and
all weights after it, or the exit status is 1. Then one thing after the other
is switched on, and both are trained in single precision, where rounding
grows: the table says how far that leads.

Needs effdet: pip install effdet==0.4.1
"""
import argparse
import math
from collections import defaultdict
from contextlib import nullcontext

import matplotlib.pyplot as plt
import numpy as np
import torch
from mmdet.registry import DATASETS, MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch.overrides import TorchFunctionMode
from verify_parity import effdet, effdet_network, in_layout, table

from mmdet_efficientdet.conversion.layouts import LAYOUTS
from mmdet_efficientdet.scaling import SCALING
from mmdet_efficientdet.utils import config_file

BOUND = 1e-9  # relative; differences of 1e-16 grow with every step
NOTHING = 'nothing: double precision, effdet set like ours'
SINGLE = 'nothing, but both in single precision'
# What each has in its own way, and how it is left so.
SOURCES = {
    'effdet computes its losses in single precision': 'precision',
    'norms of effdet\'s backbone have momentum 0.1, not 0.01': 'momentum',
    'stochastic depth, as the config of each has it': 'drop_path',
}
NUM_CLASSES = 8  # of drawn images
COLUMNS = ('class loss', 'box loss', 'weights', 'statistics')


class DoublePrecision(TorchFunctionMode):
    """Makes ``.float()`` mean double precision, which effdet's loss calls."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            return args[0].double()
        return func(*args, **(kwargs or {}))


def learning_rate(step, steps, peak):
    """Warm-up in a tenth of the steps, and the official cosine."""
    warm_up = max(steps // 10, 1)
    if step < warm_up:
        return peak * (0.05 + 0.95 * step / warm_up)
    return peak * 0.5 * (1 + math.cos(math.pi * step / steps))


def drawn_batches(side, batch_size, steps, num_classes=NUM_CLASSES):
    """Noise with rectangles, whose colour tells their class.

    Every fourth image has no object.

    Args:
        side (int): Of the square images, in pixels.
        batch_size (int): Images of a batch.
        steps (int): Number of batches.
        num_classes (int): Number of classes.

    Returns:
        list[dict]: ``inputs`` and ``data_samples`` of each batch.
    """
    draw = np.random.default_rng(0)
    colours = draw.normal(0, 2, (num_classes, 3))
    batches = []
    for step in range(steps):
        images = draw.normal(0, 0.5, (batch_size, 3, side, side))
        samples = []
        for i, image in enumerate(images):
            num = (step + i) % 4
            sides = np.exp(draw.uniform(np.log(8), np.log(side / 2), (num, 2)))
            start = draw.uniform(0, side - sides)
            boxes = np.concatenate([start, start + sides], 1)
            labels = draw.integers(num_classes, size=num)
            for (x1, y1, x2, y2), label in zip(boxes.astype(int), labels):
                image[:, y1:y2, x1:x2] += colours[label, :, None, None]
            samples.append(sample_of(boxes, labels, (side, side)))
        batches.append(
            dict(
                inputs=torch.from_numpy(images).float(), data_samples=samples))
    return batches


def sample_of(boxes, labels, size):
    """Boxes of an image, as MMDetection's heads get them."""
    return DetDataSample(
        gt_instances=InstanceData(
            bboxes=torch.from_numpy(boxes).float(),
            labels=torch.from_numpy(labels)),
        metainfo=dict(img_shape=size, batch_input_shape=size))


def batches_of(config, batch_size, steps):
    """Batches of the training data of a config, and how many classes."""
    cfg = Config.fromfile(config)
    init_default_scope('mmdet')
    np.random.seed(0)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    preprocess = MODELS.build(cfg.model.data_preprocessor)
    batches = []
    for step in range(steps):
        images = np.random.choice(len(dataset), batch_size, replace=False)
        batches.append(
            preprocess(pseudo_collate([dataset[i] for i in images]), True))
    return batches, len(dataset.metainfo['classes'])


def build_ours(size, num_classes, options=None):
    """Our detector as it starts, without ImageNet weights, and its config.

    Args:
        size (str): A key of ``SCALING``.
        num_classes (int): Number of classes.
        options (dict): Other values of the config.
    """
    cfg = Config.fromfile(config_file(size))
    cfg.merge_from_dict({
        'model.backbone.init_cfg': None,
        'model.bbox_head.num_classes': num_classes,
        **(options or {})
    })
    model = MODELS.build(cfg.model)
    torch.manual_seed(0)
    model.init_weights()
    return model.train(), cfg


def build_bench(size, side, weights, num_classes, own=()):
    """effdet's training bench with our weights, set like ours.

    Args:
        size (str): A key of ``SCALING``.
        side (int): Of the square input, in pixels.
        weights (dict): Under effdet's names.
        num_classes (int): Number of classes.
        own (Sequence[str]): What is left as effdet has it, of ``SOURCES``.
    """
    settings = {} if 'drop_path' in own else dict(
        backbone_args=dict(drop_path_rate=0.0))
    network = effdet_network(
        size, (side, side), num_classes=num_classes, **settings)
    network.load_state_dict(weights, assign=True)
    for module in network.backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and 'momentum' not in own:
            module.momentum = 0.01
    return effdet.DetBenchTrain(network, create_labeler=True).train()


def as_effdet(model, size):
    """Our weights and statistics, copied, under effdet's names."""
    layout, = (layout for layout in LAYOUTS if layout.title == 'effdet')
    own = {
        k: v.clone()
        for k, v in model.state_dict().items() if 'num_batches' not in k
    }
    row = SCALING[size]
    return in_layout(own, layout, row.backbone, row.num_levels)


def train_ours(model, batches, rates, optim_wrapper):
    """(class loss, box loss) of each step, by MMEngine's optimizer wrapper."""
    wrapper, losses = build_optim_wrapper(model, optim_wrapper), []
    for data, rate in zip(batches, rates):
        for group in wrapper.param_groups:
            group['lr'] = rate
        found = model(**data, mode='loss')
        wrapper.update_params(model.parse_losses(found)[0])
        losses.append([found['loss_cls'].item(), found['loss_bbox'].item()])
    return np.array(losses)


def train_effdet(bench, batches, rates, precision):
    """(class loss, box loss) of each step, by torch's optimizer.

    Only kernels, which have more than one axis, decay.

    Args:
        bench (nn.Module): effdet's.
        batches (list[dict]): As for ours.
        rates (list[float]): Learning rate of each step.
        precision (ContextManager): Around the forward pass.
    """
    parameters, losses = defaultdict(list), []
    for parameter in bench.parameters():
        parameters[parameter.ndim > 1].append(parameter)
    optimizer = torch.optim.SGD([
        dict(params=parameters[True], weight_decay=4e-5),
        dict(params=parameters[False], weight_decay=0)
    ],
                                lr=0,
                                momentum=0.9)
    for data, rate in zip(batches, rates):
        for group in optimizer.param_groups:
            group['lr'] = rate
        truth = [sample.gt_instances for sample in data['data_samples']]
        with precision:
            found = bench(
                data['inputs'],
                dict(
                    bbox=[gt.bboxes[:, [1, 0, 3, 2]] for gt in truth],
                    cls=[gt.labels + 1 for gt in truth]))
        optimizer.zero_grad()
        found['loss'].backward()
        torch.nn.utils.clip_grad_norm_(bench.parameters(), 10)
        optimizer.step()
        losses.append(
            [found['class_loss'].item(), 50 * found['box_loss'].item()])
    return np.array(losses)


def verify(size, batches, num_classes, peak=0.02, options=None, rows=None):
    """Trains both, in each way.

    Args:
        size (str): A key of ``SCALING``.
        batches (list[dict]): ``inputs`` and ``data_samples`` of each step.
        num_classes (int): Number of classes.
        peak (float): The largest learning rate.
        options (dict): Other values of our config.
        rows (Sequence[str]): Which ways. Defaults to all.

    Returns:
        dict: Way to the losses ``ours`` and ``effdet``, (steps, 2), and the
        largest relative ``differences`` over all steps and all tensors, one
        for each of ``COLUMNS``.
    """
    rates = [learning_rate(i, len(batches), peak) for i in range(len(batches))]
    side, trained, found = batches[0]['inputs'].shape[-1], {}, {}
    for row in rows or (NOTHING, SINGLE, *SOURCES):
        own = SOURCES.get(row, '')
        dtype = torch.float if row is SINGLE else torch.double
        data = [
            dict(batch, inputs=batch['inputs'].to(dtype)) for batch in batches
        ]
        rate = {} if own == 'drop_path' else {
            'model.backbone.drop_path_rate': 0.0
        }
        model, cfg = build_ours(size, num_classes, {**rate, **(options or {})})
        bench = build_bench(size, side, as_effdet(model, size), num_classes,
                            (own, ))
        bench.model.to(dtype)  # anchors and targets stay single in both
        key = dtype, cfg.model.backbone.get('drop_path_rate')
        if key not in trained:
            losses = train_ours(
                model.to(dtype), data, rates, cfg.optim_wrapper)
            trained[key] = losses, as_effdet(model, size)
        ours, weights = trained[key]
        single = row is SINGLE or own == 'precision'
        theirs = train_effdet(bench, data, rates,
                              nullcontext() if single else DoublePrecision())
        found[row] = dict(
            ours=ours,
            effdet=theirs,
            differences=(*relative(ours, theirs).max(0), *state_differences(
                weights, bench.model.state_dict())))
    return found


def relative(ours, theirs):
    """Difference of two losses that are not negative, in units of effdet's."""
    return np.abs(ours - theirs) / np.maximum(theirs, 1e-12)


def state_differences(ours, theirs):
    """The largest relative difference of weights, and of statistics."""
    parts = [], []
    for key, value in ours.items():
        difference = (value - theirs[key]).abs().max()
        # Biases before norms stay at zero, but for rounding.
        parts['running' in key].append(
            (difference / theirs[key].abs().max().clamp(1e-3)).item())
    return [float(np.max(part)) for part in parts]


def report(found):
    """What :func:`verify` found, as a table and whether all is equal."""
    rows = [(row, *(f'{value:.1e}' for value in x['differences']))
            for row, x in found.items()]
    good = all(value < BOUND for value in found[NOTHING]['differences'])
    return table(('what differs', *COLUMNS), rows), good


def draw(found, path):
    """Writes a picture of the losses and of their differences."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 9), sharex=True)
    first = found[NOTHING]
    for i, name in enumerate(COLUMNS[:2]):
        line, = top.plot(first['ours'][:, i], label=f'{name}, ours')
        top.plot(
            first['effdet'][:, i],
            'o',
            mfc='none',
            color=line.get_color(),
            label=f'{name}, effdet')
    for row, x in found.items():
        total = relative(x['ours'].sum(1), x['effdet'].sum(1))
        bottom.semilogy(total.clip(1e-17), label=row)
    bottom.axhline(BOUND, color='black', ls=':', label='bound of the first')
    top.set(ylabel='loss')
    bottom.set(xlabel='step', ylabel='relative difference of the sum')
    for axes in (top, bottom):
        axes.legend(fontsize='small')
    figure.tight_layout()
    figure.savefig(path)


def main():
    """Run the tool."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--size', default='d0', choices=SCALING, help='d0 by default')
    parser.add_argument('--steps', type=int, default=50, help='50 by default')
    parser.add_argument(
        '--batch-size', type=int, default=2, help='2 images by default')
    parser.add_argument(
        '--side', type=int, default=128, help='of drawn images, 128 px')
    parser.add_argument(
        '--data', help='a config, whose training data are then taken')
    parser.add_argument('--out', help='a file for the picture of both curves')
    args = parser.parse_args()
    register_all_modules()
    if args.data:
        batches, num_classes = batches_of(args.data, args.batch_size,
                                          args.steps)
    else:
        batches, num_classes = drawn_batches(args.side, args.batch_size,
                                             args.steps), NUM_CLASSES
    found = verify(args.size, batches, num_classes)
    lines, good = report(found)
    print(f'{args.size}, {args.steps} steps: largest relative difference; '
          f'below {BOUND:g} in the first row is equal\n')
    print('\n'.join(lines))
    if args.out:
        draw(found, args.out)
    if not good:
        raise SystemExit('verify_training.py: the same recipe, weights and '
                         'data train differently')


if __name__ == '__main__':
    main()
