"""Two ranks on the CPU: gradients, the two switches, and the host's script.

Every rule is checked against its formula, with gradients that one process
takes of each rank's images alone.
"""
import copy
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from helpers import gloo_train
from helpers.tiny_data import (D0, make_dataset, new_process, run_tool,
                               write_config)
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from mmengine.structures import InstanceData
from torch import nn

LOCAL = 'mmdet_efficientdet.LocalClipOptimWrapper'
SIDE = 64
# Boxes of the two images of each rank in each of two batches. The second rank
# sees one box at first, and then none.
BOXES = (((3, 2), (1, 4)), ((1, 0), (0, 0)))
MAX_NORM = 1e6  # gradients are large, as nothing has been learned
CLIPPED = dict(clip_grad=dict(max_norm=MAX_NORM))
# name: settings of the head, of the optimizer's wrapper, and batches to take.
CASES = dict(
    mean=(dict(), dict(), 1),
    no_boxes=(dict(), dict(), 2),
    checkpointing=(dict(with_cp=True), dict(), 1),
    synced=(dict(sync_num_pos=True), dict(), 1),
    clipped=(dict(), CLIPPED, 1),
    local_unclipped=(dict(), dict(type=LOCAL), 1),
    local=(dict(), dict(CLIPPED, type=LOCAL), 1),
    local_accumulated=(dict(),
                       dict(CLIPPED, type=LOCAL, accumulative_counts=2), 2))


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """As in the ranks, whose sums have the same order then."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def new_model(**head):
    """D0 without dropped blocks, in training, with frozen norms.

    Their statistics are those of a batch, else features and gradients would
    vanish on the way to the first layers.
    """
    return copy.deepcopy(build(**head))


@lru_cache
def build(**head):
    register_all_modules()
    config = Config.fromfile(D0)
    config.model.backbone.init_cfg = None
    config.model.data_preprocessor.pad_size_divisor = SIDE
    config.model.max_loss = float('inf')  # nothing is trained, see new_model
    config.model.bbox_head.update(num_classes=2, **head)
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1
    with torch.no_grad():
        model.train()(torch.randn(32, 3, SIDE, SIDE))
    for norm in norms:
        norm.eval()
    return model


def batch_of(rank, index):
    """The images of a rank in a batch; large boxes have many positives."""
    generator = torch.Generator().manual_seed(2 * rank + index)
    images, samples = [], []
    for boxes in BOXES[rank][index]:
        corners = torch.rand(boxes, 4, generator=generator) * 24
        corners[:, 2:] += 40
        images.append(
            torch.randint(
                0,
                256, (3, SIDE, SIDE),
                dtype=torch.uint8,
                generator=generator))
        samples.append(
            DetDataSample(
                gt_instances=InstanceData(
                    bboxes=corners, labels=torch.arange(boxes) % 2),
                metainfo=dict(img_shape=(SIDE, SIDE))))
    return dict(inputs=images, data_samples=samples)


def train(model, wrapper, rank, batches):
    """Small steps; returns the momentum of each parameter.

    After the only update, also where gradients of both batches are
    accumulated, that is the gradient which the optimizer was given;
    ``no_boxes`` takes two.
    """
    register_all_modules()
    optim = build_optim_wrapper(
        model,
        copy.deepcopy(
            dict(
                dict(
                    type='OptimWrapper',
                    optimizer=dict(type='SGD', lr=1e-5, momentum=0.9)),
                **wrapper)))
    for index in range(batches):
        model.train_step(batch_of(rank, index), optim)
    return [
        optim.optimizer.state[p]['momentum_buffer']
        for p in model.parameters()
    ]


def run_rank(rank, port, folder):
    """Runs every case on one of two ranks and saves its updates."""
    os.environ.update(
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE='2')
    sys.stdout = sys.stderr = open(folder / f'rank{rank}.txt', 'w')
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo')
    for name, (head, wrapper, batches) in CASES.items():
        model = MMDistributedDataParallel(
            new_model(**head), device_ids=None, broadcast_buffers=False)
        updates = train(model, wrapper, rank, batches)
        torch.save((updates, model.module.state_dict()),
                   folder / f'{name}_{rank}.pth')
    torch.distributed.destroy_process_group()


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        return server.getsockname()[1]


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    """A function to (updates, weights) of a case on both ranks."""
    folder = tmp_path_factory.mktemp('ranks')
    port = free_port()
    processes = [
        new_process(run_rank, rank, port, folder) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for rank, process in enumerate(processes):
        process.join(300)
        if process.is_alive():
            process.kill()
        text = (folder / f'rank{rank}.txt').read_text()
        assert process.exitcode == 0, text[-3000:]
    return lambda name: [
        torch.load(folder / f'{name}_{rank}.pth') for rank in range(2)
    ]


@pytest.fixture(scope='module')
def gradients():
    """Gradients of each rank's images alone, [rank][batch], and positives."""
    torch.manual_seed(0)
    model = new_model()
    grads, positives = [[], []], [[], []]
    # The divisor of the losses is all that positives do.
    divide = model.bbox_head.loss_cls.forward
    factors = []

    def forward(*args, avg_factor, **kwargs):
        factors.append(float(avg_factor))
        return divide(*args, avg_factor=avg_factor, **kwargs)

    model.bbox_head.loss_cls.forward = forward
    for rank in range(2):
        for index in range(2):
            model.zero_grad()
            data = model.data_preprocessor(
                batch_of(rank, index), training=True)
            loss, _ = model.parse_losses(model(**data, mode='loss'))
            loss.backward()
            grads[rank].append([p.grad.clone() for p in model.parameters()])
            positives[rank].append(factors[-1] - 1)
    return grads, positives


def clip(grads, max_norm=MAX_NORM):
    """Gradients scaled down to a global norm."""
    norm = torch.stack([g.norm() for g in grads]).norm().item()
    return [g * min(1, max_norm / norm) for g in grads], norm


def check(result, expected):
    """Both ranks were given the expected gradients and have equal weights."""
    (updates, weights), (others, other_weights) = result
    for key, value in weights.items():
        assert torch.equal(value, other_weights[key]), key
    largest = max(g.abs().max() for g in expected)
    for a, b, c in zip(updates, others, expected):
        assert torch.equal(a, b)
        assert (a - c).abs().max() < 1e-5 * largest
        # Of fusion weights they are differences of nearly equal numbers.
        assert (a - c).norm() <= 1e-4 * c.norm() + 1e-9 * largest
    assert sum(bool(c.any()) for c in expected) > 0.9 * len(expected)


@pytest.mark.distributed
@pytest.mark.parametrize('name', ['mean', 'checkpointing', 'local_unclipped'])
def test_mean_of_local_gradients(name, ranks, gradients):
    """Ranks with unequal positives, each with its own normaliser."""
    grads, positives = gradients
    assert positives[0][0] > 2 * positives[1][0] > 0
    check(ranks(name), [(a + b) / 2 for a, b in zip(grads[0][0], grads[1][0])])


@pytest.mark.distributed
def test_rank_without_boxes(ranks, gradients):
    """It has background to learn, and no rank waits for it.

    The second of two steps starts from other weights, so that only sizes and
    the ranks' agreement are known.
    """
    assert gradients[1][1][1] == 0
    (updates, weights), (others, other_weights) = ranks('no_boxes')
    assert all(map(torch.equal, updates, others))
    assert all(map(torch.equal, weights.values(), other_weights.values()))
    assert all(update.isfinite().all() for update in updates)


@pytest.mark.distributed
def test_sync_num_pos(ranks, gradients):
    """With the switch all ranks divide by the mean of positives plus 1."""
    grads, positives = gradients
    own = [positives[rank][0] + 1 for rank in range(2)]
    common = sum(own) / 2
    check(
        ranks('synced'), [(a * own[0] + b * own[1]) / common / 2
                          for a, b in zip(grads[0][0], grads[1][0])])


@pytest.mark.distributed
def test_the_hosts_clipping(ranks, gradients):
    """By default the mean is clipped, as in every detector of the host."""
    grads, _ = gradients
    mean = [(a + b) / 2 for a, b in zip(grads[0][0], grads[1][0])]
    expected, norm = clip(mean)
    assert norm > 2 * MAX_NORM
    check(ranks('clipped'), expected)


@pytest.mark.distributed
def test_local_clipping(ranks, gradients):
    """The update is the sum over ranks of clip(g_r / R), as on TPUs."""
    grads, _ = gradients
    (a, norm_a), (b, norm_b) = (
        clip([g / 2 for g in grads[rank][0]]) for rank in range(2))
    assert norm_a < 0.9 * MAX_NORM < 2 * MAX_NORM < norm_b  # one is clipped
    check(ranks('local'), [x + y for x, y in zip(a, b)])


@pytest.mark.distributed
def test_local_clipping_of_accumulated_gradients(ranks, gradients):
    """g_r is what a rank has accumulated: here the mean of two batches."""
    grads, _ = gradients
    shares, norms = zip(*(clip([(x + y) / 4 for x, y in zip(*grads[rank])])
                          for rank in range(2)))
    assert min(norms) > 1.1 * MAX_NORM
    check(ranks('local_accumulated'), [x + y for x, y in zip(*shares)])


@pytest.mark.parametrize('clip_grad', [None, dict(max_norm=0.1)])
def test_local_clipping_of_one_process(clip_grad):
    """Alone it is the host's wrapper, to the last bit."""
    wrapper = dict(clip_grad=clip_grad, accumulative_counts=2)
    expected = train(new_model(), wrapper, 0, 2)
    updates = train(new_model(), dict(type=LOCAL, **wrapper), 0, 2)
    assert all(map(torch.equal, updates, expected))
    assert any(update.abs().max() > 0 for update in updates)


HOOK = '''
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class SaveRank(Hook):

    def after_train(self, runner):
        torch.save(runner.model.module.state_dict(),
                   f'{runner.work_dir}/rank{runner.rank}_{runner.iter}.pth')


'''
CONFIG = gloo_train.CPU_RANKS + '''
custom_hooks = [dict(type='SaveRank', priority='LOWEST')]
'''


def launch(folder, *args):
    """Runs the host's train.py on two ranks as torchrun would start them."""
    source = Path(gloo_train.__file__).read_text()
    port = free_port()

    def run(rank):
        environment = dict(
            MASTER_ADDR='127.0.0.1',
            MASTER_PORT=str(port),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE='2',
            OMP_NUM_THREADS='1')
        return run_tool(
            f'rank{rank}.py',
            *args,
            '--launcher',
            'pytorch',
            cwd=folder,
            source=f'import os\nos.environ.update({environment})\n{HOOK}'
            f'{source}')

    with ThreadPoolExecutor() as pool:
        done = list(pool.map(run, range(2)))
    for rank in done:
        assert rank.code == 0, rank.output[-3000:]
    return done[0].output


@pytest.mark.distributed
def test_train_script_on_two_ranks(tmp_path):
    """The host's train.py trains, evaluates and resumes on two ranks."""
    root = make_dataset(tmp_path / 'data')
    config = write_config(tmp_path / 'tiny.py', root, extra=CONFIG)
    work_dir = tmp_path / 'work_dirs' / 'tiny'
    options = ['--cfg-options', 'train_dataloader.batch_size=3']
    output = launch(tmp_path, config, *options, 'train_cfg.max_epochs=1')
    # Six images, three for each rank
    assert 'Epoch(train) [1][1/1]' in output
    output = launch(tmp_path, config, '--resume', *options)
    assert 'resumed epoch: 1, iter: 1' in output
    assert 'Epoch(train) [2][1/1]' in output
    assert 'coco/bbox_mAP: ' in output
    for iteration in (1, 2):
        saved = [
            torch.load(work_dir / f'rank{rank}_{iteration}.pth')
            for rank in range(2)
        ]
        for key, value in saved[0].items():
            # Without SyncBN each rank has statistics of its own.
            if 'running' not in key:
                assert torch.equal(value, saved[1][key]), key
