"""Trainings in which every random number follows from the seed and the place.

No state of a generator is stored. The order of the images, their transforms
and the random numbers of each step are functions of the seed and of the
position in the training, so that a resumed training goes on bit by bit like
one that was not interrupted, whatever the number of workers.
"""
import math
import random
from itertools import count, repeat
from typing import Iterator, Optional, Sized

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmdet.datasets import MultiImageMixDataset
from mmengine.dataset import ConcatDataset, RepeatDataset
from mmengine.dist import (broadcast_object_list, get_dist_info, get_rank,
                           sync_random_seed)
from mmengine.hooks import DistSamplerSeedHook
from mmengine.runner import IterBasedTrainLoop
from torch.utils.data import BatchSampler, Sampler

from ..registry import DATA_SAMPLERS, HOOKS, LOOPS, TRANSFORMS

# First part of a key, so that no two purposes draw the same numbers.
SAMPLE, STEP = 0, 1


def seed_generators(*key: int) -> None:
    """Seeds the generators of Python, NumPy and PyTorch from numbers >= 0."""
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(words.tobytes())
    np.random.seed(words)
    torch.manual_seed(int.from_bytes(words[:2].tobytes(), 'little'))


class SampleIndex(int):
    """An index of an image, with the key of its random numbers.

    ``RepeatDataset`` and ``ConcatDataset`` calculate with indices; what
    results keeps the key, and a dataset passes it to its pipeline as
    ``sample_idx``.
    """

    def __new__(cls, index: int, key: tuple) -> 'SampleIndex':
        self = super().__new__(cls, index)
        self.key = key
        return self

    def __getnewargs__(self) -> tuple:
        return int(self), self.key  # for the way to a worker

    def __mod__(self, other: int) -> 'SampleIndex':
        return SampleIndex(int(self) % other, self.key)

    def __sub__(self, other: int) -> 'SampleIndex':
        return SampleIndex(int(self) - other, self.key)


@DATA_SAMPLERS.register_module()
class SeededSampler(Sampler):
    """Shuffles anew in each epoch, and can start at any position.

    The position counts the samples of all ranks since the training began. In
    finite epochs, the first samples are repeated where the ranks would get
    unequal numbers.

    Args:
        dataset (Sized): The dataset.
        seed (int, optional): Equal on all ranks. Defaults to a random one.
        infinite (bool): Epoch follows epoch without an end, for loops that
            count iterations. Defaults to False.
    """

    def __init__(self,
                 dataset: Sized,
                 seed: Optional[int] = None,
                 infinite: bool = False) -> None:
        self.dataset = dataset
        self.seed = sync_random_seed() if seed is None else seed
        self.infinite = infinite
        self.rank, self.world_size = get_dist_info()
        self.epoch = 0
        self.start = 0  # what lies before this position is left out

    def __iter__(self) -> Iterator[SampleIndex]:
        size = len(self.dataset)
        if self.infinite:
            period, first, stop = size, 0, math.inf
        else:
            period = len(self) * self.world_size
            first, stop = self.epoch * period, (self.epoch + 1) * period
        shuffled = None
        for position in count(
                max(first, self.start) + self.rank, self.world_size):
            if position >= stop:
                return
            epoch, place = divmod(position, period)
            if epoch != shuffled:
                generator = np.random.default_rng((self.seed, epoch))
                order = generator.permutation(size).tolist()
                shuffled = epoch
            yield SampleIndex(order[place % size],
                              (SAMPLE, self.seed, position))

    def __len__(self) -> int:
        """The number of samples of an epoch in this rank."""
        return math.ceil(len(self.dataset) / self.world_size)

    def skip(self, num_samples: int) -> None:
        """Starts so many samples of each rank later."""
        self.start += num_samples * self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch, counted from 0, unless there is no end."""
        self.epoch = epoch


@TRANSFORMS.register_module()
class SeedTransforms(BaseTransform):
    """Seeds the transforms that follow; first in the training pipeline.

    An index that does not come from a :class:`SeededSampler`, such as that of
    an image which is mixed into another or replaces a broken one, goes on
    with the numbers of the image before.

    Required key: sample_idx.
    """

    def transform(self, results: dict) -> dict:
        """Seeds the generators; the results stay as they are."""
        index = results.get('sample_idx')
        if isinstance(index, SampleIndex):
            seed_generators(*index.key)
        return results


@HOOKS.register_module()
class SeedHook(DistSamplerSeedHook):
    """Seeds each step from (seed, rank, iteration), and the sampler.

    The seed is that of the run which is resumed. Warns where something in
    the data cannot follow from it.
    """

    def before_train(self, runner) -> None:
        """Hands the seed, known now that checkpoints are loaded, on."""
        seed = [runner.seed]
        broadcast_object_list(seed)  # diff_rank_seed makes them differ
        self.seed, = seed
        loader = runner.train_dataloader
        sampler = loader.batch_sampler.sampler
        found = list(_unseeded(loader.dataset))
        if isinstance(sampler, SeededSampler):
            sampler.seed = self.seed
            found += _unsuited(runner.train_loop, loader.batch_sampler)
        else:
            found.append(
                f'the sampler {type(sampler).__name__} (write '
                "sampler=dict(type='mmdet_efficientdet.SeededSampler'))")
        if found:
            runner.logger.warning(
                'A resumed training will not be bit by bit what it would have '
                f'been without interruption, because of {", ".join(found)}')

    def before_train_iter(self,
                          runner,
                          batch_idx: int,
                          data_batch=None) -> None:
        """Seeds what the model draws, such as drop-connect."""
        seed_generators(STEP, self.seed, get_rank(), runner.iter)


def _unsuited(loop, batch_sampler) -> Iterator[str]:
    """What in a loop does not go on where it was."""
    infinite = batch_sampler.sampler.infinite
    if not isinstance(loop, IterBasedTrainLoop):
        if infinite:
            raise ValueError('an epoch has no end with sampler=dict(infinite='
                             'True); remove it, or count iterations')
    elif not (infinite and isinstance(loop, SeededIterBasedTrainLoop)):
        yield ("a loop that reads ahead (write train_cfg=dict(type="
               "'mmdet_efficientdet.SeededIterBasedTrainLoop', ...) and "
               'sampler=dict(infinite=True))')
    elif type(batch_sampler) is not BatchSampler:
        yield (f'{type(batch_sampler).__name__}, which remembers images of '
               'the past')


def _unseeded(dataset) -> Iterator[str]:
    """What in a dataset draws random numbers of its own."""
    pipeline = getattr(dataset, 'pipeline', [])
    pipeline = getattr(pipeline, 'transforms', pipeline)
    if any(isinstance(t, SeedTransforms) for t in pipeline):
        return
    if hasattr(dataset, 'datasets') or hasattr(dataset, 'dataset'):
        if not isinstance(
                dataset, (ConcatDataset, RepeatDataset, MultiImageMixDataset)):
            yield f'{type(dataset).__name__}, which may lose the position'
        for part in getattr(dataset, 'datasets', None) or [dataset.dataset]:
            yield from _unseeded(part)
    elif hasattr(dataset, 'pipeline'):
        yield ('a training pipeline that does not begin with dict(type='
               "'mmdet_efficientdet.SeedTransforms')")


@LOOPS.register_module()
class SeededIterBasedTrainLoop(IterBasedTrainLoop):
    """Counts iterations, and arrives at once where it is resumed.

    mmengine's loop would read all batches of the past. The sampler has to be
    a :class:`SeededSampler` with ``infinite=True``; with another one, this is
    mmengine's loop. onedl-mmengine's can skip by itself and stays as it is.
    """

    def run(self):
        """Trains."""
        sampler = self.dataloader.batch_sampler.sampler
        if (getattr(sampler, 'infinite', False)
                and not hasattr(self.dataloader_iterator, 'skip_iter')):
            self.dataloader_iterator = self._batches(sampler)
        return super().run()

    def _batches(self, sampler: SeededSampler) -> Iterator:
        past = self._iter
        yield from repeat(None, past)  # which the host takes and drops
        # Only now: the host's own iterator is older than the checkpoint, and
        # its workers have fetched what belongs to another place and seed.
        sampler.skip(past * self.dataloader.batch_sampler.batch_size)
        yield from self.dataloader
