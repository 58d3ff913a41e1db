"""README and docs say what the code does; their links and commands work."""
import json
import re
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from mmdet.registry import MODELS
from mmengine.config import Config

from mmdet_efficientdet.scaling import SCALING
from mmdet_efficientdet.weights import published

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / 'docs').glob('*.md'))
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *DOCS]
CONFIGS = ROOT / 'configs'
MMDET_TOOLS = Path(find_spec('mmdet').origin).parent / '.mim' / 'tools'
FOLDERS = 'configs|docs|mmdet_efficientdet|resources|tests|tools'


def pages():
    """Parametrizes a test by all pages."""
    return pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)


def blocks(page, language):
    """The code blocks of a page in one language, without indentation."""
    found = re.findall(rf'^( *)```{language}\n(.*?)^ *```$', page.read_text(),
                       re.M | re.S)
    return [
        re.sub(f'^{indent}', '', text, flags=re.M) for indent, text in found
    ]


def prose(page):
    """A page without its code blocks."""
    return re.sub(r'^ *```.*?^ *```$', '', page.read_text(), flags=re.M | re.S)


def commands(page):
    """The shell commands of a page, each on one line, without comments."""
    text = '\n'.join(blocks(page, 'shell')).replace('\\\n', ' ')
    return [line.split(' #')[0] for line in text.splitlines()]


def table(page, first):
    """Cells of the table whose first column is ``first``, by first cell."""
    lines = page.read_text().splitlines()
    start = next(i for i, line in enumerate(lines)
                 if line.startswith(f'| {first} |'))
    rows = {}
    for line in lines[start + 2:]:
        if not line.startswith('|'):
            break
        cells = [cell.strip(' `') for cell in line.strip('|').split('|')]
        rows[cells[0]] = cells[1:]
    return rows


def test_readme_is_short():
    assert len(PAGES[0].read_text().splitlines()) <= 160


# --------------------------------------------------------------- links -----


def anchors(page):
    """What GitHub names the headings of a page."""
    headings = re.findall(r'^#+ (.*)$', prose(page), re.M)
    return {
        re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
        for heading in headings
    }


@pages()
def test_links(page):
    links = re.findall(r'\]\(([^)]+)\)', prose(page))
    assert links or page.name == 'CHANGELOG.md'
    for link in links:
        if link.startswith('https://'):
            continue
        path, _, anchor = link.partition('#')
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
        # mkdocs renders docs/ alone.
        assert page not in DOCS or ROOT / 'docs' in target.parents, link


@pages()
def test_named_paths_exist(page):
    """In commands, configs and prose; <size> and NAME stand for any."""
    for path in re.findall(rf'(?<![\w./(-])(?:{FOLDERS})/[\w./<>*-]*[\w>]',
                           page.read_text()):
        pattern = re.sub('<size>|NAME', '*', path)
        assert any(ROOT.glob(pattern)) or any(ROOT.glob(f'{pattern}.py')), path


# ------------------------------------------------------------ commands -----


def tools():
    """The scripts of ``python -m mmdet_efficientdet NAME``, by name."""
    paths = [
        *(ROOT / 'tools').glob('*.py'),
        *MMDET_TOOLS.glob('analysis_tools/*.py'), MMDET_TOOLS / 'train.py',
        MMDET_TOOLS / 'test.py'
    ]
    return {path.stem: path for path in paths}


def scripts():
    """Pairs of command and script, for all commands that run one."""
    for page in PAGES:
        for command in commands(page):
            module = re.search(r'python -m mmdet_efficientdet(?: (\w+))?',
                               command)
            script = re.match(r'python (tools/\S+)', command)
            if module and module.group(1):
                yield command, tools().get(module.group(1))
            elif script:
                yield command, ROOT / script.group(1)


def test_commands():
    """Their scripts exist, and know the options that are given."""
    found = list(scripts())
    assert len(found) > 15
    for command, path in found:
        assert path is not None and path.is_file(), command
        text = path.read_text()
        for option in re.findall(r' (--[\w-]+)', command):
            assert f"'{option}'" in text, command


def test_named_tools():
    """Also where the prose names one."""
    for page in PAGES:
        names = re.findall(r'python -m mmdet_efficientdet (\w+)',
                           page.read_text())
        assert set(names) <= set(tools()), page.name


def test_list_of_tools():
    """The command without arguments lists what the docs use."""
    listed = subprocess.run([sys.executable, '-m', 'mmdet_efficientdet'],
                            cwd=ROOT,
                            capture_output=True,
                            text=True).stdout
    for command, path in scripts():
        if 'mmdet_efficientdet' in command:
            assert re.search(rf'\b{path.stem}\b', listed), command


def test_make_targets():
    targets = re.findall(r'^([a-z]+):.*##', (ROOT / 'Makefile').read_text(),
                         re.M)
    used = {
        name
        for page in PAGES
        for command in commands(page)
        for name in re.findall(r'^make (\w+)', command)
    }
    assert {'demo', 'quick', 'test', 'lint'} <= used <= set(targets)


# -------------------------------------------------------------- Python -----


def python_blocks():
    """All Python code of the docs, with the page's name."""
    return [
        pytest.param(text, id=f'{page.name}-{i}') for page in PAGES
        for i, text in enumerate(blocks(page, 'python'))
    ]


@pytest.mark.parametrize('text', python_blocks())
def test_python_compiles(text):
    compile(text, '<docs>', 'exec')


@pytest.mark.parametrize(
    'text', [p for p in python_blocks() if p.values[0].startswith('_base_')])
def test_configs(text, tmp_path):
    """Each loads, and its model can be built."""
    # Bases are relative to the folder in which the docs save the file.
    text = text.replace("'configs/", f"'{CONFIGS}/")
    text = text.replace(
        './my_config.py',
        f'{CONFIGS}/efficientdet/efficientdet_d0_8xb16-300e_coco.py')
    text = text.replace("'./", f"'{CONFIGS}/efficientdet/")
    file = tmp_path / 'my_config.py'
    file.write_text(text)
    config = Config.fromfile(file)
    config.model.backbone.init_cfg = None
    with torch.device('meta'):
        model = MODELS.build(config.model)
    assert model.with_neck
    if "'cat', 'dog'" in text:
        assert model.bbox_head.num_classes == 2
        for loader in ('train_dataloader', 'val_dataloader'):
            assert config[loader].dataset.metainfo.classes == ('cat', 'dog')
    if 'finetune' in text:
        assert config.load_from == 'effdet://tf_efficientdet_d1'
    if 'data_root' in text:
        assert config.train_dataloader.dataset.data_root == 'data/pets/'
        assert config.val_evaluator.ann_file == 'data/pets/val.json'


@pytest.mark.slow
def test_first_lines(monkeypatch, capsys):
    """The README's first lines find trees, without a network."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(socket, 'socket', None)
    exec(blocks(PAGES[0], 'python')[0], {})
    assert capsys.readouterr().out.count('Tree') > 10


# -------------------------------------------------------------- tables -----


def test_sizes():
    """The README's table is that of scaling.py, metafile and manifest."""
    metafile = CONFIGS / 'efficientdet' / 'metafile.yml'
    models = {
        model['Alias'][0]: model
        for model in yaml.safe_load(metafile.read_text())['Models']
    }
    rows = table(PAGES[0], 'model name')
    assert list(rows) == [f'efficientdet-{size}' for size in SCALING]
    for size, row in SCALING.items():
        model = models[f'efficientdet-{size}']
        counts, weights = model['Metadata'], model['Weights']
        assert rows[f'efficientdet-{size}'] == [
            f'{published.manifest()[weights].ap:.1f}',
            f'{counts["Parameters"]:,}', f'{counts["FLOPs"] / 1e9:.2f}',
            str(row.image_size), f'[config]({model["Config"]})', weights
        ]  # yapf: disable


def test_scaling():
    rows = table(ROOT / 'docs/architecture.md', 'size')
    assert list(rows) == list(SCALING)
    for size, row in SCALING.items():
        assert rows[size] == [
            row.backbone,
            str(row.image_size),
            str(row.bifpn_channels),
            str(row.bifpn_layers),
            str(row.head_layers), f'{row.anchor_scale:g}',
            f'P3–P{row.max_level}',
            row.fusion.replace('_', ' '), row.activation
        ]


def test_published_ap():
    """The AP of each name is the manifest's."""
    page = ROOT / 'docs/weights.md'
    head = re.search(r'^\| SIZE \|(.*)\|$', page.read_text(), re.M).group(1)
    names = [cell.strip(' `') for cell in head.split('|')]
    file = published.manifest()['effdet://tf_efficientdet_d0'].file
    assert f'`{file}`' in page.read_text()
    rows = table(page, 'SIZE')
    assert list(rows) == list(SCALING)
    assert {'effdet://tf_efficientdet_SIZE',
            'automl://efficientdet-SIZE'} <= set(names)
    for size, cells in rows.items():
        for name, cell in zip(names, cells):
            entry = published.manifest().get(name.replace('SIZE', size))
            assert cell == (f'{entry.ap:g}' if entry else ''), (size, name)


def test_releases():
    """Names, AP and sizes are those of the zoo."""
    rows = table(ROOT / 'docs/release.md', 'name')
    folders = [path for path in (ROOT / 'zoo').iterdir()]
    assert {*rows} == {path.name for path in folders}
    for folder in folders:
        source = json.loads((folder / 'config.json').read_text())['provenance']
        size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        assert rows[folder.name][1:] == [
            str(source['results']['AP']), f'{size:.1f} MB'
        ]


def test_recipes():
    """Batch, learning rate, jitter and length are those of the configs."""
    rows = table(ROOT / 'docs/training.md', 'config')
    assert len(rows) == 5
    for name, (_, batch, rate, _, jitter, length) in rows.items():
        path = CONFIGS / 'efficientdet' / f'{name.replace("<size>", "d0")}.py'
        config = Config.fromfile(path)
        assert config.auto_scale_lr.base_batch_size == int(batch)
        assert config.optim_wrapper.optimizer.lr == float(rate)
        crop = config.train_dataloader.dataset.pipeline[-2]
        assert crop.ratio_range == tuple(map(float, jitter.split('–')))
        number, unit, *_ = length.replace(',', '').split()
        assert config.train_cfg[dict(epochs='max_epochs',
                                     steps='max_iters')[unit]] == int(number)


def test_bifpn_configs():
    """All are listed, with the number of their lines."""
    rows = table(ROOT / 'docs/bifpn.md', 'config')
    lines = {
        path.stem: len(path.read_text().splitlines())
        for path in (CONFIGS / 'bifpn').glob('*.py')
    }
    assert {name: int(row[0]) for name, row in rows.items()} == lines
    with_bifpn = [
        path for path in (CONFIGS / 'bifpn').glob('*.py')
        if 'mmdet_efficientdet.BiFPN' in path.read_text()
    ]
    for page in ('README.md', 'docs/bifpn.md'):
        number, = set(
            re.findall(r'(\d+) (?:ready configs|detectors with)',
                       (ROOT / page).read_text()))
        assert int(number) == len(with_bifpn)


def test_map_of_the_packages():
    """The tables of architecture.md list every module, and no other."""
    text = (ROOT / 'docs/architecture.md').read_text()
    for package in ('deploy', 'models', 'datasets', 'weights', 'engine'):
        rows = re.search(rf'^`{package}/`\n\n(.*?)\n\n', text,
                         re.M | re.S).group(1)
        folder = ROOT / 'mmdet_efficientdet' / package
        files = {path.name for path in folder.iterdir()
                 if path.suffix in ('.py', '.yml')}  # yapf: disable
        assert set(re.findall(r'`(\w+\.\w+)`', rows)) == \
            files - {'__init__.py'}
