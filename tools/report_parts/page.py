"""The page of report.py: its texts, tables and pictures."""
import base64
import html

import numpy as np
from mmdet.datasets.api_wrappers import COCOeval

from .error_kinds import (KINDS, THRESHOLDS, evaluate_again, gains, offsets,
                          recall_rows, sort_errors)

PAGE = '''<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px sans-serif; max-width: 1300px; margin: 1em auto;
  padding: 0 1em; overflow-wrap: anywhere }}
.wide {{ overflow-x: auto }}
.wide img {{ width: 100%; min-width: 640px }}
.wide .curves {{ min-width: 900px }}
td {{ text-align: right; padding: 2px 8px; background: #eee;
  white-space: nowrap }}
td:first-child, .text {{ text-align: left }}
.text {{ white-space: normal; min-width: 12em }}
.bar {{ min-width: 7em; background: #eee linear-gradient(#9be, #9be) no-repeat
  left }}
.long {{ max-height: 30em; max-width: 100%; overflow: auto }}
</style>
<h1>{title}</h1>
{body}
</html>
'''
ABOUT = '''<p>Of {images} images, {seen} have detections. From the score of
{threshold:.3f} on, which gives the best F1, and at an IoU of 0.5,
{found} boxes are found, {missed} missed and {false} false.</p>'''
KINDS_ABOUT = '''<h2>Kinds of error</h2>
<p>What AP50 gains if all errors of one kind are mended, as in TIDE
(arXiv 2008.08115). The gains do not add up to 1. Boxes are those from that
score on.</p>'''
OFFSETS_ABOUT = '''<h2>Where boxes lie</h2>
<p>Box less object, for the {number} boxes from that score on that match an
object at an IoU of {iou}: positive is too far right, too low, or too
large. The last two columns are relative to the object's sides.</p>'''
WORST_ABOUT = '''<h2>The {num} worst images</h2>
<p>Of the lowest F1; where it is equal, with the most missed and false boxes.
Left: ground truth, green where found, red where missed. Right: predictions
from that score on, green where right, red where false. Grey:
crowds, and predictions in them, which do not count.</p>'''


def html_table(rows: list, bar: int = -1) -> str:
    """Rows of texts, counts and values of AP as HTML.

    Args:
        rows (list): Of cells; the first one has the titles.
        bar (int): A column whose values are also drawn. Defaults to none.
    """
    # The longest bar ends where the numbers begin.
    longest = max((row[bar] for row in rows[1:] if bar >= 0), default=0)
    lines = []
    for row in rows:
        line = ''
        for i, cell in enumerate(row):
            long = isinstance(cell, str) and len(cell) > 25
            style = ' class="text"' if long else ''
            if isinstance(cell, float):
                if i == bar and longest > 0:
                    style = (' class="bar" style="background-size: '
                             f'{0.6 * max(cell, 0) / longest:.1%}"')
                cell = '-' if cell == -1 else f'{cell:.3f}'
            line += f'<td{style}>{html.escape(str(cell))}</td>'
        lines.append(f'<tr>{line}</tr>')
    return '<div class="long"><table>{}</table></div>'.format('\n'.join(lines))


def embed(kind: str, data: bytes, name: str = '') -> str:
    """An image that is part of the page; a narrow window scrolls it."""
    text = base64.b64encode(data).decode()
    return (f'<div class="wide"><img class="{name}" alt="" '
            f'src="data:image/{kind};base64,{text}"></div>')


def box_part(evaluation: COCOeval, threshold: float) -> list:
    """The parts of the page on AP at other IoUs, errors and boxes."""
    values, loose = evaluate_again(evaluation, THRESHOLDS)
    print('Sorting the errors')
    kinds = sort_errors(evaluation)
    growth = gains(evaluation, kinds)
    counts = {
        kind: sum(not box or box['score'] >= threshold for box, _ in pairs)
        for kind, pairs in kinds.items()
    }
    lie = offsets(loose, threshold)
    rows = [('', 'mean', '5 %', 'median', '95 %', 'relative', 'deviation')]
    for i, name in enumerate(('centre x', 'centre y', 'width', 'height')):
        pixels, relative = lie[:, :, i].T
        numbers = [pixels.mean(), *np.percentile(pixels, [5, 50, 95])
                   ] if len(lie) else []
        rows.append(
            (name, *(f'{n:+.1f} px' for n in numbers),
             *(f'{n:+.1%}' for n in ([relative.mean()] if len(lie) else [])),
             *(f'{n:.1%}' for n in ([relative.std()] if len(lie) else []))))
    return [
        '<h2>AP at other IoUs</h2>',
        html_table([('IoU to match', 'AP'),
                    *((f'{t:g}', v) for t, v in zip(THRESHOLDS, values))], 1),
        KINDS_ABOUT,
        html_table([('kind', 'boxes', 'gain of AP50', ''),
                    *((kind, counts[kind], growth[kind], KINDS[kind])
                      for kind in KINDS)], 2),
        OFFSETS_ABOUT.format(number=len(lie), iou=THRESHOLDS[0]),
        html_table(rows),
        '<h2>Recall by size</h2><p>Size: square root of the area, in pixels '
        'of the image; at an IoU of 0.5.</p>',
        html_table([('size', 'objects', 'at any score', 'from that score on'),
                    *recall_rows(evaluation, threshold)], 3),
    ]  # yapf: disable
