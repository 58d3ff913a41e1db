"""Verify that training gives the same losses and weights as with effdet.

effdet 0.4.1's DetBenchTrain and our detector, with MMDetection's losses and
MMEngine's optimizer, start from the same weights and see the same batches.
Ours follows the recipe of its config; effdet's recipe is written in this
script with PyTorch's optimizer: momentum, weight decay of kernels only,
gradient clipping. In double precision, and with effdet's deviations switched
off, the losses of every step and the weights after the last step must agree
to 1e-9. Then the deviations are switched on one by one.

Example:
    python tools/proof/verify_training.py --steps 20 --out curves.png

Prints the losses, and a Markdown table of how far each deviation leads. The
exit status is 1 if the trainings without deviations differ. Rounding errors
grow with every step, and faster at a higher learning rate. At the official
learning rate, which has a row of its own, no two runs stay together for 50
steps, so the other rows use a lower one.

Needs effdet: pip install effdet==0.4.1
"""
import argparse
from contextlib import nullcontext
from importlib.metadata import version

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
        '--steps',
        type=int,
        default=50,
        help='training steps (default: %(default)s)')
    parser.add_argument(
        '--batch-size',
        type=int,
        default=4,
        help='images in each step (default: %(default)s)')
    parser.add_argument(
        '--lr',
        type=float,
        default=1e-4,
        help='largest learning rate (default: %(default)s)')
    parser.add_argument(
        '--side',
        type=int,
        default=64,
        help='height and width of the drawn images in pixels (default: '
        '%(default)s)')
    parser.add_argument(
        '--data',
        help='config whose training data is used (default: drawn images)')
    parser.add_argument(
        '--out', help='picture of the curves to write (default: none)')
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # answers --help before the libraries are imported

import matplotlib.pyplot as plt
import numpy as np
import torch
from effdet_bridge import as_effdet, effdet, effdet_network
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from terminaltables import GithubFlavoredMarkdownTable
from torch.overrides import TorchFunctionMode
from training_batches import NUM_CLASSES, batches_of, drawn_batches

from mmdet_efficientdet.utils import config_file

BOUND = 1e-9  # relative
NOTHING = 'nothing: double precision, effdet set like ours'
SINGLE = 'nothing, but both in single precision'
LOSSES = 'effdet computes its losses in single precision'
MOMENTUM = "norms of effdet's backbone have momentum 0.1, not 0.01"
DROP_PATH = 'stochastic depth, as the config of each has it'
RATE = 'nothing, but at the official learning rate'
WAYS = (NOTHING, SINGLE, LOSSES, MOMENTUM, DROP_PATH, RATE)
COLUMNS = ('class loss', 'box loss', 'weights', 'statistics')


class DoublePrecision(TorchFunctionMode):
    """Makes ``.float()``, which effdet's loss calls, double precision."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*args, **(kwargs or {}))


def learning_rates(steps, peak):
    """Warm-up in a tenth of the steps, and the official cosine."""
    warm_up = max(steps // 10, 1)
    cosine = peak * 0.5 * (1 + np.cos(np.pi * np.arange(steps) / steps))
    start = peak * np.linspace(0.05, 1, warm_up, endpoint=False)
    return [*start, *cosine[warm_up:]]


def build_ours(size, num_classes, way=NOTHING, options=None):
    """Our detector as it starts, without ImageNet weights, and its config."""
    cfg = Config.fromfile(config_file(size))
    cfg.model.backbone.init_cfg = None
    cfg.model.bbox_head.num_classes = num_classes
    if way != DROP_PATH:
        cfg.model.backbone.drop_path_rate = 0.0
    cfg.merge_from_dict(options or {})
    model = MODELS.build(cfg.model)
    torch.manual_seed(0)
    model.init_weights()
    return model.train(), cfg


def build_bench(size, side, weights, num_classes, way=NOTHING):
    """effdet's training bench, set like ours but for what ``way`` says."""
    settings = dict(num_classes=num_classes)
    if way != DROP_PATH:
        settings['backbone_args'] = dict(drop_path_rate=0.0)
    network = effdet_network(size, (side, side), **settings)
    network.load_state_dict(weights, assign=True)
    for module in network.backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and way != MOMENTUM:
            module.momentum = 0.01
    return effdet.DetBenchTrain(network, create_labeler=True).train()


def train_ours(model, batches, rates, optim_wrapper):
    """(class loss, box loss) of each step, by MMEngine's optimizer."""
    wrapper, losses = build_optim_wrapper(model, optim_wrapper), []
    for data, rate in zip(batches, rates):
        for group in wrapper.param_groups:
            group['lr'] = rate
        loss = model(**data, mode='loss')
        wrapper.update_params(model.parse_losses(loss)[0])
        losses.append([loss['loss_cls'].item(), loss['loss_bbox'].item()])
    return np.array(losses)


def train_effdet(bench, batches, rates, precision=nullcontext):
    """(class loss, box loss) of each step, by torch's optimizer."""
    kernels = [p for p in bench.parameters() if p.ndim > 1]
    others = [p for p in bench.parameters() if p.ndim <= 1]
    optimizer = torch.optim.SGD(others, lr=0, momentum=0.9)
    optimizer.add_param_group(dict(params=kernels, weight_decay=4e-5))
    losses = []
    for data, rate in zip(batches, rates):
        for group in optimizer.param_groups:
            group['lr'] = rate
        truth = [sample.gt_instances for sample in data['data_samples']]
        target = dict(
            bbox=[boxes.bboxes[:, [1, 0, 3, 2]] for boxes in truth],
            cls=[boxes.labels + 1 for boxes in truth])
        with precision():
            loss = bench(data['inputs'], target)
        optimizer.zero_grad()
        loss['loss'].backward()
        torch.nn.utils.clip_grad_norm_(bench.parameters(), 10)
        optimizer.step()
        losses.append(
            [loss['class_loss'].item(), 50 * loss['box_loss'].item()])
    return np.array(losses)


def verify(size, batches, num_classes, peak, ways=WAYS):
    """Trains both from the same start, in several ways.

    Args:
        size (str): A key of ``SCALING``.
        batches (list[dict]): One for each step.
        num_classes (int): Number of classes.
        peak (float): The largest learning rate.
        ways (Sequence[str]): Of ``WAYS``.

    Returns:
        dict: Way to the losses of both, ``(steps, 2)``, and the largest
        relative difference for each of ``COLUMNS``.
    """
    trained, found = {}, {}
    batch_size, _, side, _ = batches[0]['inputs'].shape
    for way in ways:
        rate = 0.08 * batch_size / 64 if way == RATE else peak
        rates = learning_rates(len(batches), rate)
        dtype = torch.float if way == SINGLE else torch.double
        data = [dict(x, inputs=x['inputs'].to(dtype)) for x in batches]
        ours, cfg = build_ours(size, num_classes, way)
        start = as_effdet(ours.state_dict(), size)
        bench = build_bench(size, side, start, num_classes, way)
        bench.model.to(dtype)  # anchors and targets are single in both
        key = rate, dtype, way == DROP_PATH
        if key not in trained:
            losses = train_ours(ours.to(dtype), data, rates, cfg.optim_wrapper)
            trained[key] = losses, as_effdet(ours.state_dict(), size)
        losses, state = trained[key]
        double = way not in (SINGLE, LOSSES)
        theirs = train_effdet(bench, data, rates,
                              DoublePrecision if double else nullcontext)
        differences = relative(losses, theirs).max(0)
        found[way] = losses, theirs, (*differences, *state_differences(
            state, bench.model.state_dict()))
    return found


def relative(ours, theirs):
    """The difference of losses in units of effdet's."""
    return np.abs(ours - theirs) / np.maximum(theirs, 1e-12)


def state_differences(ours, theirs):
    """The largest relative difference of weights, and of statistics."""
    parts = [], []
    for key, value in ours.items():
        # Biases before norms stay at zero, but for rounding.
        unit = theirs[key].abs().max().clamp(1e-3)
        difference = (value - theirs[key]).abs().max() / unit
        parts['running' in key].append(difference.item())
    return [np.max(part) for part in parts]


def report(found):
    """What :func:`verify` found, as two tables and whether all is equal."""
    losses, theirs, differences = found[NOTHING]
    shown = range(0, len(losses), max(len(losses) // 10, 1))
    rows = [('step', 'class loss, ours', 'box loss, ours',
             'class loss, effdet', 'box loss, effdet')]
    rows += [(step, *(f'{x:.10f}' for x in (*losses[step], *theirs[step])))
             for step in shown]
    text = GithubFlavoredMarkdownTable(rows).table
    rows = [('what differs', *COLUMNS)]
    rows += [(way, *(f'{x:.1e}' for x in found[way][-1])) for way in found]
    return (f'{text}\n\n{GithubFlavoredMarkdownTable(rows).table}',
            all(x < BOUND for x in differences))


def draw(found, path):
    """Writes a picture of the losses and of their differences."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 9), sharex=True)
    for marks, losses, who in zip('-o', found[NOTHING], ('ours', 'effdet')):
        lines = top.plot(losses, marks, mfc='none')
        for line, name, colour in zip(lines, COLUMNS, ('C0', 'C1')):
            line.set(label=f'{name}, {who}', color=colour)
    for way, (ours, theirs, _) in found.items():
        total = relative(ours.sum(1), theirs.sum(1))
        bottom.semilogy(total + 1e-17, ':' if way == MOMENTUM else '-')
    top.set(ylabel='loss')
    top.legend()
    bottom.axhline(BOUND, color='black', lw=0.5)
    bottom.set(xlabel='step', ylabel='relative difference of the sum')
    bottom.legend([*found, 'bound for the first'],
                  loc='upper left',
                  bbox_to_anchor=(0, -0.15))
    figure.savefig(path, bbox_inches='tight')


def main():
    """Trains both, and prints the tables."""
    args = parse_args()
    MMLogger.get_instance('mmengine', log_level='ERROR')
    register_all_modules()
    amount = args.batch_size, args.steps
    batches, num_classes = batches_of(args.data, *amount) if args.data else (
        drawn_batches(args.side, *amount), NUM_CLASSES)
    found = verify(args.size, batches, num_classes, args.lr)
    text, good = report(found)
    print(f'{args.size}, effdet {version("effdet")}, torch '
          f'{torch.__version__}: {args.steps} steps of {args.batch_size} '
          f'images; largest relative differences, below {BOUND:g} equal\n')
    print(text)
    if args.out:
        draw(found, args.out)
    if not good:
        raise SystemExit('verify_training.py: the trainings without '
                         'deviations are not equal')


if __name__ == '__main__':
    main()
