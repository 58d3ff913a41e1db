"""Where a release comes from: data, training, software, hardware."""
import argparse
import json
import platform
import re
from pathlib import Path

import torch
from mmengine.config import Config

import mmdet_efficientdet
from mmdet_efficientdet import load_plain
from mmdet_efficientdet.deploy.releases import WEIGHTS
from mmdet_efficientdet.weights.sources import sha256_of

# Lines of the log of a training that name no path
_LINES = r'^\s+(Python|PyTorch|TorchVision|MMEngine|OpenCV|GPU [\d,]+): (.+)$'


def provenance_of(args: argparse.Namespace, config: Config, checkpoint: Path,
                  data: tuple, folder: Path, file: Path) -> dict:
    """Facts of a release, all but its results.

    Args:
        args (Namespace): Of tools/release.py.
        config (Config): Of the training.
        checkpoint (Path): The trained one.
        data (tuple): Annotations and folder of the evaluation.
        folder (Path): With the plain network.
        file (Path): The released checkpoint.
    """
    counts = json.loads(data[0].read_text(encoding='utf-8'))
    meta = torch.load(checkpoint, 'cpu', weights_only=True).get('meta', {})
    parameters = load_plain(folder / WEIGHTS).parameters()
    start = config.get('load_from') or (config.model.backbone.get('init_cfg')
                                        or {}).get('checkpoint')
    if start and '://' not in start:
        start = Path(start).name
    return dict(
        package=f'mmdet_efficientdet {mmdet_efficientdet.__version__}',
        config=Path(file).name.rpartition('_')[0],
        checkpoint=file.name,
        checkpoint_kind='best of the validation'
        if checkpoint.name.startswith('best_') else 'last of the training',
        precision='float16' if args.half else 'float32',
        parameters=sum(x.numel() for x in parameters),
        bytes={x: (folder / x).stat().st_size for x in (WEIGHTS, file.name)},
        licences={
            'released weights': args.licence,
            'code': 'Apache-2.0',
            'data': args.data_licence,
            'start weights': args.start_licence
        },
        data=dict(
            name=args.data_name,
            evaluated_on=data[0].name,
            sha256=sha256_of(data[0]),
            images=len(counts['images']),
            boxes=len(counts['annotations'])),
        training=dict(
            start_weights=start,
            iterations=meta.get('iter'),
            epochs=meta.get('epoch') or None,
            batch_size=config.train_dataloader.batch_size,
            optimizer=config.optim_wrapper.optimizer.type,
            lr=config.optim_wrapper.optimizer.lr,
            seed=meta.get('seed')),
        environment=environment(args.work_dir),
        released_on=dict(processor=processor(), threads=torch.
                         get_num_threads()))  # yapf: disable


def environment(work_dir: Path) -> dict:
    """Versions and GPUs that the newest log of a training names."""
    logs = sorted(work_dir.glob('*/*.log'))
    text = logs[-1].read_text(errors='replace')[:10000] if logs else ''
    return dict(re.findall(_LINES, text, re.M))


def processor() -> str:
    """The name of this machine's processor."""
    try:
        text = Path('/proc/cpuinfo').read_text()
    except OSError:
        text = ''
    name = re.search(r'^model name\s*: (.+)$', text, re.M)
    return name[1] if name else platform.machine()
