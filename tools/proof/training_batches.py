"""The batches that verify_training.py trains with."""
import numpy as np
import torch
from mmdet.registry import DATASETS, MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.structures import InstanceData

NUM_CLASSES = 8  # of drawn images


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
