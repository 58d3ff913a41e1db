"""Table, picture and CSV of compare_training.py."""
import csv
import io
import json
import statistics

from scipy import stats
from terminaltables import GithubFlavoredMarkdownTable

from mmdet_efficientdet.utils import write_file

SCORES = ('AP', 'AP50', 'AP75', 'AP_small')


def difference(rows, variant, rate, key, baseline):
    """A score minus that of the baseline with the same seed.

    Args:
        rows (list[dict]): One for each run.
        variant, rate: Which rows.
        key (str): Of ``SCORES``.
        baseline (tuple): Variant and rate of the rows to compare with.

    Returns:
        tuple: Mean, and the half width of the 95 % t interval over seeds;
        None where there are too few.
    """
    scores = {(r['variant'], r['rate'], r['seed']): r[key] for r in rows}
    pairs = [
        score - scores[(*baseline, seed)]
        for (*which, seed), score in scores.items()
        if which == [variant, rate] and (*baseline, seed) in scores
    ]
    if len(pairs) < 2:
        return (pairs[0] if pairs else None), None
    quantile = float(stats.t.ppf(0.975, len(pairs) - 1))
    return (statistics.mean(pairs),
            quantile * statistics.stdev(pairs) / len(pairs)**0.5)


def best_rate(rows, variant='ours'):
    """Of the rates with the most runs, that with the largest mean AP50."""
    scores = {}
    for row in rows:
        if row['variant'] == variant:
            scores.setdefault(row['rate'], []).append(row['AP50'])
    return max(
        scores,
        key=lambda rate: (len(scores[rate]), statistics.mean(scores[rate])))


def summary(rows, variants):
    """A Markdown table with a row for each variant and rate."""
    baseline = 'ours', best_rate(rows)
    lines = [('variant', 'rate', 'runs', *SCORES, 'loss',
              f'AP - ours at {baseline[1]:g} (95 %)', 'AP50 - ours (95 %)')]
    for variant in variants:
        for rate in sorted(
            {r['rate']
             for r in rows if r['variant'] == variant}):
            own = [
                r for r in rows if (r['variant'], r['rate']) == (variant, rate)
            ]
            cells = [f'{statistics.mean(r[key] for r in own):.3f}'
                     for key in (*SCORES, 'loss')]  # yapf: disable
            for key in ('AP', 'AP50'):
                centre, half = difference(rows, variant, rate, key, baseline)
                cells.append('' if centre is None or (
                    variant, rate) == baseline else f'{centre:+.3f}' +
                             (f' +- {half:.3f}' if half else ''))
            lines.append((variant, f'{rate:g}', len(own), *cells))
    return GithubFlavoredMarkdownTable(lines).table


def draw(rows, variants):
    """Draws the AP50 of all runs over the rate; returns a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 6), layout='tight')
    axes = figure.subplots()
    for number, variant in enumerate(variants):
        own = sorted(
            (r['rate'], r['AP50']) for r in rows if r['variant'] == variant)
        if own:
            axes.semilogx(*zip(*own), 'o', color=f'C{number % 10}', alpha=0.5)
            means = [(rate, statistics.mean(s for r, s in own if r == rate))
                     for rate in sorted({r
                                         for r, _ in own})]
            axes.semilogx(*zip(*means), color=f'C{number % 10}', label=variant)
    axes.set(xlabel='peak learning rate', ylabel='AP50 on the validation part')
    axes.grid(alpha=0.3)
    axes.legend()
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def write_results(out, variants, args):
    """Writes results.csv, table.md and results.png from all finished runs."""
    rows = [json.loads(f.read_text()) for f in (out / 'runs').glob('*.json')]
    rows.sort(
        key=lambda r: (variants.index(r['variant']), r['rate'], r['seed']))
    table = summary(rows, variants)
    print(table)
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write_file(out / 'results.csv', file.getvalue().encode())
    text = (f'{table}\n\n{args.steps} steps of 8 pictures at {args.side} px; '
            f'trained with {args.data[0].name}, evaluated on '
            f'{args.data[1].name}. Differences are paired by seed; intervals '
            'are of t over the seeds.\n')
    write_file(out / 'table.md', text.encode())
    write_file(out / 'results.png', draw(rows, variants))
