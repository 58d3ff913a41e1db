"""What benchmark.py counts: operators, multiply-adds, memory, graphs.

:func:`facts` returns all rows; the other functions count one thing.
"""
import copy
import ctypes
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from benchmark_cases import training_steps
from benchmark_runtimes import in_onnxruntime, onnx_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mmdet_efficientdet import plain_network
from mmdet_efficientdet.deploy.postprocess import detect, join

PEAK_SIDE = 1536  # of the matrices that measure the machine


class OperatorCounter(TorchDispatchMode):
    """Counts calls of operators, of which each is a kernel on a GPU."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += not function.is_view
        return function(*args, **kwargs or {})


def seconds(function, on_gpu):
    """Time of one call: of the process, or until the GPU is ready."""
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    start = clock()
    function()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - start


def operator_calls(function):
    """How many operators that compute something a function calls."""
    with OperatorCounter() as counter:
        function()
    return counter.counts.total()


def top_operators(function, number=10):
    """The operators that take most time themselves, as rows.

    Args:
        function (Callable): Called twice, the first time to warm up.
        number (int): Of rows.
    """
    function()
    with torch.profiler.profile() as profile:
        function()
    events = [
        event for event in profile.key_averages()
        if event.key.startswith('aten::')
    ]
    key = 'self_device_time_total' if torch.cuda.is_available() else \
        'self_cpu_time_total'
    total = sum(getattr(event, key) for event in events)
    events.sort(key=lambda event: -getattr(event, key))
    return [
        dict(
            operator=event.key.removeprefix('aten::'),
            calls=event.count,
            share=getattr(event, key) / total) for event in events[:number]
    ]


def multiply_adds(network, images):
    """Multiply-adds of one pass, counted without computing it.

    oneDNN's operators, which a pass on a CPU may call, would not be counted.
    """
    network = copy.deepcopy(network).to('meta')
    with FlopCounterMode(display=False) as counter:
        network(images.to('meta'))
    return counter.get_total_flops() / 2


def gemm_peak(device, repeats=9):
    """Multiply-adds in a second of a product of large matrices.

    On a CPU it is the better one of PyTorch's and ONNX Runtime's: on some
    processors one of them has half the speed of the other.
    """
    side = PEAK_SIDE * (8 if device == 'cuda' else 1)
    a, b = torch.randn(2, side, side, device=device)
    if device == 'cuda':
        return side**3 / min(
            seconds(lambda: a @ b, True) for _ in range(repeats))
    linear = torch.nn.Linear(side, side, bias=False)
    products = (lambda: a @ b), in_onnxruntime(
        onnx_file(linear, a), a, torch.get_num_threads())
    return side**3 / min(
        seconds(product, False) for product in products
        for _ in range(repeats))


def peak_memory(function):
    """Bytes that a call takes at most, beyond what was taken before.

    On a CPU it is that of the whole process, as Linux counts it. The first
    call takes what is kept for later ones, and is not counted; what the
    allocator keeps is returned before the second one.
    """
    function()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path('/proc/self/clear_refs').write_text('5')  # the peak starts anew
    before = _status('VmRSS')
    function()
    return _status('VmHWM') - before


def _status(key):
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(
        int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def recompilations(network, inputs):
    """Graphs that ``torch.compile`` makes for several inputs.

    The graphs are not compiled, which takes minutes and changes no number.

    Args:
        network (Callable): Of one tensor.
        inputs (Sequence[Tensor]): Of different sizes.
    """
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(network, backend=backend)
    for x in inputs:
        compiled(x)
    return len(graphs)


def graph_breaks(function, *args):
    """Where ``torch.compile`` would have to return to Python."""
    torch._dynamo.reset()
    return torch._dynamo.explain(function)(*args).graph_break_count


def peak_facts(size, side, plain, times, device):
    """Rows ``(size, what, network, value)`` of text about speed.

    Args:
        size (str): A key of ``SCALING``.
        side (int): Height and width of the input.
        plain (PlainNetwork): Whose multiply-adds are counted.
        times (dict): Name of a network to seconds of a forward pass.
        device (str): 'cpu' or 'cuda'.
    """
    work = multiply_adds(plain, torch.empty(1, 3, side, side))
    peak = gemm_peak(device)
    found = [('GEMM peak', 'the best', f'{peak / 1e9:.0f} GMAC/s'),
             ('multiply-adds', 'plain', f'{work / 1e9:.2f} G')]
    for name, seconds in times.items():
        found.append(('time of a multiply-add', name,
                      f'{seconds / work * 1e12:.1f} ps'))
        found.append(
            ('share of the GEMM peak', name, f'{work / seconds / peak:.1%}'))
    return [(size, *row) for row in found]


def facts(size, side, networks):
    """Rows as those of :func:`peak_facts` about what a pass needs.

    Args:
        size (str): A key of ``SCALING``.
        side (int): Height and width of the input.
        networks (dict): ``effdet``, ``detector`` and ``plain``.
    """
    detector, plain = networks['detector'], networks['plain']
    device = detector.data_preprocessor.device.type
    images = torch.randn(1, 3, side, side, device=device)
    passes = dict(
        effdet=partial(networks['effdet'], images),
        detector=partial(detector, images, mode='tensor'),
        plain=partial(plain, images))
    found = []
    for name, run in passes.items():
        found.append(('operators of a pass', name, operator_calls(run)))
        found.append(
            ('memory of a pass', name, f'{peak_memory(run) / 2**20:.0f} MiB'))
        for row in top_operators(run):
            found.append(('operator {operator}'.format_map(row), name,
                          '{calls} calls, {share:.1%}'.format_map(row)))
    return [(size, *row) for row in found]


def graph_facts(size, side, networks):
    """Rows as those of :func:`facts` about graphs of ``torch.compile``."""
    detector, plain = networks['detector'], networks['plain']
    device = detector.data_preprocessor.device
    images = torch.randn(1, 3, side, side, device=device)
    head, maps = detector.bbox_head, plain(images)
    anchors = torch.cat(
        head.prior_generator.grid_priors([x.shape[-2:] for x in maps[0]],
                                         (side, side), device))

    def boxes(cls_scores, bbox_preds):
        return detect(
            join(cls_scores, head.num_classes), join(bbox_preds, 4), anchors,
            head.bbox_coder, head.test_cfg)

    found = [
        ('graph breaks', 'detector',
         graph_breaks(partial(detector, mode='tensor'), images)),
        ('graph breaks', 'plain', graph_breaks(plain, images)),
        ('graph breaks', 'boxes', graph_breaks(boxes, *maps))
    ]  # yapf: disable
    even = plain_network(detector, even=True)
    sides = [even.divisor * n for n in range(2, 12)]
    for name, network, sizes in (('plain', plain, range(96, 256, 16)),
                                 ('plain, even=True', even, sides)):
        count = recompilations(network, [
            torch.randn(1, 3, n, n + even.divisor, device=device)
            for n in sizes
        ])
        found.append(('graphs for ten sizes', name, count))
    return [(size, *row) for row in found]


def training_facts(size, side, device):
    """Rows as those of :func:`facts` about a training step."""
    found = []
    for name, stages in training_steps(size, side, device, ema=True).items():

        def step(stages=stages):
            for stage in stages.values():
                stage()

        step()
        calls = {key: operator_calls(run) for key, run in stages.items()}
        for key, count in calls.items():
            found.append((f'operators of training: {key}', name, count))
        found.append(('operators of training: all', name, sum(calls.values())))
        found.append(('memory of a training step', name,
                      f'{peak_memory(step) / 2**20:.0f} MiB'))
        for row in top_operators(step):
            found.append(('training operator {operator}'.format_map(row), name,
                          '{calls} calls, {share:.1%}'.format_map(row)))
    return [(size, *row) for row in found]
