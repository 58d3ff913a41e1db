"""Trainings whose random numbers depend only on the seed and the position.

No state of a random number generator is stored. The order of the images,
their transforms and the random numbers of each step are functions of the seed
and of the position in the training. A resumed training is therefore
bit-identical to an uninterrupted one, whatever the number of workers.
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

# First part of a key: different purposes must not draw the same numbers.
SAMPLE, STEP = 0, 1


def seed_generators(*key: int) -> None:
    """Seeds the generators of Python, NumPy and PyTorch with integers >= 0."""
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(words.tobytes())
    np.random.seed(words)
    torch.manual_seed(int.from_bytes(words[:2].tobytes(), 'little'))


class SampleIndex(int):
    """The index of an image that carries the key of its random numbers.

    ``RepeatDataset`` and ``ConcatDataset`` calculate with indices. The result
    keeps the key, and a dataset passes it to its pipeline as ``sample_idx``.
    """

    def __new__(cls, index: int, key: tuple) -> 'SampleIndex':
        self = super().__new__(cls, index)
        self.key = key
        return self

    def __getnewargs__(self) -> tuple:
        return int(self), self.key  # to pickle it for a worker

    def __mod__(self, other: int) -> 'SampleIndex':
        return SampleIndex(int(self) % other, self.key)

    def __sub__(self, other: int) -> 'SampleIndex':
        return SampleIndex(int(self) - other, self.key)


@DATA_SAMPLERS.register_module()
class SeededSampler(Sampler):
    """Shuffles in each epoch and can start at any position.

    The position counts the samples of all ranks since the beginning of the
    training. In a finite epoch, the first samples are repeated if the ranks
    would get unequal numbers of samples.

    Args:
        dataset (Sized): The dataset.
        seed (int, optional): Equal on all ranks. Defaults to a random one.
        infinite (bool): Continues with the next epoch without an end, for
            iteration-based loops. Defaults to False.
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
        self.start = 0  # samples before this position are skipped

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
        """Number of samples of this rank in an epoch."""
        return math.ceil(len(self.dataset) / self.world_size)

    def skip(self, num_samples: int) -> None:
        """Skips ``num_samples`` samples of each rank."""
        self.start += num_samples * self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, counted from 0; ignored by an infinite sampler."""
        self.epoch = epoch


@TRANSFORMS.register_module()
class SeedTransforms(BaseTransform):
    """Seeds the transforms that follow it in the training pipeline.

    It must be the first transform. An index that does not come from a
    :class:`SeededSampler`, such as that of an image that is mixed into
    another one or replaces a broken one, continues with the random numbers of
    the previous image.

    Required key: sample_idx.
    """

    def transform(self, results: dict) -> dict:
        """Seeds the generators and returns the results unchanged."""
        index = results.get('sample_idx')
        if isinstance(index, SampleIndex):
            seed_generators(*index.key)
        return results


@HOOKS.register_module()
class SeedHook(DistSamplerSeedHook):
    """Seeds the sampler, and each step with (seed, rank, iteration).

    A resumed run keeps its seed. The hook warns if a part of the data
    pipeline does not depend on the seed alone.
    """

    def before_train(self, runner) -> None:
        """Passes the seed on, which is known after a checkpoint is resumed."""
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
                'A resumed training will not be bit-identical to an '
                f'uninterrupted one, because of {", ".join(found)}')

    def before_train_iter(self,
                          runner,
                          batch_idx: int,
                          data_batch=None) -> None:
        """Seeds the random numbers of the model, such as drop-connect."""
        seed_generators(STEP, self.seed, get_rank(), runner.iter)


def _unsuited(loop, batch_sampler) -> Iterator[str]:
    """Names the parts of a loop that do not resume exactly."""
    infinite = batch_sampler.sampler.infinite
    if not isinstance(loop, IterBasedTrainLoop):
        if infinite:
            raise ValueError(
                'with sampler=dict(infinite=True) an epoch has no '
                'end. Remove infinite=True, or use an '
                'iteration-based loop')
    elif not (infinite and isinstance(loop, SeededIterBasedTrainLoop)):
        yield ("a loop that reads ahead (set train_cfg=dict(type="
               "'mmdet_efficientdet.SeededIterBasedTrainLoop', ...) and "
               'sampler=dict(infinite=True))')
    elif type(batch_sampler) is not BatchSampler:
        yield (
            f'{type(batch_sampler).__name__}, which keeps images of earlier '
            'batches')


def _unseeded(dataset) -> Iterator[str]:
    """Names the parts of a dataset that draw unseeded random numbers."""
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
    """An iteration-based loop that resumes without reading past batches.

    mmengine's loop reads all earlier batches again. The sampler must be a
    :class:`SeededSampler` with ``infinite=True``; with another sampler, this
    is mmengine's loop. The loop of onedl-mmengine can skip batches itself and
    is used unchanged.
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
        yield from repeat(None, past)  # mmengine takes these and drops them
        # Not earlier: mmengine creates its iterator before it loads the
        # checkpoint, and the workers prefetch with the old position and seed.
        sampler.skip(past * self.dataloader.batch_sampler.batch_size)
        yield from self.dataloader
