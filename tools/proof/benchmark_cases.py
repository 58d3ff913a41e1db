"""What benchmark.py times, as functions of one call.

Each function of this module takes the arguments of the tool, a size, the side
of its input and the networks, and returns title to name to function.
"""
from functools import partial

import effdet
import numpy as np
import torch
from benchmark_runtimes import (compiled, half, in_onnxruntime, in_openvino,
                                onnx_file)
from effdet_bridge import random_weights
from mmdet.apis import inference_detector
from mmdet.registry import TASK_UTILS, TRANSFORMS
from mmengine.optim import build_optim_wrapper
from mmengine.structures import InstanceData
from PIL import Image
from timm.utils import ModelEmaV2
from verify_training import build_bench, build_ours

from mmdet_efficientdet import ForeachEMA, plain_network
from mmdet_efficientdet.models.anchors import (AnchorGenerator, anchor_targets,
                                               match_anchors)
from mmdet_efficientdet.models.loss_guard import check_finite
from mmdet_efficientdet.models.window_matching import match_in_windows

PHOTO = (480, 640)  # height and width of the image in memory


def forward(args, size, side, networks):
    """From normalised images to the maps of the head."""
    device = networks['detector'].data_preprocessor.device
    images = torch.randn(args.batch_size, 3, side, side, device=device)
    detector, plain = networks['detector'], networks['plain']
    functions = {
        'effdet': lambda: networks['effdet'](images),
        'detector': lambda: detector(images, mode='tensor'),
        'plain network': lambda: plain(images)
    }
    if args.compile:
        title = 'plain network, compiled'
        functions[title] = compiled(plain, images, f'{size} {title}')
    if args.half:
        functions['plain network, AMP'] = half(plain, images)
    return {f'{size} forward, {side} px, batch {args.batch_size}': functions}


def runtimes(args, size, side, networks):
    """The same, exported by each project to ONNX."""
    device = networks['detector'].data_preprocessor.device
    images = torch.randn(args.batch_size, 3, side, side, device=device)
    even = plain_network(networks['detector'], even=True)
    own = even if side % even.divisor == 0 else networks['plain']
    official, data = (onnx_file(x, images) for x in (networks['effdet'], own))
    functions = {
        'effdet': lambda: networks['effdet'](images),
        'effdet, ONNX Runtime': in_onnxruntime(official, images, args.threads),
        'plain network, ONNX Runtime': in_onnxruntime(data, images,
                                                      args.threads)
    }
    openvino = in_openvino(data, images, args.threads)
    if openvino:
        functions['plain network, OpenVINO float32'] = openvino
    return {f'{size} runtimes, {side} px, batch {args.batch_size}': functions}


def sizes(args, size, side, networks):
    """effdet and ours, as used in PyTorch and in ONNX Runtime."""
    device = networks['detector'].data_preprocessor.device
    images = torch.randn(args.batch_size, 3, side, side, device=device)
    data = onnx_file(networks['plain'], images)
    return {
        f'{size} sizes, {side} px, batch {args.batch_size}': {
            'effdet':
            lambda: networks['effdet'](images),
            'plain network':
            lambda: networks['plain'](images),
            'plain network, ONNX Runtime':
            in_onnxruntime(data, images, args.threads)
        }
    }


def boxes(args, size, side, networks):
    """From an image in memory to boxes, by hard and by soft suppression."""
    photo = np.random.default_rng(0).integers(0, 256, (*PHOTO, 3), np.uint8)
    detector, found = networks['detector'], {}
    for kind in ('nms', 'soft_nms'):
        source = effdet.data.resolve_input_config({},
                                                  networks['effdet'].config)
        bench = effdet.DetBenchPredict(networks['effdet'])
        bench.soft_nms = kind == 'soft_nms'
        resize = effdet.data.transforms.ResizePad((side, side))
        mean, std = (
            torch.tensor(x).view(1, 3, 1, 1) * 255
            for x in (source['mean'], source['std']))

        def official(bench=bench, resize=resize, mean=mean, std=std):
            image, _ = resize(Image.fromarray(photo), {})
            x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
            bench(((x - mean) / std).to(next(bench.parameters()).device))

        def ours(kind=kind, fast=True):
            detector.bbox_head.test_cfg.nms = dict(type=kind)
            detector.fast_predict = fast
            inference_detector(detector, photo)

        found[f'{size} image to boxes, {kind}'] = {
            'effdet': official,
            'detector': lambda ours=ours: ours(fast=False),
            'plain network': ours
        }
    return found


def targets(args, size, side, networks):
    """Targets of one image with 100 boxes, beside ``MaxIoUAssigner``."""
    head = networks['detector'].bbox_head
    levels = range(3, 3 + head.num_levels)
    sizes = [(-(-side // 2**level), ) * 2 for level in levels]
    generator = AnchorGenerator(head.prior_generator.octave_base_scale)
    anchors = torch.cat(generator.grid_priors(sizes, (side, side)))
    corners = torch.rand(100, 2, 2).sort(1).values * side
    truth = corners.flatten(1)
    labels = torch.zeros(100, dtype=torch.long)
    valid = torch.ones(1, 100, dtype=torch.bool)
    assigner = TASK_UTILS.build(
        dict(
            type='mmdet.MaxIoUAssigner',
            pos_iou_thr=0.5,
            neg_iou_thr=0.5,
            min_pos_iou=0))
    instances = InstanceData(bboxes=truth, labels=labels)
    priors = InstanceData(priors=anchors)
    ours = [anchors, [truth], [labels], 80, head.bbox_coder]
    return {
        f'{size} targets, {len(anchors):,} anchors, 100 boxes': {
            'MaxIoUAssigner': lambda: assigner.assign(priors, instances),
            'matrix': lambda: match_anchors(anchors, truth[None], valid),
            'windows':
            lambda: match_in_windows(anchors, sizes, truth[None], valid),
            'windows, and deltas': lambda: anchor_targets(*ours, sizes)
        }
    }


def resize(args, size, side, networks):
    """A photograph by factors of 0.1 to 2, beside the host's two transforms.
    """
    photo = np.random.default_rng(0).integers(0, 256, (*PHOTO, 3), np.uint8)
    ours = [
        TRANSFORMS.build(
            dict(
                type='mmdet_efficientdet.ResizeCrop',
                image_size=side,
                ratio_range=(factor, factor))) for factor in (0.1, 0.7, 1.3, 2)
    ]
    hosts = [[
        TRANSFORMS.build(
            dict(
                type='RandomResize',
                scale=(side, side),
                ratio_range=(factor, factor),
                keep_ratio=True)),
        TRANSFORMS.build(
            dict(
                type='RandomCrop',
                crop_size=(side, side),
                allow_negative_crop=True))
    ] for factor in (0.1, 0.7, 1.3, 2)]

    def run(pipelines):
        for pipeline in pipelines:
            results = dict(img=photo, img_shape=PHOTO)
            for transform in pipeline:
                results = transform(results)

    return {
        f'{size} resize and crop, 4 images': {
            'RandomResize, RandomCrop': lambda: run(hosts),
            'ResizeCrop': lambda: run([[x] for x in ours])
        }
    }


def train(args, size, side, networks):
    """A training step of 4 images with 20 boxes each, on normalised images."""
    steps = training_steps(size, side,
                           networks['detector'].data_preprocessor.device)

    def run(stages):
        for stage in stages.values():
            stage()

    title = f'{size} training step, {side} px, batch 4, 20 boxes'
    return {title: {key: partial(run, steps[key]) for key in steps}}


def training_steps(size, side, device, ema=False):
    """The stages of a training step of effdet and of ours.

    Args:
        size (str): A key of ``SCALING``.
        side (int): Height and width of the input.
        device (str | torch.device): Where to train.
        ema (bool): Also averages the weights.

    Returns:
        dict: Name to stage to function. The stages of one network are called
        in their order.
    """
    model, config = build_ours(size, 80)
    wrapper = build_optim_wrapper(model.to(device), config.optim_wrapper)
    bench = build_bench(size, side, random_weights(size, num_classes=80), 80)
    optimizer = torch.optim.SGD(bench.to(device).parameters(), 0, 0.9)
    images = torch.randn(4, 3, side, side, device=device)
    truth = [
        InstanceData(
            bboxes=torch.rand(20, 2, 2).sort(1).values.flatten(1) * side,
            labels=torch.randint(80, (20, ))).to(device) for _ in range(4)
    ]
    metas = [dict(batch_input_shape=(side, side))] * 4
    boxes = [x.bboxes[:, [1, 0, 3, 2]] for x in truth]
    classes = [x.labels + 1 for x in truth]
    for group in wrapper.param_groups:
        group['lr'] = 0
    now = {}

    def loss():
        losses = model.bbox_head.loss_by_feat(*now.pop('ours'), truth, metas)
        check_finite(losses, model, images, [], model.max_loss)
        now['loss'] = model.parse_losses(losses)[0]

    def official_loss():
        targets = bench.anchor_labeler.batch_label_anchors(boxes, classes)
        now['loss'] = bench.loss_fn(*now.pop('effdet'), *targets)[0]

    def official_step():
        torch.nn.utils.clip_grad_norm_(bench.parameters(), 10)
        optimizer.step()
        optimizer.zero_grad()

    def step():
        wrapper.step()
        wrapper.zero_grad()

    def backward():
        now.pop('loss').backward()

    steps = dict(
        effdet=dict(
            forward=lambda: now.update(effdet=bench.model(images)),
            loss=official_loss,
            backward=backward,
            optimizer=official_step),
        detector=dict(
            forward=lambda: now.update(ours=model(images, mode='tensor')),
            loss=loss,
            backward=backward,
            optimizer=step))
    if ema:
        average, official = ForeachEMA(model), ModelEmaV2(bench)
        steps['detector']['EMA'] = lambda: average.update_parameters(model)
        steps['effdet']['EMA'] = lambda: official.update(bench)
    return steps
