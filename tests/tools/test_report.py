"""The page of tools/report.py, with known errors and known AP."""
import base64
import copy
import html
import json
import os
import re
import sys
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
import report
from helpers.tiny_data import make_dataset, run_tool, trained_run, write_config
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from report_parts.detection_errors import count_boxes
from report_parts.error_kinds import kind_of
from tensorboard.backend.event_processing.event_accumulator import \
    EventAccumulator

WIDTH = 1280  # of two drawings beside each other


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A short training by train.py, shared with other files."""
    return trained_run(tmp_path_factory.getbasetemp())


@pytest.fixture
def make_page(run, tmp_path, monkeypatch):
    """A function that writes results and the page; returns its text."""

    def make(results=None, config=run.config, work_dir=run.work_dir):
        command = ['report.py', config, work_dir, '--out', tmp_path / 'a.html']
        if results is not None:
            file = tmp_path / 'results.bbox.json'
            file.write_bytes(
                results if isinstance(results, bytes) else json.dumps(results).
                encode())
            command += ['--results', file]
        monkeypatch.setattr(sys, 'argv', list(map(str, command)))
        report.main()
        return (tmp_path / 'a.html').read_text()

    return make


def perfect(root):
    """Each object, once, with a score of 0.9; by image."""
    annotations = json.loads((root / 'coco.json').read_text())['annotations']
    found = {i: [] for i in range(1, 7)}
    for box in annotations:
        if not box['iscrowd']:
            found[box['image_id']].append(
                dict(
                    image_id=box['image_id'],
                    category_id=box['category_id'],
                    bbox=box['bbox'],
                    score=0.9))
    return found


def false_box(image_id, bbox=(2, 2, 20, 20), score=0.9):
    return dict(image_id=image_id, category_id=5, bbox=list(bbox), score=score)


def flat(found):
    return [box for boxes in found.values() for box in boxes]


def pictures(page, kind):
    return [
        base64.b64decode(data)
        for data in re.findall(f'src="data:image/{kind};base64,([^"]+)"', page)
    ]


def rows(page):
    """Cells of all rows of all tables."""
    return [
        tuple(map(html.unescape, re.findall('<td[^>]*>(.*?)</td>', row)))
        for row in re.findall('<tr>.*?</tr>', page)
    ]


def table(page, title):
    """Rows of the table below a heading."""
    part = page[page.index(f'<h2>{title}'):]
    return rows(part[:part.index('</table>')])


class Strict(HTMLParser):
    """Every element is closed, in order, and every attribute written once."""
    void = {'meta', 'br', 'img'}

    def __init__(self, text):
        super().__init__()
        self.open, self.seen = [], set()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        assert all(value is not None for _, value in attributes)
        self.seen.add(tag)
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def unknown_decl(self, data):
        raise AssertionError(data)


def captions(page):
    return re.findall(r'<p>(.*?: \d.*)<br>', page)


def test_curves(make_page, tmp_path):
    """Three losses, two rates and two values of AP are drawn.

    matplotlib's first three colours tell the lines.
    """
    page = make_page()
    data, = pictures(page, 'png')
    assert (tmp_path / 'a.png').read_bytes() == data
    assert not captions(page) and not rows(page)
    image = cv2.imdecode(np.frombuffer(data, np.uint8), 1)[..., ::-1]
    lines = ((31, 119, 180), (255, 127, 14), (44, 160, 44))
    for part, expected in zip(
            np.array_split(image, 3, axis=1), (3, 2, 2), strict=True):
        drawn = [(part == colour).all(-1).sum() > 20 for colour in lines]
        assert drawn == [i < expected for i in range(3)]


def test_scalars_of_a_training(run):
    """Six steps, and the validation after the last."""
    records = report.read_scalars(run.work_dir)
    assert [r['step'] for r in records] == [1, 2, 3, 4, 5, 6, 6]
    assert ['coco/bbox_mAP' in r for r in records] == [False] * 6 + [True]


@pytest.mark.parametrize('counted', ['epochs', 'steps', 'nothing'])
def test_resumed_training(counted, tmp_path):
    """Starts are joined; repeated steps are those of the later start.

    The first start was killed while it wrote, and the second repeats its
    validation. Validations come after steps 4
    and 8, epochs 1 and 2, which the host logs as 1 and 2, 4 and 8, or 0.
    """
    validated = dict(epochs=(1, 2), steps=(4, 8), nothing=(0, 0))[counted]
    starts = dict(
        b=[('AP', validated[0]), (6, 60), (8, 80), ('AP', validated[1])],
        a=[(2, 2), (4, 4), ('AP', validated[0]), (6, 6)])
    for name, records in starts.items():
        folder = tmp_path / name / 'vis_data'
        folder.mkdir(parents=True)
        lines = [
            json.dumps({
                'coco/bbox_mAP': 0.5,
                'step': value
            } if step == 'AP' else dict(loss=value, step=step))
            for step, value in records
        ]
        end = '\n{"loss": 7, "st' if name == 'a' else '\n'
        (folder / 'scalars.json').write_text('\n'.join(lines) + end)
    (tmp_path / 'c').mkdir()  # of a test: no scalars
    assert [(r['step'], r.get('loss', 'AP'))
            for r in report.read_scalars(tmp_path)] == [(2, 2), (4, 4),
                                                        (4, 'AP'), (6, 60),
                                                        (8, 80), (8, 'AP')]


@pytest.mark.slow
def test_resume_and_tensorboard(tmp_path):
    """TensorBoard has loss, rate and AP at the steps of the page's curves."""
    root = make_dataset(tmp_path / 'data')
    config = write_config(
        tmp_path / 'mine.py',
        root,
        extra="visualizer = dict(vis_backends=[dict(type='LocalVisBackend'), "
        "dict(type='TensorboardVisBackend')])")
    work_dir = tmp_path / 'work_dir'
    for epochs in (1, 2):
        done = run_tool(
            'train.py',
            config,
            '--resume',
            '--work-dir',
            work_dir,
            '--cfg-options',
            f'train_cfg.max_epochs={epochs}',
            'train_cfg.val_interval=1',
            cwd=tmp_path)
        assert done.code == 0, done.output
    records = report.read_scalars(work_dir)
    assert [r['step'] for r in records] == [1, 2, 3, 3, 4, 5, 6, 6]
    folders = sorted(work_dir.glob('*/vis_data'))
    assert len(folders) == 2
    for name in ('loss', 'lr', 'coco/bbox_mAP', 'coco/bbox_mAP_50'):
        logged = {}  # the second start validates again after the first epoch
        for folder in folders:
            reader = EventAccumulator(str(folder))
            reader.Reload()
            logged.update({e.step: e.value for e in reader.Scalars(name)})
        expected = [(r['step'], r[name]) for r in records if name in r]
        np.testing.assert_allclose([*logged.items()], expected, rtol=1e-6)


@pytest.mark.slow
def test_worst_images(run, make_page):
    """The order of errors that were made on purpose, and nothing else.

    A class is confused in the second image, the empty third has a false box,
    and the fourth has the most errors, but also an object that is found, as
    has the sixth.
    Detections in the crowd of the fifth do not count, nor does one of low
    score in the first.
    """
    found = perfect(run.root)
    found[2][0]['category_id'] = 15
    found[3].append(false_box(3))
    found[4].pop()
    found[4] += [false_box(4), false_box(4, (60, 80, 30, 40))]
    found[6][1]['bbox'] = [90, 2, 10, 10]
    for _ in range(2):
        found[5].append(dict(found[5][0], bbox=[82, 12, 20, 20]))
    found[1].append(false_box(1, score=0.1))
    page = make_page(flat(found))
    assert captions(page) == [
        '000002.jpg: 0 found, 1 missed, 1 false, F1 0.00',
        '000003.jpg: 0 found, 0 missed, 1 false, F1 0.00',
        '000004.jpg: 1 found, 1 missed, 2 false, F1 0.40',
        '000006.jpg: 1 found, 1 missed, 1 false, F1 0.50'
    ]
    assert 'The 4 worst images' in page
    assert 'Of 6 images, 6 have detections. From the score of\n0.900' in page
    assert '\n5 boxes are found, 3 missed and 5 false' in page
    images = [
        cv2.imdecode(np.frombuffer(data, np.uint8), 1)
        for data in pictures(page, 'jpeg')
    ]
    assert [image.shape
            for image in images] == [(480, WIDTH, 3), (640, WIDTH, 3),
                                     (640, 960, 3), (320, WIDTH, 3)]


@pytest.mark.slow
def test_no_errors(run, make_page):
    """Perfect detections have an AP of 1, and no image is a bad one."""
    page = make_page(flat(perfect(run.root)))
    assert rows(page)[1] == ('1.000', '1.000', '1.000', '-', '1.000', '-')
    assert 'The 0 worst images' in page
    assert not captions(page) and not pictures(page, 'jpeg')


@pytest.mark.parametrize('right', [(1, 0), (0, 1)])
def test_equal_scores_count_together(right):
    """Whichever of two images with a score of 0.5 comes first."""
    matches = np.array([[
        dict(
            gtIgnore=np.zeros(1),
            dtIgnore=np.zeros((1, 1), bool),
            dtScores=[0.5],
            dtMatches=np.full((1, 1), float(match))) for match in right
    ]],
                       dtype=object)
    threshold, (found, missed, false) = count_boxes(matches)
    assert threshold == 0.5
    assert found.tolist() == list(right)
    assert missed.tolist() == false.tolist() == [1 - x for x in right]


def test_all_detections_in_crowds():
    """Then none counts, neither as right nor as false."""
    match = dict(
        gtIgnore=np.array([1, 0]),
        dtIgnore=np.ones((1, 2), bool),
        dtScores=[0.9, 0.8],
        dtMatches=np.ones((1, 2)))
    matches = np.array([[match]], dtype=object)
    assert np.array(count_boxes(matches)[1]).tolist() == [[0], [1], [0]]


def colour_at(image, x, y):
    """The colour of the line that is drawn there."""
    patch = image[max(y - 2, 0):y + 3, max(x - 2, 0):x + 3].reshape(-1, 3)
    blue, green, red = patch.astype(int).T
    for name, seen in (('green', green - np.maximum(red, blue)),
                       ('red', red - np.maximum(green, blue))):
        if (seen > 40).sum() > 4:
            return name
    return 'none'


@pytest.mark.slow
def test_drawing(tmp_path, make_page):
    """Left: a found and a missed object; right: a right and a false box.

    On the fourth image, here grey, 128 x 96 drawn 5 times larger, with ground
    truth of 5 60 50 50 and 50 5 40 40; the lower edge of a box is free of
    text.
    """
    root = make_dataset(tmp_path / 'data')
    config = write_config(tmp_path / 'mine.py', root)
    file = str(root / 'JPEGImages' / '000004.jpg')
    cv2.imwrite(file, np.full((128, 96, 3), 128, np.uint8))
    found = perfect(root)
    kept, lost = found[4]
    found[4] = [kept, false_box(4, (60, 80, 30, 40))]
    # Boxes beyond the border neither move nor shrink the picture.
    found[4].append(false_box(4, (60, 100, 90, 90)))
    data, = pictures(make_page(flat(found), config), 'jpeg')
    image = cv2.imdecode(np.frombuffer(data, np.uint8), 1)
    width = 96 * 5
    assert image.shape == (640, 2 * width, 3)
    assert colour_at(image, 5 * 30, 5 * 110) == 'green'
    assert colour_at(image, 5 * 70, 5 * 45) == 'red'
    assert colour_at(image, 5 * 75, 5 * 120) == 'none'
    assert colour_at(image, width + 5 * 30, 5 * 110) == 'green'
    assert colour_at(image, width + 5 * 75, 5 * 120) == 'red'


@pytest.mark.slow
def test_ap_of_classes(run, make_page):
    """Each object of red, none of green, and one of three of blue is found.

    A recall of a third covers 34 of 101 points of the precision curve.
    """
    boxes = flat(perfect(run.root))
    red = [box for box in boxes if box['category_id'] == 5]
    blue = [box for box in boxes if box['category_id'] == 25]
    page = make_page(red + blue[:1])
    assert rows(page)[:2] == [
        report.SUMMARY, ('0.446', '0.446', '0.446', '-', '0.446', '-')
    ]
    assert table(page, 'AP of each class') == [
        ('class', 'boxes', 'AP', 'AP50'),
        ('green', '2', '0.000', '0.000'),
        ('blue', '3', '0.337', '0.337'),
        ('red', '3', '1.000', '1.000'),
    ]


@pytest.mark.slow
def test_equals_the_hosts_evaluation(run, make_page, tmp_path):
    """test.py writes the results, and its AP is that of the page."""
    done = run_tool(
        'test.py',
        run.config,
        run.work_dir / 'epoch_2.pth',
        '--cfg-options',
        f'test_evaluator.outfile_prefix={tmp_path}/results',
        'test_evaluator.classwise=True',
        cwd=tmp_path)
    assert done.code == 0, done.output
    written = (tmp_path / 'results.bbox.json').read_bytes()
    page = make_page(written)
    logged, = re.findall('bbox_mAP_copypaste: (.*)', done.output)
    logged = tuple('-' if x == '-1.000' else x for x in logged.split())
    assert logged[1] != '0.000'
    assert rows(page)[1] == logged
    # | category | mAP | mAP_50 |
    printed = re.findall(r'\| (red|green|blue) +\| ([\d.]+) +\| ([\d.]+)',
                         done.output)
    assert {(row[0], float(row[2]), float(row[3]))
            for row in table(page, 'AP of each class')[1:]
            } == {(name, float(ap), float(ap50))
                  for name, ap, ap50 in printed}


def moved(box, x=0, y=0, **other):
    left, top, width, height = box['bbox']
    return dict(box, bbox=[left + x, top + y, width, height], **other)


@pytest.mark.slow
def test_kinds_of_error(run, make_page):
    """One error of each kind, in images of their own, and what it costs.

    The oracle is the AP50 that pycocotools gives for detections that are
    mended by hand.
    """
    found = perfect(run.root)
    first, second = found[1]
    found[1] = [moved(first, 25), second]  # IoU of a third
    found[2][0]['category_id'] = 15
    found[3].append(false_box(3, score=0.95))
    found[4].append(dict(found[4][0]))
    found[5][0] = moved(found[5][0], 25, category_id=25)
    del found[6][1]
    page = make_page(flat(found))
    listed = {
        row[0]: (int(row[1]), float(row[2]))
        for row in table(page, 'Kinds of error')[1:]
    }
    assert {
        name: n
        for name, (n, _) in listed.items()
    } == dict({
        'localisation': 1,
        'class': 1,
        'both': 1,
        'duplicate': 1,
        'background': 1,
        'missed': 2  # the one of 'both', and that of the last image
    })

    def ap50(found, lost=()):
        """By pycocotools, without this package."""
        truth = COCO(str(run.root / 'coco.json'))
        truth.dataset['annotations'] = [
            box for box in truth.dataset['annotations']
            if box['id'] not in lost
        ]
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(flat(found)), 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return evaluation.stats[1]

    before = ap50(found)

    def gain(image, change=None, lost=()):
        mended = copy.deepcopy(found)
        if change:
            change(mended[image])
        return ap50(mended, lost) - before

    ids = [
        box['id']
        for box in json.loads((run.root /
                               'coco.json').read_text())['annotations']
        if box['image_id'] in (5, 6) and not box['iscrowd']
    ]
    expected = {
        'localisation': gain(1, lambda boxes: boxes[0].update(first)),
        'class': gain(2, lambda boxes: boxes[0].update(category_id=25)),
        'both': gain(5, lambda boxes: boxes.pop(0)),
        'duplicate': gain(4, lambda boxes: boxes.pop()),
        'background': gain(3, lambda boxes: boxes.pop()),
        'missed': gain(0, lost=[ids[0], ids[2]])
    }
    assert max(expected.values()) > 0.1
    assert {
        name: g
        for name, (_, g) in listed.items()
    } == pytest.approx(
        expected, abs=6e-4)


@pytest.mark.parametrize('iou, same, kind, index', [
    ([], [], 'background', -1),
    ([0.09], [True], 'background', -1),
    ([0.1], [True], 'localisation', 0),
    ([0.1], [False], 'both', -1),
    ([0.5], [True], 'duplicate', -1),
    ([0.5], [False], 'class', 0),
    ([0.6, 0.3], [False, True], 'localisation', 1),
    ([0.6, 0.7], [False, True], 'class', 0),
])
def test_kind_of_one_box(iou, same, kind, index):
    """The categories of TIDE, in its order: place, class, duplicate."""
    assert kind_of(np.array(iou), np.array(same, bool)) == (kind, index)


@pytest.mark.slow
def test_offsets_and_recall(run, make_page):
    """Boxes that lie 5 pixels to the right and are 4 pixels too high."""
    found = perfect(run.root)
    for box in flat(found):
        x, y, w, h = box['bbox']
        box['bbox'] = [x + 5, y - 2, w, h + 4]
    del found[6]
    page = make_page(flat(found))
    lie = {row[0]: row[1:5] for row in table(page, 'Where boxes lie')[1:]}
    assert lie == {
        'centre x': ('+5.0 px', ) * 4,
        'centre y': ('+0.0 px', ) * 4,
        'width': ('+0.0 px', ) * 4,
        'height': ('+4.0 px', ) * 4
    }
    assert table(page,
                 'Recall by size')[1:] == [('32 to 64', '8', '0.750', '0.750')]
    values = [row[1] for row in table(page, 'AP at other IoUs')[1:]]
    assert values[:4] == values[:1] * 4 and 0.5 < float(values[0]) < 1


@pytest.mark.slow
def test_hostile_names(tmp_path, make_page):
    """Names of classes and files are text, and nothing is fetched."""
    root = make_dataset(tmp_path / 'data')
    name = '<img src=x onerror=alert(1)>&amp;.jpg'
    classes = ('<script>alert(1)</script>', r'$\nothing{$', '"never" & <b>')
    coco = json.loads((root / 'coco.json').read_text())
    for category, text in zip(coco['categories'], classes, strict=True):
        category['name'] = text
    coco['images'][0]['file_name'] = name
    coco['annotations'] = [
        box for box in coco['annotations'] if box['category_id'] != 25
    ]
    (root / 'coco.json').write_text(json.dumps(coco))
    (root / 'JPEGImages' / '000001.jpg').rename(root / 'JPEGImages' / name)
    config = write_config(tmp_path / '<i>mine.py', root, classes=classes)
    boxes = flat(perfect(root))
    page = make_page([box for box in boxes if box['image_id'] == 4], config)
    assert len(pictures(page, 'jpeg')) == 3
    listed = table(page, 'AP of each class')[1:]
    assert [row[0] for row in listed] == [classes[1], classes[0], classes[2]]
    assert listed[-1] == (classes[2], '0', '-', '-')
    assert Strict(page).seen == {
        'html', 'meta', 'title', 'style', 'h1', 'h2', 'img', 'div', 'table',
        'tr', 'td', 'p', 'br'
    }
    assert any(
        html.unescape(line).startswith(f'{name}: ') for line in captions(page))
    text = re.sub('src="data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+"', '',
                  page)
    for word in ('http:', 'https:', '//', 'src=', 'href', 'url(', '@import'):
        assert word not in text.replace(html.escape(name), '')


ONE = dict(image_id=1, category_id=5, bbox=[1, 2, 3, 4], score=0.5)
# What is wrong: (results, words of the message).
WRONG = dict(
    image=([ONE, dict(ONE, image_id=99)], 'image_id 99'),
    category=([dict(ONE, category_id=0)], 'category_id 0'),
    bbox=([ONE, dict(ONE, bbox=[1, 2, 3])], '4 finite numbers'),
    score=([dict(image_id=1, category_id=5, bbox=[1, 2, 3, 4])], 'score'),
    nan=([dict(ONE, score=float('nan'))], '4 finite numbers'),
    empty=([], 'there are none'),
    number=([1], 'TypeError'),
    pickle=(b'\x80\x04\x95', 'pickle of its --out is not read'))


@pytest.mark.slow
@pytest.mark.parametrize('name', WRONG)
def test_wrong_results(name, make_page, tmp_path):
    """The message names the file and what to write; no page appears."""
    results, words = WRONG[name]
    with pytest.raises(ValueError, match='results.bbox.json') as error:
        make_page(results)
    assert words in str(error.value)
    assert 'test_evaluator.outfile_prefix=' in str(error.value)
    assert not list(tmp_path.glob('a.*'))


VOC = """
voc = dict(
    type='VOCDataset',
    ann_file='ids.txt',
    data_prefix=dict(_delete_=True, sub_data_root=''))
test_dataloader['dataset'] = dict(dataset, **voc)
test_evaluator = dict(_delete_=True, type='VOCMetric')
"""
RESULTS_OF_VOC = """
_base_ = {!r}
pipeline = _base_.test_dataloader.dataset.pipeline
pipeline[-1].meta_keys += ('instances', )
test_dataloader = dict(dataset=dict(pipeline=pipeline))
test_evaluator = dict(
    _delete_=True, type='CocoMetric', outfile_prefix='results')
"""


@pytest.mark.slow
@pytest.mark.parametrize('difficult', [0, 1])
def test_voc(difficult, run, make_page, tmp_path):
    """Results by the config in docs/training.md have the host's AP.

    The second green box, which the host ignores if it is difficult, is not
    found.
    """
    root = make_dataset(tmp_path / 'data')
    file = root / 'Annotations' / '000005.xml'
    start, _, end = file.read_text().rpartition('<difficult>0')
    file.write_text(f'{start}<difficult>{difficult}{end}')
    config = write_config(tmp_path / 'mine.py', root, extra=VOC)
    results = tmp_path / 'results.py'
    results.write_text(RESULTS_OF_VOC.format(str(config)))
    done = run_tool(
        'test.py', results, run.work_dir / 'epoch_2.pth', cwd=tmp_path)
    assert done.code == 0, done.output
    page = make_page((tmp_path / 'results.bbox.json').read_bytes(), config)
    logged, = re.findall('bbox_mAP_copypaste: (.*)', done.output)
    logged = tuple('-' if x == '-1.000' else x for x in logged.split())
    assert logged[1] != '0.000'
    assert rows(page)[1] == logged
    assert {line[:10] for line in captions(page)} >= {'000001.jpg'}
    counts = {row[0]: row[1] for row in table(page, 'AP of each class')[1:]}
    assert counts == dict(red='3', green=str(3 - difficult), blue='3')


@pytest.mark.parametrize('extra, words', [
    ("test_evaluator = [dict(type='VOCMetric')] * 2", 'one CocoMetric or'),
    ('test_dataloader = dict(dataset=dict(dataset, indices=3))',
     'has 3 images'),
])
def test_wrong_config(extra, words, run, make_page, tmp_path):
    config = write_config(tmp_path / 'mine.py', run.root, extra=extra)
    with pytest.raises(ValueError, match=words):
        make_page([ONE], config)


def test_no_training(make_page, tmp_path):
    with pytest.raises(ValueError, match='Give the --work-dir of train.py'):
        make_page(work_dir=tmp_path)


def test_interrupted_writing(make_page, tmp_path, monkeypatch):
    """Page and curves of before stay as they were."""
    for name in ('a.html', 'a.png'):
        (tmp_path / name).write_text('before')

    def fail(*_):
        raise OSError('no space left on device')

    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(OSError, match='no space'):
        make_page()
    for name in ('a.html', 'a.png'):
        assert (tmp_path / name).read_text() == 'before'
