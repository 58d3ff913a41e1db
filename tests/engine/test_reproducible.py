"""Every random number of a training follows from the seed and the place."""
import copy
import pickle
import random
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.tiny_data import CONFIGS
from mmdet.datasets import MultiImageMixDataset
from mmdet.registry import DATA_SAMPLERS
from mmengine.config import Config
from mmengine.dataset import (BaseDataset, ClassBalancedDataset, ConcatDataset,
                              RepeatDataset)
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch.utils.data import Subset

from mmdet_efficientdet.engine.reproducible import (SampleIndex,
                                                    SeededIterBasedTrainLoop,
                                                    SeededSampler, SeedHook,
                                                    SeedTransforms)


def of_rank(rank, world_size, size=10, **kwargs):
    """The sampler of one rank, as in a process group."""
    sampler = SeededSampler(range(size), seed=3, **kwargs)
    sampler.rank, sampler.world_size = rank, world_size
    return sampler


def of_all(world_size, num=None, epoch=0, **kwargs):
    """What all ranks get together, in the order of the positions."""
    samplers = [of_rank(r, world_size, **kwargs) for r in range(world_size)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    ranks = [list(islice(iter(s), num)) for s in samplers]
    assert len({len(rank) for rank in ranks}) == 1
    return [index for step in zip(*ranks) for index in step]


@pytest.mark.parametrize('world_size', [1, 2, 3, 4])
def test_epoch_has_every_image(world_size):
    """Once each; a few twice where the ranks would get unequal numbers."""
    epochs = [of_all(world_size, epoch=epoch) for epoch in range(3)]
    for epoch in epochs:
        assert len(epoch) == -(-10 // world_size) * world_size
        assert sorted(epoch[:10]) == list(range(10))
        assert epoch[10:] == epoch[:len(epoch) - 10]
    assert epochs[0] != epochs[1] != epochs[2]
    assert len(of_rank(0, world_size)) == len(epochs[0]) / world_size


def test_ranks_split_one_order():
    """The number of ranks does not change the order of the images."""
    assert of_all(1) == of_all(2) == of_all(5)
    endless = [of_all(n, 30 // n, infinite=True) for n in (1, 2, 3)]
    assert endless[0] == endless[1] == endless[2]


def test_endless_stream_is_the_epochs():
    """Epoch after epoch, each with every image, and every position once."""
    stream = of_all(1, 50, infinite=True)
    epochs = [of_all(1, epoch=epoch) for epoch in range(5)]
    assert stream == sum(epochs, [])
    positions = [index.key[-1] for index in stream]
    assert positions == list(range(50))
    assert positions == [index.key[-1] for index in sum(epochs, [])]
    assert of_all(1, 9, epoch=4, infinite=True) == stream[:9]


@pytest.mark.parametrize('world_size', [1, 3])
@pytest.mark.parametrize('num', [0, 1, 7, 10, 23])
def test_skipping_is_dropping(world_size, num):
    """A start at a position gives what would have come there."""
    sampler = of_rank(world_size - 1, world_size, infinite=True)
    whole = list(islice(iter(sampler), 40))
    sampler.skip(num)
    rest = list(islice(iter(sampler), 40 - num))
    assert rest == whole[num:]
    assert [i.key for i in rest] == [i.key for i in whole[num:]]


def test_seed_decides():
    """Equal seeds, equal orders; epoch 1 of a seed is not 0 of the next."""
    first, again, other = (
        SeededSampler(range(50), seed=seed) for seed in (1, 1, 2))
    assert list(first) == list(again) != list(other)
    first.set_epoch(1)
    assert list(first) != list(other)
    sampler = DATA_SAMPLERS.build(
        dict(type='mmdet_efficientdet.SeededSampler', dataset=range(3)))
    assert isinstance(sampler.seed, int)


def test_index_keeps_its_key():
    """On the way to a worker, and where wrappers calculate."""
    index = SampleIndex(17, (0, 1, 2))
    for kept, value in ((pickle.loads(pickle.dumps(index)), 17),
                        (copy.deepcopy(index), 17), (index % 5, 2), (index - 7,
                                                                     10)):
        assert kept == value and kept.key == (0, 1, 2)


class Numbers(BaseDataset):
    """Images are numbers, of which those above 6 are broken."""

    def load_data_list(self):
        return [dict(number=i) for i in range(8)]

    def get_cat_ids(self, idx):
        return [idx % 2]


def draw(results):
    """A transform that draws from each generator."""
    if results['number'] > 6:
        return None
    return results['number'], random.random(), np.random.rand(), torch.rand(
        1).item()


def numbers(*transforms):
    return Numbers(pipeline=[*transforms])


def loader(num_workers):
    """Wrapped data, as a training loads it."""
    part = [SeedTransforms(), draw]
    twice = dict(type=RepeatDataset, dataset=numbers(*part), times=2)
    data = ConcatDataset([twice, numbers(*part)])
    return Runner.build_dataloader(
        dict(
            dataset=data,
            sampler=dict(
                type='mmdet_efficientdet.SeededSampler', infinite=True),
            batch_size=3,
            num_workers=num_workers),
        seed=5)


@pytest.mark.slow
def test_transforms_follow_the_position():
    """Whatever the number of workers, and wherever the reading starts."""
    whole = list(islice(iter(loader(0)), 9))
    draws = [image for batch in whole for image in zip(*batch)]
    assert len(draws) == 27
    for column in list(zip(*draws))[1:]:
        assert len(set(column)) == 27  # also where an image comes again
    for num_workers in (0, 1, 2):
        random.seed(num_workers)
        np.random.seed(num_workers)
        torch.manual_seed(num_workers)
        part = loader(num_workers)
        part.sampler.skip(4 * 3)
        assert list(islice(iter(part), 5)) == whole[4:]


def fake_runner(dataset,
                sampler='mmdet_efficientdet.SeededSampler',
                loop=EpochBasedTrainLoop,
                infinite=False,
                batch_sampler=None):
    warnings = []
    data_loader = Runner.build_dataloader(
        dict(
            dataset=dataset,
            sampler=dict(
                type=sampler, **(infinite and dict(infinite=True) or {})),
            batch_sampler=batch_sampler,
            batch_size=1,
            num_workers=0),
        seed=1)
    return SimpleNamespace(
        seed=9,
        iter=0,
        train_dataloader=data_loader,
        train_loop=loop.__new__(loop),
        warnings=warnings,
        logger=SimpleNamespace(warning=warnings.append))


def test_hook_hands_the_seed_on():
    """The sampler gets the seed of the run that is resumed."""
    runner = fake_runner(RepeatDataset(numbers(SeedTransforms(), draw), 2))
    SeedHook().before_train(runner)
    assert runner.train_dataloader.sampler.seed == 9
    assert not runner.warnings


@pytest.mark.parametrize('loop, infinite, batch_sampler, words', [
    (IterBasedTrainLoop, True, None, 'reads ahead'),
    (IterBasedTrainLoop, False, None, 'reads ahead'),
    (SeededIterBasedTrainLoop, False, None, 'reads ahead'),
    (SeededIterBasedTrainLoop, True, dict(type='AspectRatioBatchSampler'),
     'AspectRatioBatchSampler'),
    (SeededIterBasedTrainLoop, True, None, None),
    (EpochBasedTrainLoop, False, dict(type='AspectRatioBatchSampler'), None),
])
def test_loops_that_are_exact(loop, infinite, batch_sampler, words):
    """A loop that has read ahead before it is resumed is not."""
    runner = fake_runner(
        numbers(SeedTransforms(), draw),
        loop=loop,
        infinite=infinite,
        batch_sampler=batch_sampler)
    SeedHook().before_train(runner)
    assert len(runner.warnings) == (words is not None)
    assert not words or words in runner.warnings[0]


def test_epoch_without_an_end():
    runner = fake_runner(numbers(SeedTransforms(), draw), infinite=True)
    with pytest.raises(ValueError, match='infinite=True'):
        SeedHook().before_train(runner)


def test_mixed_images_are_seeded():
    """The wrapper's own pipeline may begin with the seed."""
    data = numbers(lambda results: results)
    for transforms, warns in (([], True), ([SeedTransforms()], False)):
        mixed = MultiImageMixDataset(data, [])
        mixed.pipeline = transforms
        runner = fake_runner(mixed)
        SeedHook().before_train(runner)
        assert bool(runner.warnings) == warns


@pytest.mark.parametrize('case', ['balanced', 'subset', 'pipeline', 'sampler'])
def test_hook_warns(case):
    """Whatever cannot follow from the seed is named."""
    data = numbers(SeedTransforms(), draw)
    words, kwargs = case, {}
    if case == 'balanced':
        data, words = ClassBalancedDataset(data, 0.1), 'ClassBalancedDataset'
    elif case == 'subset':
        data, words = Subset(data, [2, 1]), 'Subset'
    elif case == 'pipeline':
        twice = dict(type=RepeatDataset, dataset=numbers(draw), times=2)
        data = ConcatDataset([data, twice])
    else:
        kwargs, words = dict(sampler='DefaultSampler'), 'DefaultSampler'
    runner = fake_runner(data, **kwargs)
    SeedHook().before_train(runner)
    warning, = runner.warnings
    assert words in warning


def test_steps_are_seeded(monkeypatch):
    """By seed, rank and iteration, and not by what was drawn before."""
    hook = SeedHook()

    def drawn(seed, rank, iteration):
        for scramble in (random.seed, np.random.seed, torch.seed):
            scramble()
        hook.seed = seed
        monkeypatch.setattr('mmdet_efficientdet.engine.reproducible.get_rank',
                            lambda: rank)
        hook.before_train_iter(SimpleNamespace(iter=iteration), 0)
        return random.random(), np.random.rand(), torch.rand(1).item()

    places = [(s, r, i) for s in (0, 1) for r in (0, 1) for i in (0, 1, 2)]
    first = [drawn(*place) for place in places]
    assert first == [drawn(*place) for place in places]
    for column in zip(*first):
        assert len(set(column)) == len(places)


@pytest.mark.parametrize(
    'path', sorted(CONFIGS.glob('*.py')), ids=lambda path: path.stem)
def test_shipped_configs(path):
    """Each of them has all parts, and validation draws nothing."""
    config = Config.fromfile(path)
    loader = config.train_dataloader
    assert loader.sampler.type == 'mmdet_efficientdet.SeededSampler'
    first, *others = loader.dataset.pipeline
    assert first.type == 'mmdet_efficientdet.SeedTransforms'
    assert first not in others + config.val_dataloader.dataset.pipeline
    hooks = {hook.type for hook in config.default_hooks.values()}
    assert {
        'mmdet_efficientdet.SeedHook', 'mmdet_efficientdet.SafeCheckpointHook'
    } <= hooks
    by_iteration = 'max_iters' in config.train_cfg
    # Epochs of the large sizes take hours.
    assert by_iteration or config.default_hooks.checkpoint.interval == 1
    assert by_iteration == loader.sampler.get('infinite', False)
    assert config.train_cfg.type == (
        'mmdet_efficientdet.SeededIterBasedTrainLoop'
        if by_iteration else 'EpochBasedTrainLoop')
