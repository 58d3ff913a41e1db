"""Time this package beside effdet and MMDetection, part by part.

What belongs together is run in turn (A, B, A, B ...), after one run to warm
up, so that a busy moment hits all of them alike. Read the ratios: on a CPU
they are those of the time that the process has used.

Example:
    python tools/proof/benchmark.py --size lite0 d0 --repeats 20 --out bench

Prints a Markdown table with its conditions, and writes it with the same
figures as CSV and as a picture to the folder --out. Run it on a machine that
does nothing else. Needs effdet: pip install effdet==0.4.1
"""
import argparse
import csv
import platform
import statistics
from importlib.metadata import version
from pathlib import Path

from mmdet_efficientdet.scaling import SCALING

WORK = ('forward', 'runtimes', 'boxes', 'train', 'targets', 'resize', 'facts',
        'graphs')
NETWORKS = ('forward', 'runtimes', 'sizes')  # whose times are compared


def parse_args(argv=None):
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--size',
        nargs='+',
        default=['lite0', 'd0'],
        choices=SCALING,
        metavar='SIZE',
        help='sizes to measure (default: lite0 d0)')
    parser.add_argument(
        '--work',
        nargs='+',
        default=WORK,
        choices=(*WORK, 'sizes'),
        help='parts to measure: the network, the network in other runtimes, '
        'an image in memory to its boxes, a training step, targets of the '
        'losses, ResizeCrop; and to count: operators and memory of a pass '
        'and, with "train", of a training step; graph breaks and '
        'recompilations, which take minutes (default: all of these); and '
        '"sizes", the few networks that are worth their time at large sizes')
    parser.add_argument(
        '--side',
        type=int,
        help='height and width of the input (default: that of the size)')
    parser.add_argument(
        '--batch-size',
        type=int,
        default=1,
        help='images of a forward pass (default: %(default)s)')
    parser.add_argument(
        '--repeats',
        type=int,
        default=20,
        help='runs whose median is taken (default: %(default)s)')
    parser.add_argument(
        '--threads',
        type=int,
        default=1,
        help='threads of PyTorch (default: %(default)s)')
    parser.add_argument(
        '--compile',
        action='store_true',
        help='also measure the plain network compiled by torch.compile, which '
        'takes minutes; on a GPU as CUDA graphs (default: no)')
    parser.add_argument(
        '--half',
        action='store_true',
        help='also measure the plain network in automatic mixed precision, '
        'bfloat16 on a CPU (default: no)')
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('work_dirs/benchmark'),
        help='folder to write (default: %(default)s)')
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # answers --help before the libraries are imported

import benchmark_cases
import benchmark_facts
import torch
from effdet_bridge import effdet_network, our_network, random_weights
from matplotlib.figure import Figure
from mmdet.utils import register_all_modules
from mmengine.logging import MMLogger
from terminaltables import GithubFlavoredMarkdownTable

from mmdet_efficientdet import plain_network
from mmdet_efficientdet.utils import write_file


def compare(title, functions, repeats, on_gpu):
    """Rows of a table, of functions that are run in turn.

    Args:
        title (str): What they do.
        functions (dict): Name to function; the first one is the unit.
        repeats (int): Runs of each.
        on_gpu (bool): Whether to wait for the GPU.
    """
    times = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            times[name].append(benchmark_facts.seconds(function, on_gpu))
    times = {name: sorted(values[1:]) for name, values in times.items()}
    unit = statistics.median(next(iter(times.values())))
    rows = []
    for name, values in times.items():
        median = statistics.median(values)
        rows.append(
            dict(
                work=title,
                what=name,
                median=median,
                low=values[len(values) // 4],
                high=values[-1 - len(values) // 4],
                ratio=unit / median))
        print(
            f'{title}, {name}: {1000 * median:.1f} ms, x {unit / median:.2f}',
            flush=True)
    return rows


def conditions(args):
    """Where and how the figures were measured."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else \
        'CPU'
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    names = [line.partition(': ')[2] for line in lines if 'model name' in line]
    return (f'{device}, {next(iter(names), platform.machine())}, '
            f'{args.threads} thread(s), median of {args.repeats} runs in turn '
            f'(quartiles in brackets), torch {torch.__version__}, '
            f'effdet {version("effdet")}')


def write_results(rows, caption, out):
    """Writes table, CSV and picture; prints the table."""
    lines = [('work', 'what', 'ms', 'ratio')]
    for row in rows:
        middle, low, high = (f'{1000 * row[key]:.1f}'
                             for key in ('median', 'low', 'high'))
        lines.append((row['work'], row['what'], f'{middle} ({low}-{high})',
                      f'{row["ratio"]:.2f}'))
    text = f'{caption}\n\n{GithubFlavoredMarkdownTable(lines).table}\n'
    print(f'\n{text}')
    write_file(out / 'benchmark.md', text.encode())
    with open(out / 'benchmark.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    figure = Figure(figsize=(9, 0.3 * len(rows) + 1.5), layout='tight')
    axes = figure.subplots()
    names = [f'{row["work"]}: {row["what"]}' for row in rows]
    axes.barh(names[::-1], [row['ratio'] for row in rows][::-1])
    axes.axvline(1, color='black', linewidth=0.5)
    axes.set(xlabel='speed, the first of each group is 1', xscale='log')
    axes.set_title(caption, fontsize=6)
    figure.savefig(out / 'benchmark.png')
    print(out / 'benchmark.png')


def write_facts(facts, out):
    """Writes what was counted, as CSV and Markdown; prints the table."""
    lines = [('size', 'what', 'network', 'value'), *facts]
    text = GithubFlavoredMarkdownTable(lines).table
    print(text)
    write_file(out / 'facts.md', f'{text}\n'.encode())
    with open(out / 'facts.csv', 'w', newline='') as file:
        csv.writer(file).writerows(lines)


def main():
    """Measures, prints and writes."""
    args = parse_args()
    register_all_modules()
    MMLogger.get_current_instance().setLevel('WARNING')
    torch.set_num_threads(args.threads)
    on_gpu = torch.cuda.is_available()
    rows, facts = [], []
    for size in args.size:
        side = args.side or SCALING[size].image_size
        torch.manual_seed(0)
        weights = random_weights(size)
        detector = our_network({
            key: x.clone()
            for key, x in weights.items()
        },
                               size,
                               side=side)
        official = effdet_network(size, (side, side))
        official.load_state_dict(weights, assign=True)
        device = 'cuda' if on_gpu else 'cpu'
        networks = dict(
            effdet=official.to(device),
            detector=detector.to(device),
            plain=plain_network(detector))
        times = {}
        for name in args.work:
            if name == 'graphs':
                with torch.no_grad():
                    facts += benchmark_facts.graph_facts(size, side, networks)
            if name in ('facts', 'graphs'):
                continue
            cases = getattr(benchmark_cases, name)(args, size, side, networks)
            for title, functions in cases.items():
                with torch.set_grad_enabled(name == 'train'):
                    found = compare(title, functions, args.repeats, on_gpu)
                if name in NETWORKS and args.batch_size == 1:
                    times |= {row['what']: row['median'] for row in found}
                rows += found
        if times:
            facts += benchmark_facts.peak_facts(size, side, networks['plain'],
                                                times, device)
        if 'facts' in args.work:
            with torch.no_grad():
                facts += benchmark_facts.facts(size, side, networks)
            if 'train' in args.work:
                facts += benchmark_facts.training_facts(size, side, device)
        # After each size: a later one may take hours.
        args.out.mkdir(parents=True, exist_ok=True)
        if rows:
            write_results(rows, conditions(args), args.out)
        write_facts(facts, args.out)


if __name__ == '__main__':
    main()
