"""Table, picture and CSV of compare_necks.py."""
import csv
import io
import json
import os
import platform
import statistics
import sys

import tree_folds
from scipy import stats
from terminaltables import GithubFlavoredMarkdownTable

from mmdet_efficientdet.utils import write_file


def paired_difference(rows, variant, baseline, key='AP50'):
    """A score of a variant minus that of the baseline.

    The seeds of a fold share its data, so that they are averaged first, and
    the folds are the sample.

    Returns:
        tuple: Mean, and the half width of the 95 % t interval; either is None
        if there are too few folds.
    """
    scores = {(r['variant'], r['fold'], r['seed']): r[key] for r in rows}
    by_fold = {}
    for (name, *place), score in scores.items():
        if name == variant and (baseline, *place) in scores:
            by_fold.setdefault(place[0],
                               []).append(score - scores[(baseline, *place)])
    folds = [statistics.mean(values) for values in by_fold.values()]
    if len(folds) < 2:
        return (folds[0] if folds else None), None
    quantile = stats.t.ppf(0.975, len(folds) - 1)
    return (statistics.mean(folds),
            float(quantile * statistics.stdev(folds) / len(folds)**0.5))


def summary(rows, costs, variants):
    """A Markdown table with one row for each variant.

    Args:
        rows (list[dict]): One for each run.
        costs (dict): Of the variants that have been measured.
        variants (list[str]): Of the study; the first is the baseline.
    """
    baseline = variants[0]
    lines = [('', 'runs', 'AP50', f'AP50 - {baseline} (95 %)', 'shown', 'AP',
              'loss', f'loss - {baseline} (95 %)', 'neck par. (k)',
              'all par. (k)', 'neck mult.-adds (M)', 'all mult.-adds (M)',
              'neck time', 'network time', 'step time', 'peak (MB)')]
    for variant in variants:
        own = [r for r in rows if r['variant'] == variant]
        if not own:
            continue
        centre, half = paired_difference(rows, variant, baseline)
        shown = ''
        if variant != baseline and half is not None:
            shown = 'no: 0 is inside'
            if abs(centre) > half:
                shown = 'better' if centre > 0 else 'worse'
        means = [
            f'{statistics.mean(r[key] for r in own):.3f}'
            for key in ('AP50', 'AP', 'loss')
        ]
        lines.append((variant, len(own), means[0],
                      _difference(rows, variant, baseline,
                                  'AP50'), shown, *means[1:],
                      _difference(rows, variant, baseline,
                                  'loss'), *_costs(costs, variant, baseline),
                      f'{statistics.median(r["peak_mb"] for r in own):,.0f}'))
    return GithubFlavoredMarkdownTable(lines).table


def _difference(rows, variant, baseline, key):
    """A cell: the paired difference and its interval."""
    centre, half = paired_difference(rows, variant, baseline, key)
    if variant == baseline or half is None:
        return ''
    return f'{centre:+.3f} [{centre - half:+.3f}, {centre + half:+.3f}]'


def _costs(costs, variant, baseline):
    """Cells: sizes, then the baseline's times and others' ratios to them."""
    if variant not in costs:
        return [''] * 7
    own = costs[variant]
    units = dict(
        neck_parameters=1e3,
        parameters=1e3,
        neck_multiply_adds=1e6,
        multiply_adds=1e6)
    cells = [f'{own[key] / unit:,.0f}' for key, unit in units.items()]
    for key in ('neck_ms', 'network_ms', 'step_ms'):
        if variant == baseline or baseline not in costs:
            cells.append(f'{own[key]:.1f} ms')
        else:
            cells.append(f'x {own[key] / costs[baseline][key]:.2f}')
    return cells


def conditions(out, settings):
    """What the numbers are of: the lines below the table."""
    trees, windows = [], []
    for fold in range(len(tree_folds.FOLDS)):
        test, train = (
            json.loads((out / 'folds' / f'{name}_{fold}.json').read_text())
            for name in ('test', 'train'))
        trees.append(f'{len(test["annotations"])}')
        windows.append(f'{len(train["images"])}')
    sides = ', '.join(f'{variant} {side}'
                      for variant, side in settings['sides'].items()
                      if side != settings['image_size'])
    return [
        '', f'Data: {sum(map(int, trees))} trees in three photographs '
        '(tools/prepare_trees.py). Folds by place: thirds of one photograph, '
        f'then the two others. Trees to test on: {", ".join(trees)}; windows '
        f'to train with: {", ".join(windows)}. Test tiles and training '
        'windows of a fold share no pixel, but thirds are neighbours.',
        f'Training: {settings["steps"]} steps of {settings["batch_size"]} '
        f'windows at {settings["image_size"]} px'
        f'{f" ({sides} px)" if sides else ""}, backbone pretrained on '
        f'ImageNet and frozen, else {settings["recipe_name"]}: equal for all, '
        'and chosen for BiFPN with sum fusion, the neck of that config, by a '
        'strip of the second fold (`STRIP` in tools/prepare_trees.py). The '
        'seed gives the order of the data, their augmentation and the start '
        'of the head, equal for all necks, and the start of the neck. Loss: '
        f'mean of the last {settings["last"]} steps.',
        'Interval: t over the folds, of the differences paired by fold and '
        'seed and averaged over seeds first, as seeds share their data. Folds '
        'share training data, too, and the intervals are not corrected for '
        'the number of rows. So few steps are far from convergence: what is '
        'compared is what is learned in them. "No" means that this '
        'comparison cannot tell, not that there is no difference.',
        'Times, of the first row and relative to it: CPU time of one thread, '
        'all variants in turn, medians of '
        f'{settings["repeats"]}; neck and network (without post-processing) '
        f'for one image, training step for {settings["batch_size"]}, '
        'without the loading of data. Multiply-adds of convolutions. Peak: '
        'resident set of a whole training process, of which about 500 MB '
        'are libraries.',
        f'{platform.machine()}, {os.cpu_count()} CPUs, one thread a run; '
        f'torch {settings["torch"]}, mmdet {settings["mmdet"]}, mmcv '
        f'{settings["mmcv"]}, Python {platform.python_version()}.',
        f'Command: `python {" ".join(sys.argv)}`'
    ]


def draw(rows, costs, variants):
    """Draws AP50 of all runs, differences, and cost; returns a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    baseline = variants[0]
    variants = [v for v in variants if any(r['variant'] == v for r in rows)]
    figure = Figure(figsize=(15, 1 + 0.5 * len(variants)), layout='tight')
    left, middle, right = figure.subplots(1, 3, sharey=True)
    for y, variant in enumerate(variants):
        own = [r for r in rows if r['variant'] == variant]
        left.scatter([r['AP50'] for r in own],
                     [y + 0.1 * (r['fold'] - 1.5) for r in own],
                     c=[f'C{r["fold"]}' for r in own],
                     alpha=0.7)
        left.plot(statistics.mean(r['AP50'] for r in own), y, 'k|', ms=22)
        centre, half = paired_difference(rows, variant, baseline)
        if variant != baseline and centre is not None:
            middle.errorbar(centre, y, xerr=half, fmt='ko', capsize=4)
        if variant in costs:
            right.barh(y, costs[variant]['network_ms'], height=0.5, color='C7')
    left.set(
        yticks=range(len(variants)),
        yticklabels=variants,
        ylim=(len(variants) - 0.5, -0.5),
        xlabel='AP50: all runs, a colour and a line for each fold, and mean')
    middle.axvline(0, color='gray')
    middle.set(xlabel=f'AP50 minus {baseline}: mean and 95 % over folds')
    right.set(xlabel='network, one image, one thread (ms)')
    for panel in (left, middle, right):
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def write_results(out, variants, settings):
    """Writes results.csv, table.md and results.png from all finished runs."""
    rows = [json.loads(f.read_text()) for f in (out / 'runs').glob('*.json')]
    if not rows:
        return
    file = out / 'costs.json'
    costs = json.loads(file.read_text()) if file.is_file() else {}
    rows.sort(
        key=lambda r: (variants.index(r['variant']), r['seed'], r['fold']))
    table = summary(rows, costs, variants)
    print(table)
    rows = [{**row, **costs.get(row['variant'], {})} for row in rows]
    names = max(rows, key=len)
    file = io.StringIO()
    writer = csv.DictWriter(file, names, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write_file(out / 'results.csv', file.getvalue().encode())
    write_file(out / 'table.md',
               '\n'.join([table, *conditions(out, settings), '']).encode())
    write_file(out / 'results.png', draw(rows, costs, variants))
