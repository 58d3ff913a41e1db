"""The pictures of compare_training.py, as both trainers get them."""
import json
import random

import cv2
import numpy as np
import torch
from effdet.data.transforms import RandomFlip, RandomResizePad
from mmcv.transforms import Compose
from mmdet.registry import TRANSFORMS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

BATCH_SIZE = 8


def read_data(file):
    """Pictures (h, w, 3) BGR, boxes (n, 4) xyxy and classes of a file."""
    coco = json.loads(file.read_text())
    classes = [category['id'] for category in coco['categories']]
    found = {image['id']: ([], []) for image in coco['images']}
    for annotation in coco['annotations']:
        x, y, w, h = annotation['bbox']
        boxes, labels = found[annotation['image_id']]
        boxes.append((x, y, x + w, y + h))
        labels.append(classes.index(annotation['category_id']))
    return [(cv2.imread(str(file.parent / 'images' / image['file_name'])),
             np.array(found[image['id']][0], np.float32).reshape(-1, 4),
             np.array(found[image['id']][1], np.int64))
            for image in coco['images']], classes


def our_transform(side, jitter):
    """Flip and ResizeCrop of the recipe; pixels as float32."""
    transforms = Compose([
        TRANSFORMS.build(dict(type='RandomFlip', prob=0.5)),
        TRANSFORMS.build(
            dict(
                type='mmdet_efficientdet.ResizeCrop',
                image_size=side,
                ratio_range=jitter))
    ])

    def transform(picture, boxes, labels):
        result = transforms(
            dict(
                img=picture,
                img_shape=picture.shape[:2],
                gt_bboxes=HorizontalBoxes(torch.from_numpy(boxes.copy())),
                gt_bboxes_labels=labels))
        return (result['img'], result['gt_bboxes'].tensor,
                torch.from_numpy(result['gt_bboxes_labels']))

    return transform


def effdet_transform(side, jitter):
    """Flip and RandomResizePad of effdet, filled with the mean."""
    flip = RandomFlip(horizontal=True, prob=0.5)
    resize = RandomResizePad(side, jitter, fill_color=(127, 127, 127))

    def transform(picture, boxes, labels):
        image = Image.fromarray(picture[..., ::-1])
        truth = dict(bbox=boxes[:, [1, 0, 3, 2]], cls=labels)
        image, truth = resize(*flip(image, truth))
        return (np.array(image)[..., ::-1],
                torch.from_numpy(truth['bbox'][:, [1, 0, 3, 2]]),
                torch.from_numpy(truth['cls']))

    return transform


def to_input(model, images):
    """The preprocessor's batch of pictures (h, w, 3) BGR."""
    data = dict(
        inputs=[
            torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1)))
            for x in images
        ],
        data_samples=[DetDataSample(metainfo=dict(img_shape=x.shape[:2]))
                      for x in images])  # yapf: disable
    return model.data_preprocessor(data)['inputs']


def split_backbone(model):
    """The frozen blocks of our backbone, and the number of those."""
    return model.backbone.level_ends[4] + 1


@torch.no_grad()
def frozen_features(model, inputs):
    """C3 and C4, which no training changes."""
    x, outs = model.backbone.stem(inputs), {}
    for i, block in enumerate(model.backbone.blocks[:split_backbone(model)]):
        outs[i] = x = block(x)
    return outs[model.backbone.level_ends[3]], x


def make_batches(model, pictures, settings, seed, steps, side):
    """Of each step: features of the frozen part, boxes and classes."""
    make = dict(ResizeCrop=our_transform, RandomResizePad=effdet_transform)
    transform = make[settings['transform']](side, settings['jitter'])
    random.seed(seed)
    np.random.seed(seed)
    order = np.random.default_rng(seed)
    queue, batches = [], []
    for _ in range(steps):
        while len(queue) < BATCH_SIZE:
            queue += order.permutation(len(pictures)).tolist()
        images, boxes, labels = zip(*(transform(*pictures[i])
                                      for i in queue[:BATCH_SIZE]))
        del queue[:BATCH_SIZE]
        feats = frozen_features(model, to_input(model, images))
        batches.append((feats, boxes, labels))
    return batches


@torch.no_grad()
def evaluate(model, file, side):
    """AP, AP50 and AP of small objects by pycocotools."""
    model.eval()
    pictures, classes = read_data(file)
    resize = TRANSFORMS.build(
        dict(type='mmdet_efficientdet.ResizeCrop', image_size=side))
    found = []
    truth = COCO(str(file))
    for image, (picture, *_) in zip(truth.dataset['images'], pictures):
        result = resize(dict(img=picture))
        sample = DetDataSample(
            metainfo=dict(
                ori_shape=picture.shape[:2],
                img_shape=result['img_shape'],
                scale_factor=result['scale_factor']))
        sample, = model.predict(to_input(model, [result['img']]), [sample])
        boxes = sample.pred_instances
        corners = boxes.bboxes.numpy()
        for (x0, y0, x1, y1), score, label in zip(corners.tolist(),
                                                  boxes.scores.tolist(),
                                                  boxes.labels.tolist()):
            found.append(
                dict(
                    image_id=image['id'],
                    category_id=classes[label],
                    bbox=[x0, y0, x1 - x0, y1 - y0],
                    score=score))
    if not found:
        return dict(AP=0.0, AP50=0.0, AP75=0.0, AP_small=0.0)
    scores = COCOeval(truth, truth.loadRes(found), 'bbox')
    for step in (scores.evaluate, scores.accumulate, scores.summarize):
        step()
    return dict(zip(('AP', 'AP50', 'AP75', 'AP_small'), scores.stats.tolist()))
