"""One release: write, evaluate in new processes, and only then rename."""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, List

from export_parts.detector import check_model, load
from export_parts.evaluation import dataset_of
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmdet_efficientdet import plain_network, save_plain
from mmdet_efficientdet.deploy.releases import CONFIG, FILES, SUMS, WEIGHTS
from mmdet_efficientdet.utils import plain_data, read_config, write_file
from mmdet_efficientdet.weights.convert import convert, save
from mmdet_efficientdet.weights.sources import open_source, sha256_of

from . import card
from .provenance import provenance_of
from .scores import score_in_host
from .settings import detector_settings

EVALUATE = Path(__file__).parents[1] / 'evaluate.py'
# Points of AP by which one box that is found or not, at one of ten thresholds
# of the IoU, changes the AP of a single box
AP_STEP = 10


def release(args: argparse.Namespace) -> Path:
    """Makes a release; returns its folder.

    Args:
        args (Namespace): Of tools/release.py.

    Raises:
        ValueError: If it is refused; nothing is written then.
    """
    path = find_config(args)
    config = read_config(path)
    check_model(config)
    init_default_scope('mmdet')
    stem = Path(path).stem
    if not re.fullmatch(r'\w[\w.-]*', stem):
        raise ValueError(f'the config {path} gives the checkpoint its name: '
                         'rename it to letters, digits, dots and hyphens')
    name = args.name or stem
    target = args.out / name
    if target.exists():
        raise ValueError(f'{target} exists; remove it, or give another --name '
                         'or --out')
    checkpoint = find_checkpoint(args)
    data = (args.data, args.images) if args.data else dataset_of(
        config, 'test_dataloader')
    print(f'Evaluating {checkpoint} with MMDetection')
    expected = score_in_host(config, str(checkpoint), *data)
    folder = args.out / f'.{name}.partial'
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir(parents=True)
    try:
        public = publishable(config)
        file = write_weights(folder, checkpoint, stem, public, args)
        source = dict(
            provenance_of(args, config, checkpoint, data, folder, file),
            name=name)
        limit = args.max_difference
        if limit is None:
            limit = 0.1 + AP_STEP / max(1, source['data']['boxes'])
        results = prove(folder, file, public, data, expected, limit)
        source.update(results=dict(results, trained_checkpoint=expected))
        card.write(folder, source, config, args)
        write_json(folder / CONFIG, dict(
            json.loads((folder / CONFIG).read_text(encoding='utf-8')),
            provenance=source))  # yapf: disable
        write_sums(folder)
        refuse_paths(folder, args.work_dir)
        os.rename(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target


def find_config(args: argparse.Namespace) -> str:
    """The config that train.py has left in the work directory."""
    if args.config:
        return args.config
    found = [
        path for path in args.work_dir.glob('*.py') if path.stem != 'recipe'
    ]
    if len(found) != 1:
        raise ValueError(
            f'{args.work_dir} has {len(found)} configs instead of one, which '
            'train.py writes there; give --config FILE')
    return str(found[0])


def find_checkpoint(args: argparse.Namespace) -> Path:
    """The best checkpoint of the validation, else the last one."""
    if args.checkpoint:
        if not args.checkpoint.is_file():
            raise ValueError(f'the checkpoint {args.checkpoint} does not '
                             'exist')
        return args.checkpoint
    best = sorted(args.work_dir.glob('best_*.pth'), key=os.path.getmtime)
    if best:
        return best[-1]
    pointer = args.work_dir / 'last_checkpoint'
    named = pointer.read_text().strip() if pointer.is_file() else ''
    last = args.work_dir / Path(named).name
    if not named or not last.is_file():
        raise ValueError(f'{args.work_dir} has neither best_*.pth nor the '
                         'checkpoint in last_checkpoint; give --checkpoint '
                         'FILE')
    return last


def publishable(config: Config) -> Config:
    """A copy whose paths say nothing of this machine.

    Of an absolute path, only the last part stays.
    """

    def clean(node):
        if isinstance(node, dict):
            return {key: clean(value) for key, value in node.items()}
        if isinstance(node, (list, tuple)):
            return type(node)(clean(value) for value in node)
        if isinstance(node, str) and node.startswith(('/', '~')):
            return Path(node).name
        return node

    cleaned = clean(config.to_dict())
    for key in ('work_dir', 'load_from', 'resume', 'launcher'):
        cleaned.pop(key, None)
    return Config(cleaned)


def write_weights(folder: Path, checkpoint: Path, stem: str, config: Config,
                  args: argparse.Namespace) -> Path:
    """Writes the checkpoint, the plain network and the settings.

    Returns:
        Path: The checkpoint, named by its config, date and hash.
    """
    data = convert(open_source(str(checkpoint)), config)
    data['meta']['source']['receipt'] = []  # of a file that is not published
    if args.half:
        data['state_dict'] = {
            k: v.half() if v.is_floating_point() else v
            for k, v in data['state_dict'].items()
        }
        if not all(v.isfinite().all() for v in data['state_dict'].values()):
            raise ValueError('a weight is too large for float16; leave out '
                             '--half')
    draft = folder / 'draft.pth'
    save(data, str(draft))
    date = time.strftime('%Y%m%d', time.gmtime(checkpoint.stat().st_mtime))
    file = folder / f'{stem}_{date}-{sha256_of(draft)[:8]}.pth'
    draft.rename(file)
    detector, names, _ = load(Config(config.to_dict()), str(file), None)
    network = plain_network(detector.float())
    save_plain(network.half() if args.half else network, folder / WEIGHTS)
    write_json(folder / CONFIG, detector_settings(config, names))
    write_json(folder / 'training_config.json', plain_data(config.to_dict()))
    write_sums(folder, FILES)
    return file


def prove(folder: Path, file: Path, config: Config, data: tuple,
          expected: float, limit: float) -> dict:
    """Evaluates both files of a release in new processes.

    Returns:
        dict: What ``score_detector`` says, and ``AP_in_MMDetection``.

    Raises:
        ValueError: If an AP is not the expected one.
    """
    given = ['--data', str(data[0]), '--images', str(data[1])]
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        text = Path(temporary, 'config.py')
        text.write_text(config.pretty_text, encoding='utf-8')
        out = Path(temporary, 'numbers.json')
        for name, arguments in (('release', [str(folder)]),
                                ('checkpoint', [str(file), '--config',
                                                str(text)])):  # yapf: disable
            print(f'Evaluating the {name} in a new process')
            run = subprocess.run(
                [sys.executable, str(EVALUATE), *arguments, *given, '--out',
                 str(out)], capture_output=True, text=True)  # yapf: disable
            if run.returncode:
                raise ValueError(f'the {name} cannot be loaded and evaluated: '
                                 f'{run.stderr[-2000:]}')
            found[name] = json.loads(out.read_text())
    for name, numbers in found.items():
        judge(name, numbers['AP'], expected, limit)
    result = found['release']
    result.pop('published')
    return dict(result, AP_in_MMDetection=found['checkpoint']['AP'])


def judge(name: str, found: float, expected: float, limit: float) -> None:
    """Raises a ValueError if an AP is not the expected one."""
    if not abs(found - expected) <= limit + 1e-9:  # also NaN
        raise ValueError(
            f'the {name} has AP {found:.2f}, the trained checkpoint '
            f'{expected:.2f}; they may differ by {limit:.3g}. Without --half, '
            'weights are not rounded; more photographs make the AP less '
            'random; --max-difference POINTS allows more')


def write_json(path: Path, data: dict) -> None:
    """Writes data, and refuses what JSON cannot hold."""
    try:
        text = json.dumps(data, indent=1, ensure_ascii=False)
    except TypeError as error:
        raise ValueError(f'{path.name} must hold data only, but the config '
                         f'has more: {error}') from error
    write_file(path, f'{text}\n'.encode())


def write_sums(folder: Path, files=None) -> Dict[str, str]:
    """Writes the hashes of all files, or of some."""
    names = files or sorted(x for x in files_of(folder) if x != SUMS)
    sums = {name: sha256_of(folder / name) for name in names}
    lines = [f'{digest}  {name}\n' for name, digest in sums.items()]
    write_file(folder / SUMS, ''.join(lines).encode())
    return sums


def files_of(folder: Path) -> List[str]:
    """Names of the files of a release, with those of subfolders."""
    return [
        path.relative_to(folder).as_posix() for path in folder.rglob('*')
        if path.is_file()
    ]


def refuse_paths(folder: Path, work_dir: Path) -> None:
    """Raises a ValueError if a file has a path of this machine."""
    private = {
        str(path).encode()
        for path in (Path.home(), Path.cwd(), work_dir.resolve())
        if len(path.parts) > 1
    }
    for name in files_of(folder):
        data = (folder / name).read_bytes()
        for path in private:
            if path in data:
                raise ValueError(f'{name} would have the path '
                                 f'{path.decode()} of this machine')
