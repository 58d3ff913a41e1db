"""tools/studies/compare_necks.py: folds, statistics, resuming, and one run."""
import csv
import json
import re
from types import SimpleNamespace

import compare_necks
import cv2
import numpy as np
import prepare_trees
import pytest
import study_configs
import study_runs
import torch
import tree_folds
from comparison_report import paired_difference
from mmdet.registry import MODELS
from torch.utils.flop_counter import FlopCounterMode

SETS = dict(
    train=(True, (('a', 0, 0, 240, 280), ('b', 0, 0, 120, 60))),
    test=(False, (('b', 0, 60, 120, 120), )),
    osbs=(False, (('c', 0, 0, 100, 100), )))
FOLDS = ((('a', 0, 0, 240, 100), ), (('a', 0, 100, 240, 190), ),
         (('a', 0, 190, 240, 280), ), (('b', 0, 0, 120, 120), ('c', 0, 0, 100,
                                                               100)))
SIZES = dict(a=(280, 240), b=(120, 120), c=(100, 100))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A small data set, as prepare_trees.py makes it, and its pictures."""
    monkeypatch.setattr(prepare_trees, 'SETS', dict(SETS))
    monkeypatch.setattr(tree_folds, 'FOLDS', FOLDS)
    monkeypatch.setattr(tree_folds, 'TILE', 95)
    generator = np.random.default_rng(0)
    pictures = {}
    for name, (height, width) in SIZES.items():
        pixels = generator.integers(90, 160, (height, width, 3), np.uint8)
        corners = np.mgrid[5:width - 35:40, 5:height - 30:30].reshape(2, -1).T
        boxes = np.hstack([
            corners, corners + generator.integers(16, (30, 24), corners.shape)
        ])
        for x0, y0, x1, y1 in boxes:
            pixels[y0:y1, x0:x1] = 20, 120, 20
        pictures[name] = pixels, boxes.astype(float)
    root = tmp_path / 'data'
    (root / 'images').mkdir(parents=True)
    for name in SETS:
        prepare_trees.write_set(root, name, pictures, 100, 50)
    (root / 'receipt.json').write_text(
        json.dumps(
            dict(settings=dict(window=100, stride=50), files_sha256='abc')))
    return SimpleNamespace(root=root, pictures=pictures)


@pytest.fixture
def command(data, tmp_path):
    """A function that runs the tool; its ``out`` has the results."""

    def run(*args):
        compare_necks.main([
            '--data',
            str(data.root), '--out',
            str(tmp_path / 'out'), '--seeds', '0', *args
        ])

    run.out = tmp_path / 'out'
    return run


def row(variant, seed, fold, ap50):
    return dict(
        variant=variant,
        seed=seed,
        fold=fold,
        AP50=ap50,
        AP=ap50 / 2,
        loss=1.25,
        peak_mb=512.4)


def cost(factor):
    return dict(
        neck_parameters=12345 * factor,
        parameters=3456789,
        neck_multiply_adds=34 * 10**6,
        multiply_adds=553 * 10**6,
        neck_ms=7.25 * factor,
        network_ms=25.75 * factor,
        step_ms=250 * factor)


@pytest.fixture
def fake_runs(monkeypatch):
    """Replaces the processes; lists the runs they would have made."""
    made = []

    class Process:
        exitcode = 0

        def __init__(self, target, args):
            self.target, self.args = target, args

        def start(self):
            if self.target is compare_necks.measure:
                _, variants, _, out, _ = self.args
                made.append(tuple(variants))
                (out / 'costs.json').write_text(
                    json.dumps({v: cost(1 + (v != 'fpn'))
                                for v in variants}))
                return
            _, *task, _, out, _ = self.args
            made.append(tuple(task))
            if task[0] == 'nasfpn':
                self.exitcode = -9
            else:
                compare_necks.result_file(out, *task).write_text(
                    json.dumps(row(*task, 0.5)))

        def join(self):
            pass

    context = SimpleNamespace(
        Process=Process, set_forkserver_preload=lambda names: None)
    monkeypatch.setattr(compare_necks.multiprocessing, 'get_context',
                        lambda method: context)
    return made


def test_photographs_from_windows(data):
    photographs = tree_folds.read_photographs(data.root)
    assert set(photographs) == set(data.pictures)
    for name, (pixels, boxes) in data.pictures.items():
        got_pixels, got_boxes = photographs[name]
        assert np.array_equal(got_pixels, pixels)
        assert sorted(got_boxes.tolist()) == sorted(boxes.tolist())


def test_folds_share_no_pixel_and_no_tree(data, tmp_path):
    out = tmp_path / 'folds'
    tree_folds.write_folds(data.root, out)
    covered = {name: np.zeros(size, int) for name, size in SIZES.items()}
    centres = []
    for fold in range(4):
        seen = {name: np.zeros(size, int) for name, size in SIZES.items()}
        for kind in ('train', 'test'):
            coco = json.loads((out / f'{kind}_{fold}.json').read_text())
            corners = {}
            for image in coco['images']:
                name, x, y, _ = image['file_name'].split('_')
                x, y = corners[image['id']] = int(x[1:]), int(y[1:])
                h, w = image['height'], image['width']
                pixels = cv2.imread(str(out / 'images' / image['file_name']))
                original = data.pictures[name][0][y:y + h, x:x + w]
                assert np.array_equal(pixels, original)
                if kind == 'train':
                    seen[name][y:y + h, x:x + w] = 1
                else:
                    assert not seen[name][y:y + h, x:x + w].any()
                    covered[name][y:y + h, x:x + w] += 1
                    assert max(h, w) <= 95
            if kind == 'test':
                centres.append(len(coco['annotations']))
    assert all((pixels == 1).all() for pixels in covered.values())
    # Each tree has its centre in one fold, and is counted there only.
    expected = []
    for areas in FOLDS:
        trees = 0
        for name, x0, y0, x1, y1 in areas:
            middle = data.pictures[name][1].reshape(-1, 2, 2).mean(1)
            trees += ((middle > (x0, y0)) & (middle <= (x1, y1))).all(1).sum()
        expected.append(trees)
    assert centres == expected
    assert sum(centres) == sum(len(b) for _, b in data.pictures.values())


def test_folds_cover_the_trees_of_the_shipped_sets():
    """The areas of the folds are those of the data, each pixel once."""
    areas = {}
    for name in ('train', 'test', 'osbs'):
        for source, x0, y0, x1, y1 in prepare_trees.SETS[name][1]:
            areas[source] = areas.get(source, 0) + (x1 - x0) * (y1 - y0)
    canvas = {'crop2': (2472, 2299), 'crop': (1035, 1249), 'osbs': (400, 400)}
    assert areas == {name: h * w for name, (h, w) in canvas.items()}
    counts = {name: np.zeros(size, int) for name, size in canvas.items()}
    for fold in tree_folds.FOLDS:
        for source, x0, y0, x1, y1 in fold:
            counts[source][y0:y1, x0:x1] += 1
    assert all((count == 1).all() for count in counts.values())


def test_paired_difference():
    # The seeds of the baseline are not alike: pairs are of a seed, too.
    rows = [
        row('fpn', seed, fold, 0.2 + fold + 5 * seed) for seed in (0, 1, 3)
        for fold in (0, 1, 2)
    ]
    for fold, (first, second) in enumerate(((0, .2), (.1, .3), (.4, .2))):
        rows.append(row('bifpn', 0, fold, 0.2 + fold + first))
        rows.append(row('bifpn', 1, fold, 5.2 + fold + second))
    rows.append(row('bifpn', 2, 0, 0.9))  # without its pair
    centre, half = paired_difference(rows, 'bifpn', 'fpn')
    # 0.1, 0.2 and 0.3: t(0.975, 2) = 4.302653, deviation 0.1.
    assert centre == pytest.approx(0.2)
    assert half == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)
    one = [r for r in rows if r['fold'] == 0]
    assert paired_difference(one, 'bifpn', 'fpn') == (pytest.approx(0.1), None)
    assert paired_difference(rows, 'pafpn', 'fpn') == (None, None)


@pytest.mark.slow
def test_resume_and_refusal(command, fake_runs, capsys):
    command('--variants', 'fpn', 'bifpn', '--folds', '0', '1')
    expected = [('fpn', 0, 0), ('bifpn', 0, 0), ('fpn', 0, 1), ('bifpn', 0, 1),
                ('fpn', 'bifpn')]
    assert fake_runs == expected
    (command.out / 'runs' / 'bifpn_seed0_fold0.json').unlink()
    command('--variants', 'bifpn', '--folds', '0', '1')
    assert fake_runs == [*expected, ('bifpn', 0, 0)]
    assert '1 of 2 runs are there' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='steps 200 there and 7 now'):
        command('--variants', 'pafpn', '--steps', '7')
    with pytest.raises(SystemExit, match="study 'necks' there and 'scaling'"):
        command('--study', 'scaling')
    with pytest.raises(SystemExit, match='nasfpn_seed0_fold0 ended with -9'):
        command('--variants', 'nasfpn', 'pafpn', '--folds', '0')
    assert fake_runs[-1] == ('nasfpn', 'pafpn')  # have no costs yet
    assert len(list((command.out / 'runs').glob('*.json'))) == 5
    with pytest.raises(SystemExit, match='2'):
        command('--variants', 'compound')
    assert "the study 'necks' has fpn, pafpn" in capsys.readouterr().err


@pytest.mark.slow
def test_table_and_picture(command, fake_runs):
    runs = command.out / 'runs'
    runs.mkdir(parents=True)
    for variant, differences in dict(
            fpn=(0, 0, 0, 0),
            bifpn=(.10, .11, .09, .10),
            pafpn=(-.10, -.11, -.09, -.10),
            bifpn_sum=(-.1, .1, .2, -.1)).items():
        for fold, difference in enumerate(differences):
            result = row(variant, 0, fold, 0.4 + fold / 10 + difference)
            compare_necks.result_file(command.out, variant, 0,
                                      fold).write_text(json.dumps(result))
    command('--variants', 'fpn', 'pafpn', 'bifpn', 'bifpn_sum')
    assert fake_runs == [('fpn', 'pafpn', 'bifpn', 'bifpn_sum')]
    text = re.sub(' +', ' ', (command.out / 'table.md').read_text())
    assert ('| fpn | 4 | 0.550 | | | 0.275 | 1.250 | | 12 | 3,457 | 34 | 553 '
            '| 7.2 ms | 25.8 ms | 250.0 ms | 512 |\n') in text
    assert ('| bifpn | 4 | 0.650 | +0.100 [+0.087, +0.113] | better | 0.325 '
            '| 1.250 | +0.000 [+0.000, +0.000] | 25 | 3,457 | 34 | 553 '
            '| x 2.00 | x 2.00 | x 2.00 | 512 |\n') in text
    assert '[-0.113, -0.087] | worse |' in text
    assert '| bifpn_sum | 4 | 0.575 | +0.025 [-0.214, +0.264] | no: 0 is' \
        in text
    assert '200 steps of 4 windows at 256 px, backbone' in text
    assert 'Command: `python ' in text
    with (command.out / 'results.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [(r['variant'], r['fold']) for r in rows
            ] == [(variant, str(fold))
                  for variant in ('fpn', 'pafpn', 'bifpn', 'bifpn_sum')
                  for fold in range(4)]
    assert float(rows[8]['AP50']) == 0.5 and rows[8]['neck_ms'] == '14.5'
    picture = cv2.imread(str(command.out / 'results.png'))
    assert picture.shape == (300, 1500, 3) and picture.std() > 10


def test_a_run_has_the_data_of_its_fold_and_its_seed():
    cfg = study_configs.make_config('necks', 'fpn', 2, 3, 9, 'folds')
    train, test = cfg.train_dataloader.dataset, cfg.test_dataloader.dataset
    assert train.data_root == test.data_root == 'folds/'
    assert train.ann_file == 'train_3.json' and test.ann_file == 'test_3.json'
    assert cfg.test_evaluator.ann_file == 'folds/test_3.json'
    assert cfg.randomness.seed == 2
    assert cfg.train_cfg.max_iters == 9
    assert cfg.model.backbone.frozen_stages == 5


@pytest.mark.parametrize('variant, kind, fusion, layers', [
    ('fpn', 'FPN', None, None),
    ('pafpn', 'PAFPN', None, None),
    ('nasfpn', 'NASFPN', None, 3),
    ('bifpn', 'BiFPN', 'fast_normalized', 3),
    ('bifpn_softmax', 'BiFPN', 'softmax', 3),
    ('bifpn_sum', 'BiFPN', 'sum', 3),
    ('bifpn_unbounded', 'BiFPN', 'unbounded', 3),
    ('bifpn_1_layer', 'BiFPN', 'fast_normalized', 1),
    ('bifpn_2_layers', 'BiFPN', 'fast_normalized', 2),
])
def test_necks(variant, kind, fusion, layers):
    cfg = study_configs.make_config('necks', variant, 0, 0, 9, 'folds')
    neck = MODELS.build(cfg.model.neck)
    assert type(neck).__name__ == kind
    if kind == 'BiFPN':
        assert {node.fusion
                for layer in neck.layers
                for node in layer.nodes} == {fusion}
        assert len(neck.layers) == layers
    if kind == 'NASFPN':
        assert neck.stack_times == layers


@pytest.mark.slow
def test_heads_start_equal(data, tmp_path):
    tree_folds.write_folds(data.root, tmp_path / 'folds')

    def head(variant, seed):
        cfg = study_configs.make_config('necks', variant, seed, 0, 9,
                                        tmp_path / 'folds')
        cfg.work_dir = str(tmp_path / variant)
        cfg.model.backbone.init_cfg = None
        model = study_runs.build_runner(cfg).model
        model.init_weights()  # as the training begins
        kernels = model.bbox_head.state_dict().values()
        return torch.cat([x.flatten() for x in kernels])

    first = head('fpn', 1)
    assert torch.equal(first, head('bifpn', 1))
    assert not torch.equal(first, head('fpn', 2))


@pytest.mark.parametrize('study', study_configs.STUDIES)
def test_variants_differ_in_nothing_else(study):
    """Data, schedule and head are those of the baseline, but for its size."""
    first, *others = study_configs.STUDIES[study]
    expected = study_configs.make_config(study, first, 0, 0, 9, 'folds')
    for variant in others:
        config = study_configs.make_config(study, variant, 0, 0, 9, 'folds')
        side = config.image_size
        for part in (config, expected):
            part.model.neck = part.model.bbox_head = part.image_size = None
            for loader in (part.train_dataloader, part.test_dataloader):
                for transform in loader.dataset.pipeline:
                    transform.pop('image_size', None)
                    scale = transform.pop('scale_factor', None)
                    assert scale in (None, 1.2 * side / 256, 1.2)
        assert config.to_dict() == expected.to_dict()


@pytest.mark.slow
def test_scaling_spends_the_same():
    """All but the baseline have equal multiply-adds, within 1 %."""
    spent = {}
    for variant in study_configs.STUDIES['scaling']:
        config = study_configs.make_config('scaling', variant, 0, 0, 9, '')
        config.model.backbone.init_cfg = None
        model = MODELS.build(config.model).eval()
        image = torch.zeros(1, 3, config.image_size, config.image_size)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(image)
        spent[variant] = counter.get_total_flops() / 2e6
    assert 550 < spent.pop('lite0') < 560
    assert max(spent.values()) < 1.01 * min(spent.values())
    assert 780 < min(spent.values()) < 790


@pytest.mark.slow
def test_real_run(command, monkeypatch):
    monkeypatch.setattr(compare_necks, 'REPEATS', 3)
    command('--variants', 'fpn', 'bifpn_1_layer', '--folds', '1', '--steps',
            '2', '--jobs', '2')
    name = 'bifpn_1_layer_seed0_fold1'
    result = json.loads((command.out / 'runs' / f'{name}.json').read_text())
    assert set(result) == set(row('bifpn', 0, 0, 0))
    assert 0 <= result['AP'] <= result['AP50'] <= 1
    assert 0 < result['loss'] < 10
    assert 100 < result['peak_mb'] < 4000
    log = (command.out / 'logs' / f'{name}.log').read_text()
    assert 'Iter(test) [3/3]' in log
    costs = json.loads((command.out / 'costs.json').read_text())
    assert list(costs) == ['fpn', 'bifpn_1_layer']
    for own in costs.values():
        assert set(own) == set(cost(1))
        assert 0 < own['neck_ms'] < own['network_ms'] < own['step_ms']
        assert own['neck_parameters'] < own['parameters'] < 4e6
    assert costs['fpn']['neck_multiply_adds'] == 58408960
    assert costs['bifpn_1_layer']['neck_multiply_adds'] == 18166016
    # Laterals and outputs of P3 to P5, two levels of stride 2; with norms.
    widths, kernels = (40, 112, 320), 5 * 9 * 64 * 64
    kernels += 64 * sum(widths) + 9 * 64 * (320 - 64)
    assert costs['fpn']['neck_parameters'] == kernels + 8 * 2 * 64
