"""A training of one weight, with the shipped hooks."""
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel

from mmdet_efficientdet import DetRunner

from .tiny_data import LITE0


class Toy(BaseModel):
    """A model of one weight."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, inputs, mode):
        if mode == 'predict':
            return [inputs]
        return dict(loss=(self.layer(inputs) - 3).square().mean())


class Scores(BaseMetric):
    """Scores that are known beforehand, one for each validation."""

    def __init__(self, scores):
        super().__init__()
        self.scores = list(scores)

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return dict(mAP=self.scores.pop(0))


def toy_runner(folder, scores, **hooks):
    """A training of one epoch for each score, with the shipped hooks."""
    shipped = Config.fromfile(LITE0).default_hooks
    shipped.checkpoint.interval = 1
    loader = dict(
        dataset=[dict(inputs=torch.ones(1) * i) for i in range(3)],
        sampler=dict(type='mmdet_efficientdet.SeededSampler'),
        batch_size=1,
        num_workers=0,
        persistent_workers=True)  # which the shipped runner ignores
    return DetRunner(
        Toy(),
        work_dir=str(folder),
        experiment_name=str(folder).replace('/', '_'),
        train_dataloader=dict(loader, collate_fn=dict(type='default_collate')),
        val_dataloader=dict(loader, collate_fn=dict(type='default_collate')),
        train_cfg=dict(by_epoch=True, max_epochs=len(scores)),
        val_cfg=dict(),
        val_evaluator=[Scores(scores)],
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.05)),
        default_hooks=dict(
            checkpoint=dict(shipped.checkpoint, max_keep_ckpts=1),
            ema=shipped.ema) | hooks,
        default_scope='mmdet',
        log_level='ERROR')
