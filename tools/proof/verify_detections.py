"""Verify that we detect the same objects in a picture as effdet does.

effdet's DetBenchPredict and MMDetection's inference_detector process the same
picture with the same weights: those of one of our checkpoints, or random
weights whose scores are spread as those of a trained network. With the same
input and hard NMS in both, the detections must be equal. Then each
implementation does one step after the other in its own default way.

Example:
    python tools/proof/verify_detections.py photo.jpg --size d0 d1

Prints a Markdown table. For each step it shows how many of effdet's
detections are among ours, with the same class and an IoU of at least 0.5, and
the largest differences of their scores and boxes. The exit status is 1 if the
detections of the first step differ. What resizing costs can only be seen with
a checkpoint, because the detections of a random network change with the
smallest change of the picture.

Needs effdet: pip install effdet==0.4.1
"""
import argparse
import os

from mmdet_efficientdet.scaling import SCALING


def parse_args(argv=None):
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('picture', help='file of a photograph')
    parser.add_argument(
        '--size',
        nargs='+',
        default=['d0'],
        choices=SCALING,
        metavar='SIZE',
        help=f'some of {", ".join(SCALING)} (default: d0)')
    parser.add_argument(
        '--checkpoint',
        help='one of our checkpoints of that size (default: random weights)')
    parser.add_argument(
        '--side',
        type=int,
        help="height and width of the network's input in pixels (default: "
        "the size's own)")
    args = parser.parse_args(argv)
    if not os.path.isfile(args.picture):
        parser.error(f'{args.picture} does not exist; give the file of a '
                     'photograph')
    return args


if __name__ == '__main__':
    parse_args()  # answers --help before the libraries are imported

import numpy as np
import torch
from effdet_bridge import (as_effdet, effdet, effdet_network, our_network,
                           random_weights)
from mmdet.apis import inference_detector
from mmdet.utils import register_all_modules
from PIL import Image
from terminaltables import GithubFlavoredMarkdownTable
from torchvision.ops import box_iou

from mmdet_efficientdet.datasets.transforms import scaled_size

STEPS = ('nothing: same input, hard NMS in both',
         'effdet clips boxes, before NMS',
         'effdet resizes and pads by Pillow, in 8 bits',
         'ours does soft-NMS, as by default',
         'both do soft-NMS, effdet without +1 and by shifted boxes',
         'all defaults of both')


def is_equal(step):
    """Whether all detections are the same, but for rounding."""
    return (step['found'] == step['of'] and step['score'] < 1e-5
            and step['pixels'] < 0.01)


def spread(weights, class_maps, box_maps):
    """Makes the two predictors give scores and boxes as of trained weights.

    Args:
        weights (dict): State dict of effdet's network; changed in place.
        class_maps, box_maps (list[Tensor]): What it gives so far.
    """
    for net, maps, mean, deviation in (('class', class_maps, -5.0, 1.5),
                                       ('box', box_maps, 0.0, 0.2)):
        values = torch.cat([x.flatten() for x in maps])
        factor = deviation / values.std()
        name = f'{net}_net.predict.conv_pw'
        weights[f'{name}.weight'] *= factor
        bias = weights[f'{name}.bias']
        bias.copy_((bias - values.mean()) * factor + mean)


def effdet_input(path, config):
    """The input of effdet's own pipeline, and the scale back."""
    transforms = effdet.data.transforms
    source = effdet.data.resolve_input_config({}, config)
    fill = transforms.resolve_fill_color(source['fill_color'], source['mean'])
    picture, info = transforms.ResizePad(
        tuple(config.image_size),
        fill_color=fill)(Image.open(path).convert('RGB'), {})
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
    mean, std = (
        torch.tensor(source[key]).view(1, 3, 1, 1) * 255
        for key in ('mean', 'std'))
    return (x - mean) / std, info['img_scale']


def official_detections(model, path):
    """Our detections and the scale; as officially, one divides both axes.

    Boxes are not clipped.
    """
    model.bbox_head.test_cfg.clip_boxes = False
    model.fast_predict = False  # folded norms round otherwise
    found = inference_detector(model, path)
    size = tuple(model.cfg.test_pipeline[1].image_size for _ in range(2))
    scale = float(scaled_size(found.ori_shape, size)[0])
    boxes = found.pred_instances.bboxes
    boxes *= boxes.new_tensor(found.scale_factor).repeat(2) / scale
    return found, scale


def agreement(theirs, ours):
    """How many of effdet's detections are among ours.

    Args:
        theirs (Tensor): ``(n, 6)``: box, score, class from 1.
        ours (InstanceData): Of MMDetection.

    Returns:
        dict: ``found``, the number with a partner, which is the box of the
        same class that overlaps most, and by at least a half; ``of``, the
        number of the longer list; and the largest differences of partners, in
        ``score`` and in ``pixels``.
    """
    theirs = theirs[theirs[:, 4] > 0]  # effdet fills up with zeros
    iou = box_iou(theirs[:, :4], ours.bboxes)
    iou[theirs[:, 5:] - 1 != ours.labels] = 0
    found, score, pixels = 0, 0.0, 0.0
    for i, row in enumerate(theirs):
        best = iou[i].argmax()
        if iou[i, best] >= 0.5:
            iou[:, best] = 0
            found += 1
            score = max(score, (row[4] - ours.scores[best]).abs().item())
            pixels = max(pixels,
                         (row[:4] - ours.bboxes[best]).abs().max().item())
    longer = max(len(theirs), len(ours))
    return dict(found=found, of=longer, score=score, pixels=pixels)


@torch.no_grad()
def compare(size, path, checkpoint=None, side=None):
    """Detections of both in a picture, in steps.

    Args:
        size (str): A key of ``SCALING``.
        path (str): Of the picture.
        checkpoint (str): Of our detector of that size, whose weights effdet's
            network gets. Defaults to random weights.
        side (int): Of the input. Defaults to the size's own.

    Returns:
        dict: Step to what :func:`agreement` gives; the first is the one
        without a difference.
    """
    if checkpoint:
        weights = as_effdet(
            torch.load(checkpoint, 'cpu', weights_only=True)['state_dict'],
            size)
    else:
        weights = random_weights(size)
    num_classes = len(weights['class_net.predict.conv_pw.bias']) // 9
    ours = our_network(weights, size, num_classes, side)
    inputs = []
    ours.backbone.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0].contiguous()))
    inference_detector(ours, path)
    theirs = effdet_network(
        size, inputs[0].shape[-2:], num_classes=num_classes)
    theirs.load_state_dict(weights, assign=True)
    if not checkpoint:
        spread(weights, *theirs(inputs[0]))
        ours = our_network(weights, size, num_classes, side)
    soft, scale = official_detections(ours, path)
    ours.bbox_head.test_cfg.nms = dict(type='nms', iou_threshold=0.5)
    hard, scale = official_detections(ours, path)
    bench = effdet.DetBenchPredict(theirs)

    def detect(x, scale, clip=False, soft=False):
        bench.soft_nms = soft
        if not clip:
            boxes = bench(x)[0]
            boxes[:, :4] *= scale
            return boxes
        height, width = hard.ori_shape
        return bench(
            x,
            dict(
                img_scale=torch.tensor([scale]),
                img_size=torch.tensor([[width, height]]).float()))[0]

    same = inputs[0], 1 / scale
    own = effdet_input(path, theirs.config)
    steps = {
        STEPS[0]: (detect(*same), hard),
        STEPS[1]: (detect(*same, clip=True), hard),
        STEPS[2]: (detect(*own), hard),
        STEPS[3]: (detect(*same), soft),
        STEPS[4]: (detect(*same, soft=True), soft),
        STEPS[5]: (detect(*own, clip=True), soft)
    }
    return {
        step: agreement(boxes, found.pred_instances)
        for step, (boxes, found) in steps.items()
    }


def main():
    """Compares the detections and prints the table."""
    args = parse_args()
    register_all_modules()
    rows = [('size', 'what differs', 'found again', 'score', 'pixels')]
    good = True
    for size in args.size:
        steps = compare(size, args.picture, args.checkpoint, args.side)
        good = good and is_equal(steps[STEPS[0]])
        rows += [(size, step, f'{x["found"]} of {x["of"]}',
                  f'{x["score"]:.1e}', f'{x["pixels"]:.1e}')
                 for step, x in steps.items()]
    print(GithubFlavoredMarkdownTable(rows).table)
    if not good:
        raise SystemExit('verify_detections.py: the detections differ '
                         'although input and suppression are the same')


if __name__ == '__main__':
    main()
