"""Changes the classes of a checkpoint."""
import copy
import re
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import Tensor

from ..models import EfficientDetHead
from ..models.efficientdet import CLASS_PREDICTOR
from ..registry import MODELS
from ..scaling import set_classes
from ..utils import printable, shorten
from .conventions import check_unique, class_names, meta_of, origin_of
from .convert import adapt, convert
from .sources import open_source

_PREDICTOR = re.compile(
    rf'(.*\.)?{re.escape(CLASS_PREDICTOR)}\.(?P<leaf>weight|bias)')


def transfer_file(path: str,
                  config: Config,
                  classes: Sequence[str],
                  averages: bool = True) -> dict:
    """Reads a file of weights and changes its classes.

    Args:
        path (str): A checkpoint of this package, converted or trained, or
            published weights, which are converted.
        config (Config): Config of the size; it is not changed.
        classes (Sequence[str]): Names of the new classes.
        averages (bool): For published weights, as in ``convert_file``.

    Returns:
        dict: A checkpoint as from :func:`transfer_classes`. Its ``meta`` has
        the config for these classes and the receipt. New rows are the same
        each time.

    Raises:
        ValueError: If the file cannot be read, its classes cannot be
            transferred, or it does not fit the config.
    """
    source = open_source(path)
    if class_names(source.meta) and _predictor(source.tensors):
        checkpoint = source.checkpoint
        if not averages:
            raise ValueError(
                f'{path} is a checkpoint of this package, of which raw '
                'weights and averages are both kept; leave out --raw')
    else:
        checkpoint = convert(source, config, averages=averages)
    origin = origin_of(checkpoint['meta']) or dict(
        file=Path(path).name, sha256=source.sha256, receipt=[])
    config = copy.deepcopy(config)
    set_classes(config, classes)
    config, model = adapt(config, checkpoint['meta'])
    with DefaultScope.overwrite_default_scope('mmdet_efficientdet'):
        head = MODELS.build(config.model.bbox_head)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        head.init_weights()
    new, receipt = transfer_classes(checkpoint, classes, head)
    model.load_state_dict(new['state_dict'], assign=True)  # or raises
    origin['receipt'] += receipt
    new['meta'].update(cfg=config.pretty_text, source=origin)
    return new


def transfer_classes(checkpoint: dict, classes: Sequence[str],
                     head: EfficientDetHead) -> Tuple[dict, List[str]]:
    """Changes the classes of a checkpoint.

    For classes with the same name the class predictor gets the rows of the
    checkpoint, for the others those of ``head``. Everything else is kept.

    Args:
        checkpoint (dict): With class names in ``meta['dataset_meta']``, with
            ``state_dict``, and optionally with the ``ema_state_dict`` of
            mmengine's EMAHook. It is not changed.
        classes (Sequence[str]): New names, case-sensitive.
        head (EfficientDetHead): For the new classes, just initialized.

    Returns:
        tuple: A checkpoint of only these entries, since the state of an
        optimizer no longer fits, and the lines of a receipt.

    Raises:
        ValueError: If the checkpoint has no class names, names occur twice,
            or the predictor does not fit ``head``.
    """
    averaged = 'ema_state_dict' in checkpoint
    entries = ('state_dict', 'ema_state_dict')[:1 + averaged]
    for entry in entries:
        # The checkpoint may be a bare state dict.
        if not _predictor(checkpoint.get(entry, checkpoint)):
            raise ValueError(
                f'the {entry} of the checkpoint has no {CLASS_PREDICTOR}, the '
                'class predictor of EfficientDet')
    old = class_names(meta_of(checkpoint))
    if not old:
        raise ValueError(
            "the checkpoint has no class names in meta['dataset_meta']"
            "['classes'], by which rows could be copied. MMDetection's "
            'training and tools/convert_checkpoint.py write them')
    check_unique(classes)
    # Colors and whatever else belongs to the old classes are dropped.
    new = dict(
        meta=dict(
            checkpoint['meta'], dataset_meta=dict(classes=list(classes))))
    for entry in entries:
        new[entry] = _transfer(checkpoint[entry], old, classes, head)
    kept = len(new['state_dict']) - len(_predictor(new['state_dict']))
    receipt = [
        f'classes of the checkpoint: {len(old)}, requested: {len(classes)}',
        f'kept: {kept} tensors, bit-identical', *_differences(old, classes)
    ]
    return new, receipt + ['the same in ema_state_dict'] * averaged


def _predictor(state_dict) -> Dict[str, str]:
    """The keys of the class predictor, to ``weight`` or ``bias``."""
    keys = state_dict if isinstance(state_dict, dict) else ()
    found = (_PREDICTOR.fullmatch(str(key)) for key in keys)
    return {match[0]: match['leaf'] for match in found if match}


def _transfer(state_dict: Dict[str, Tensor], old: List[str],
              new: Sequence[str], head: EfficientDetHead) -> dict:
    """The same state dict with another class predictor."""
    num_anchors = head.num_base_priors
    copied = [i for i, name in enumerate(new) if name in old]
    sources = [old.index(new[i]) for i in copied]
    result = copy.copy(state_dict)
    for key, leaf in _predictor(state_dict).items():
        value, name = state_dict[key], f'{printable(key)} of the checkpoint'
        initial = getattr(head.conv_cls.pointwise, leaf).detach()
        count, *shape = getattr(value, 'shape', ()) or (0, )
        if count != num_anchors * len(old):
            raise ValueError(
                f'{name} has {count} rows, which are not {num_anchors} '
                f'anchors for each of its {len(old)} classes {shorten(old)}')
        if shape != list(initial.shape[1:]):
            raise ValueError(
                f'{name} has rows of the shape {shape}, that of the model '
                f'{[*initial.shape[1:]]}: the checkpoint is of another size')
        rows = initial.to(value, copy=True).unflatten(0, (num_anchors, -1))
        rows[:, copied] = value.unflatten(0, (num_anchors, -1))[:, sources]
        result[key] = rows.flatten(0, 1)
    return result


def _differences(old: List[str], new: Sequence[str]) -> List[str]:
    """Lines about classes that are copied, new and not used."""
    groups = {
        'copied': [name for name in new if name in old],
        'new': [name for name in new if name not in old],
        'not used': [name for name in old if name not in new]
    }
    lines = [
        f'{title}: {len(names)} classes' +
        (f' ({printable(", ".join(names))})' if names else '')
        for title, names in groups.items()
    ]
    spellings = {_spelling(name): name for name in old}
    return lines + [
        f'hint: {name!r} is new; the checkpoint has '
        f'{spellings[_spelling(name)]!r}'
        for name in groups['new'] if _spelling(name) in spellings
    ]


def _spelling(name: str) -> str:
    """A name without case, spaces and hyphens."""
    return re.sub(r'[\W_]', '', name).lower()
