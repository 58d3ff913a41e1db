"""Show that training is effdet's, step by step, or what makes it differ.

effdet 0.4.1's own training bench and our detector, with MMDetection's loss
and MMEngine's optimizer, start from the same weights and see the same batches.
Ours follows the recipe of its config; effdet's is written out here with
torch's optimizer: momentum, decay of kernels only, clipping. In double
precision, with all that effdet does in its own way switched off, the losses of
every step and the weights after the last agree to 1e-9, or the exit status is
1. Then one thing after the other is left as it is: the table says how far each
leads. Rounding grows with every step, and the faster the higher the learning
rate is: at the official one, which has a row of its own, no two runs stay
together for 50 steps. So the others have a lower one.

Needs effdet: pip install effdet==0.4.1
"""
import argparse
from contextlib import nullcontext
from importlib.metadata import version

import matplotlib.pyplot as plt
import numpy as np
import torch
from mmdet.registry import DATASETS, MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.structures import InstanceData
from torch.overrides import TorchFunctionMode
from verify_detections import as_effdet
from verify_parity import effdet, effdet_network, table

from mmdet_efficientdet.scaling import SCALING
from mmdet_efficientdet.utils import config_file

BOUND = 1e-9  # relative
NUM_CLASSES = 8  # of drawn images
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


def drawn_batches(side, batch_size, steps):
    """Noise with rectangles, whose colour tells their class.

    Images are ``side`` x ``side``; every fourth has no object.
    """
    draw = np.random.default_rng(0)
    colours = draw.normal(0, 2, (NUM_CLASSES, 3, 1, 1))
    batches = []
    for step in range(steps):
        images = draw.normal(0, 0.5, (batch_size, 3, side, side))
        samples = []
        for num, image in enumerate(images, step):
            sides = 8 * (side / 16)**draw.uniform(size=(num % 4, 2))
            sides = sides.round()  # so that some targets are exactly zero
            start = draw.uniform(0, side - sides).round()
            boxes = np.concatenate([start, start + sides], 1)
            labels = draw.integers(NUM_CLASSES, size=len(boxes))
            for (x1, y1, x2, y2), label in zip(boxes.astype(int), labels):
                image[:, y1:y2, x1:x2] += colours[label]
            sample = DetDataSample(
                metainfo=dict(batch_input_shape=(side, side)))
            sample.gt_instances = InstanceData(
                bboxes=torch.from_numpy(boxes).float(),
                labels=torch.from_numpy(labels))
            samples.append(sample)
        inputs = torch.from_numpy(images)
        batches.append(dict(inputs=inputs, data_samples=samples))
    return batches


def batches_of(config, batch_size, steps):
    """Batches of a config's training data, and the number of classes."""
    cfg = Config.fromfile(config)
    np.random.seed(0)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    preprocess = MODELS.build(cfg.model.data_preprocessor)
    batches = []
    for _ in range(steps):
        chosen = np.random.choice(len(dataset), batch_size, replace=False)
        data = pseudo_collate([dataset[i] for i in chosen])
        batches.append(preprocess(data, training=True))
    return batches, len(dataset.metainfo['classes'])


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
    """What :func:`verify` found, in two tables, and whether all is equal."""
    losses, theirs, differences = found[NOTHING]
    shown = range(0, len(losses), max(len(losses) // 10, 1))
    rows = [(step, *(f'{x:.10f}' for x in (*losses[step], *theirs[step])))
            for step in shown]
    lines = table(('step', 'class loss, ours', 'box loss, ours',
                   'class loss, effdet', 'box loss, effdet'), rows) + ['']
    rows = [(way, *(f'{x:.1e}' for x in found[way][-1])) for way in found]
    lines += table(('what differs', *COLUMNS), rows)
    return lines, all(x < BOUND for x in differences)


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
    """Run the tool."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--size', default='d0', choices=SCALING)
    parser.add_argument('--steps', type=int, default=50)
    parser.add_argument('--batch-size', type=int, default=4)
    parser.add_argument('--lr', type=float, default=1e-4)
    parser.add_argument(
        '--side', type=int, default=64, help='of drawn images, in pixels')
    parser.add_argument(
        '--data', help='config, whose training data replace drawn images')
    parser.add_argument('--out', help='file for a picture of the curves')
    args = parser.parse_args()
    MMLogger.get_instance('mmengine', log_level='ERROR')
    register_all_modules()
    amount = args.batch_size, args.steps
    batches, num_classes = batches_of(args.data, *amount) if args.data else (
        drawn_batches(args.side, *amount), NUM_CLASSES)
    found = verify(args.size, batches, num_classes, args.lr)
    lines, good = report(found)
    print(f'{args.size}, effdet {version("effdet")}, torch '
          f'{torch.__version__}: {args.steps} steps of {args.batch_size} '
          f'images; largest relative differences, below {BOUND:g} equal\n')
    print('\n'.join(lines))
    if args.out:
        draw(found, args.out)
    if not good:
        raise SystemExit('verify_training.py: with nothing that differs, the '
                         'trainings are not equal')


if __name__ == '__main__':
    main()
