"""Show in one page how a training went and where the detector fails.

Example:
    python -m mmdet_efficientdet report my_config.py work_dirs/my_config \\
        --results results.bbox.json

Draws the losses, the learning rate and the AP that train.py has logged in the
work directory. With --results, the page also has the AP of each class and at
other IoUs, the kinds of error, the offsets of the boxes, the recall by size,
and the worst images with the ground truth at the left and the predictions at
the right. Results are detections of any detector as a JSON file in COCO's
format. MMDetection's test.py writes results.bbox.json if you add
    --cfg-options test_evaluator.outfile_prefix=results

The page is one HTML file, which needs no network.
"""
import argparse
import html
import io
import json
import math
from pathlib import Path

from mmengine.config import DictAction


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog='python -m mmdet_efficientdet report',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of the training')
    parser.add_argument(
        'work_dir', type=Path, help='the --work-dir of train.py')
    parser.add_argument(
        '--results',
        type=Path,
        metavar='NAME.bbox.json',
        help="detections in COCO's format (default: only the curves)")
    parser.add_argument(
        '--out',
        type=Path,
        metavar='PAGE',
        help='page to write; the curves are also written beside it, as .png '
        '(default: WORK_DIR/report.html)')
    parser.add_argument(
        '--num-worst',
        type=int,
        default=20,
        help='number of the worst images to show (default: %(default)s)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='settings of the config to replace, as for test.py')
    return parser.parse_args()


if __name__ == '__main__':
    parse_args()  # answers --help before the libraries are imported

import cv2
import mmcv
import numpy as np
from matplotlib.figure import Figure
from mmdet.datasets.api_wrappers import COCOeval
from mmdet.utils import register_all_modules
from mmengine.registry import init_default_scope
from mmengine.utils import track_iter_progress
from report_parts.detection_errors import (class_rows, count_boxes, draw_image,
                                           evaluate)
from report_parts.error_kinds import matches_of
from report_parts.page import (ABOUT, PAGE, WORST_ABOUT, box_part, embed,
                               html_table)

from mmdet_efficientdet.utils import read_config, write_file

CURVES = {
    'Loss': lambda key: 'loss' in key,
    'Learning rate': lambda key: key.endswith('lr'),
    'AP': lambda key: key.endswith(('mAP', 'mAP_50', 'AP50'))
}
# The first columns of COCOeval.stats.
SUMMARY = ('AP', 'AP50', 'AP75', 'AP small', 'AP medium', 'AP large')


def read_scalars(work_dir: Path) -> list:
    """What all starts of one training have logged, in the order of steps.

    A resumed training repeats the steps after its checkpoint; the later start
    counts.

    Args:
        work_dir (Path): Has one folder for each start, named by its time.

    Returns:
        list[dict]: The numbers of one moment by name. ``step`` counts
        iterations, also for validations.

    Raises:
        ValueError: If there are none.
    """
    records = []
    for file in sorted(work_dir.glob('*/vis_data/scalars.json')):
        # The last line is empty, or was cut off by a kill.
        start = [
            json.loads(line) for line in file.read_text().split('\n')[:-1]
        ]
        first = next((r['step'] for r in start if 'loss' in r), math.inf)
        records = [r for r in records if r['step'] < first]
        last = records[-1]['step'] if records else 0
        # mmengine may count validations in epochs, or not at all.
        for record in start:
            last = record['step'] = max(last, record['step'])
        records += start
    if not records:
        raise ValueError(
            f'{work_dir} has no */vis_data/scalars.json with numbers. Give '
            'the --work-dir of train.py; a training writes them every '
            'default_hooks.logger.interval steps, with a LocalVisBackend')
    # A resumed training may make a validation again.
    return list({(r['step'], 'loss' in r): r for r in records}.values())


def draw_curves(records: list) -> bytes:
    """Draws one panel for each of CURVES; returns a PNG."""
    figure = Figure(figsize=(16, 4.5), layout='tight')
    panels = figure.subplots(1, len(CURVES), sharex=True)
    for panel, (title, belongs) in zip(panels, CURVES.items()):
        keys = dict.fromkeys(key for record in records for key in record)
        for name in filter(belongs, keys):
            points = [(r['step'], r[name]) for r in records if name in r]
            panel.plot(*zip(*points), '.-', label=name)
        if panel.lines:
            panel.legend()
            panel.set_ylim(bottom=0)
        else:
            panel.text(
                0.5,
                0.5,
                'not logged yet',
                transform=panel.transAxes,
                ha='center')
        panel.set(title=title, xlabel='step')
        panel.grid(alpha=0.3)
    file = io.BytesIO()
    figure.savefig(file, format='png')
    return file.getvalue()


def results_part(evaluation: COCOeval, name: str, num_worst: int) -> list:
    """The parts of the page that are about detections."""
    params = evaluation.params
    matches = matches_of(evaluation)
    threshold, counts = count_boxes(matches)
    found, missed, false = counts
    errors = missed + false
    f1 = 2 * found / np.maximum(2 * found + errors, 1)
    worst = [i for i in np.lexsort((-errors, f1)) if errors[i]][:num_worst]
    total = counts.sum(1)
    seen = len(evaluation.cocoDt.imgToAnns)
    parts = [
        f'<h2>AP of {html.escape(name)}</h2>',
        html_table([SUMMARY, evaluation.stats[:6].tolist()]),
        '<h2>AP of each class</h2>',
        html_table([('class', 'boxes', 'AP', 'AP50'), *class_rows(evaluation)],
                   2),
        ABOUT.format(
            images=len(found),
            seen=seen,
            threshold=threshold,
            found=total[0],
            missed=total[1],
            false=total[2]), *box_part(evaluation, threshold),
        WORST_ABOUT.format(num=len(worst))
    ]
    print(f'Drawing the {len(worst)} worst images')
    for i in track_iter_progress(worst):
        drawn = draw_image(evaluation, [m for m in matches[:, i] if m],
                           threshold)
        data = cv2.imencode('.jpg', mmcv.rgb2bgr(drawn),
                            [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()
        file_name = evaluation.cocoGt.imgs[params.imgIds[i]]['file_name']
        parts.append(
            f'<p>{html.escape(file_name)}: {found[i]} found, {missed[i]} '
            f'missed, {false[i]} false, F1 {f1[i]:.2f}<br></p>\n'
            f'{embed("jpeg", data)}')
    return parts


def main() -> None:
    """Writes the page and the curves."""
    args = parse_args()
    cfg = read_config(args.config, args.cfg_options)
    register_all_modules(init_default_scope=False)
    init_default_scope(cfg.get('default_scope', 'mmdet'))

    curves = draw_curves(read_scalars(args.work_dir))
    body = [embed('png', curves, 'curves')]
    if args.results:
        body += results_part(
            evaluate(cfg, args.results), args.results.name, args.num_worst)
    title = html.escape(Path(args.config).stem)
    out = args.out or args.work_dir / 'report.html'
    write_file(out.with_suffix('.png'), curves)
    write_file(out, PAGE.format(title=title, body='\n'.join(body)).encode())
    print(out)


if __name__ == '__main__':
    try:
        main()
    except ValueError as error:
        raise SystemExit(f'{error}\nNothing was written.') from error
