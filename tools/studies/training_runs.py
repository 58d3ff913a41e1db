"""What compare_training.py does in a run: data, the two trainers, scores."""
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / 'tools/proof'))
import numpy as np
import torch
from effdet_bridge import as_effdet, effdet, effdet_network
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.structures import InstanceData
from training_data import evaluate, make_batches, split_backbone

from mmdet_efficientdet.scaling import scale_config
from mmdet_efficientdet.weights.convert import model_signature
from mmdet_efficientdet.weights.matching import match

RECIPE = ROOT / 'configs/efficientdet/efficientdet_d0_1xb8-adamw-1k_coco.py'
SIZE = 'lite0'


def our_settings():
    """What the recipe says of everything that VARIANTS may change."""
    cfg = Config.fromfile(RECIPE)
    optimizer = cfg.optim_wrapper.optimizer
    parts = cfg.optim_wrapper.paramwise_cfg.custom_keys
    return dict(
        trainer='ours',
        rate=optimizer.lr,
        transform='ResizeCrop',
        start='identity' if cfg.model.neck.identity_init else 'official',
        norms='fixed',  # those of the backbone that are not frozen
        drop_path=cfg.model.backbone.drop_path_rate,
        momentum=cfg.norm_cfg.momentum,  # of the norms of neck and head
        backbone=parts.backbone.lr_mult,  # its rate by that of the rest
        depthwise=1.0,  # the same of the depthwise kernels of neck and head
        betas=tuple(optimizer.get('betas', (0.9, 0.999))),
        warmup=0.1,  # of the steps: a study is shorter than the recipe
        hold=cfg.param_scheduler[0].hold,
        weight_decay=optimizer.weight_decay,
        decay='kernels',
        clip=float(cfg.optim_wrapper.clip_grad.max_norm),
        average='ramp',  # decay (1 + n) / (10 + n)
        box_loss=1.0,  # its weight by the official one
        jitter=tuple(cfg.train_pipeline[-2].ratio_range))


def build(num_classes, side, seed, settings):
    """Our detector with ImageNet weights and one start of neck and head."""
    cfg = Config.fromfile(RECIPE)
    scale_config(cfg, SIZE, side, [str(i) for i in range(num_classes)])
    cfg.model.backbone.drop_path_rate = settings['drop_path']
    cfg.model.bbox_head.loss_bbox.loss_weight *= settings['box_loss']
    for part in (cfg.model.neck, cfg.model.bbox_head):
        part.identity_init = settings['start'] == 'identity'
    model = MODELS.build(cfg.model)
    torch.manual_seed(seed)
    model.init_weights()
    if settings['start'] == 'effdet':
        config = effdet.get_efficientdet_config(f'tf_efficientdet_{SIZE}')
        config.update(dict(num_classes=num_classes))
        theirs = effdet.EfficientDet(config, pretrained_backbone=False)
        weights = as_effdet(model.state_dict(), SIZE)
        weights.update({
            key: value
            for key, value in theirs.state_dict().items()
            if not key.startswith('backbone')
        })
        load_effdet(model, weights)
    return model.train()


def load_effdet(model, weights):
    """Gives our detector the weights of effdet's."""
    model.load_state_dict(
        match(weights, *model_signature(model)).state_dict(), strict=False)


class Tail(torch.nn.Module):
    """The part of effdet's backbone that learns, behind C3 and C4."""

    def __init__(self, whole):
        super().__init__()
        self.blocks = whole.blocks[5:]
        self.__dict__['whole'] = whole  # not a part

    def forward(self, feats):
        """Adds C5."""
        return [*feats, self.blocks(feats[1])]


def our_losses(model):
    """The network that learns, and the sum of its losses for a batch."""
    tail = model.backbone.blocks[split_backbone(model):]

    def losses(feats, boxes, labels):
        x = feats[1]
        for block in tail:
            x = block(x)
        shape = [8 * n for n in feats[0].shape[2:]]
        samples = [
            DetDataSample(
                metainfo=dict(batch_input_shape=shape),
                gt_instances=InstanceData(bboxes=b, labels=c))
            for b, c in zip(boxes, labels)
        ]
        parts = model.bbox_head.loss(model.neck((*feats, x)), samples)
        return sum(parts.values())

    return torch.nn.ModuleDict(
        dict(backbone=tail, neck=model.neck, head=model.bbox_head)), losses


def effdet_losses(model, num_classes, side, drop_path):
    """The same of effdet's bench, which starts with our weights."""
    network = effdet_network(
        SIZE, (side, side),
        num_classes=num_classes,
        backbone_args=dict(drop_path_rate=drop_path))
    network.load_state_dict(as_effdet(model.state_dict(), SIZE), assign=True)
    network.backbone = Tail(network.backbone)
    bench = effdet.DetBenchTrain(network, create_labeler=True)

    def losses(feats, boxes, labels):
        target = dict(
            bbox=[b[:, [1, 0, 3, 2]] for b in boxes],
            cls=[c + 1 for c in labels])
        return bench(feats, target)['loss']

    return network, losses


def make_optimizer(network, settings):
    """AdamW; ``part`` of a group is its rate by that of the schedule."""
    groups = {}
    for name, parameter in network.named_parameters():
        part = 1.0
        if name.startswith('backbone'):
            part = settings['backbone']
        elif parameter.ndim == 4 and parameter.shape[1] == 1:
            part = settings['depthwise']
        decays = settings['decay'] == 'all' or parameter.ndim > 1
        groups.setdefault((part, decays), []).append(parameter)
    groups = [
        dict(
            params=parameters,
            weight_decay=settings['weight_decay'] * decays,
            part=part) for (part, decays), parameters in groups.items()
    ]
    return torch.optim.AdamW(groups, betas=settings['betas'])


def train(network, losses, batches, settings, rate):
    """Trains, then loads the averages; returns the mean loss at the end."""
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            backbone = name.startswith('backbone')
            module.momentum = 0.1 if backbone else settings['momentum']
            module.train(not backbone or settings['norms'] == 'batch')
        elif not list(module.children()):
            module.train()
    optimizer = make_optimizer(network, settings)
    averages = {k: v.clone() for k, v in network.state_dict().items()}
    steps, history = len(batches), []
    warmup = max(settings['warmup'] * steps, 1)
    hold = settings['hold'] * steps
    for step, batch in enumerate(batches):
        angle = np.pi * max(step - hold, 0) / (steps - hold)
        factor = min((step + 1) / warmup, 1) * (1 + np.cos(angle)) / 2
        for group in optimizer.param_groups:
            group['lr'] = rate * factor * group['part']
        loss = losses(*batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), settings['clip'])
        optimizer.step()
        history.append(loss.item())
        decay = settings['average']
        if decay == 'ramp':
            decay = min(0.9998, (1 + step) / (10 + step))
        for key, value in network.state_dict().items():
            if value.is_floating_point():
                averages[key].lerp_(value, 1 - decay)
    network.load_state_dict(averages)
    return float(np.mean(history[-steps // 10:]))


def run(args, data, settings, rate, seed, pool):
    """Trains and evaluates once.

    Args:
        args (Namespace): Of compare_training.py.
        data (tuple): What ``read_data`` returns.
        settings (dict): All of ``our_settings``, perhaps changed.
        rate (float): Peak learning rate.
        seed (int): Of the data's order and transforms and of the start.
        pool (dict): Keeps the batches of one run for the next.

    Returns:
        dict: Loss, seconds and scores.
    """
    pictures, classes = data
    model = build(len(classes), args.side, seed, settings)
    key = seed, settings['transform'], settings['jitter']
    if key not in pool:
        pool.clear()  # one needs 0.3 MB for each picture of a training
        pool[key] = make_batches(model, pictures, settings, seed, args.steps,
                                 args.side)
    torch.manual_seed(seed)
    if settings['trainer'] == 'ours':
        network, losses = our_losses(model)
    else:
        network, losses = effdet_losses(model, len(classes), args.side,
                                        settings['drop_path'])
    start = time.process_time()
    loss = train(network, losses, pool[key], settings, rate)
    seconds = time.process_time() - start
    if settings['trainer'] == 'effdet':
        network.backbone = network.backbone.whole
        load_effdet(model, network.state_dict())
    return dict(
        loss=loss, seconds=seconds, **evaluate(model, args.data[1], args.side))
