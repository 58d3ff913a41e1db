"""Tiny data of a training with one fault, and what is found in it."""
import json
import shutil
from copy import deepcopy

from check_parts.image_checks import check_images
from mmdet.registry import MODELS
from mmengine.config import Config

from mmdet_efficientdet.engine.preflight import check_training, read_all

from .tiny_data import make_dataset, write_config

COPIES = 6  # of the tiny images, for ten boxes of each class
EXTRA = '''
dataset = dict(
    data_root={root!r},
    ann_file='train.json',
    data_prefix=dict(img='train/'))
train_dataloader = dict(
    batch_size=8, num_workers=0, persistent_workers=False, dataset=dataset)
val_dataloader = dict(dataset=dict(
    data_root={root!r}, ann_file='val.json', data_prefix=dict(img='val/')))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file={root!r} + 'val.json')
test_evaluator = val_evaluator
optim_wrapper = dict(optimizer=dict(lr=0.01))
auto_scale_lr = dict(base_batch_size=8)
train_cfg = dict(max_epochs=300)
'''


def write_sound(root):
    """Data without a fault: a training and a validation set."""
    make_dataset(root)
    (root / 'JPEGImages').rename(root / 'val')
    val = json.loads((root / 'coco.json').read_text())
    train = dict(deepcopy(val), images=[], annotations=[])
    (root / 'train').mkdir()
    for copy in range(COPIES):
        for image in val['images']:
            name = f'{copy}_{image["file_name"]}'
            shutil.copy(root / 'val' / image['file_name'],
                        root / 'train' / name)
            train['images'].append(
                dict(image, id=image['id'] + 10 * copy, file_name=name))
        for box in val['annotations']:
            if box['iscrowd']:
                continue  # would be learned as background
            train['annotations'].append(
                dict(
                    box,
                    id=box['id'] + 100 * copy,
                    image_id=box['image_id'] + 10 * copy))
    return train, val


def write_broken(folder, fault):
    """Writes data and config with one fault; returns the config's path.

    ``fault(train, val, root)`` changes the contents of both files and
    returns lines for the config, or None.
    """
    root = folder / 'data'
    train, val = write_sound(root)
    extra = fault(train, val, root) or ''
    (root / 'train.json').write_text(json.dumps(train))
    (root / 'val.json').write_text(json.dumps(val))
    return write_config(
        folder / 'mine.py',
        root,
        image_size=128,
        extra=EXTRA.format(root=f'{root}/') + extra)


_models = {}


def build_model(config):
    """The detector of a config, which is built once for all tests."""
    key = str(config.model.to_dict())
    if key not in _models:
        _models[key] = MODELS.build(config.model)
    return _models[key]


def find_faults(path, images=True, num_gpus=1, options=None):
    """What the checks of data and recipe find in a config.

    Args:
        path (Path): Of the config.
        images (bool): Whether to read the images.
        num_gpus (int): That train.
        options (dict, optional): Merged into the config.

    Returns:
        list[Finding]: In the order of the checks.
    """
    config = Config.fromfile(path)
    config.merge_from_dict(options or {})
    train, val = (
        read_all(loader.dataset) if loader else []
        for loader in (config.train_dataloader, config.val_dataloader))
    found = check_training(config, build_model(config), train, val, num_gpus)
    if images:
        parts = {(part.file, part.partial): part for part in (*train, *val)}
        for part in parts.values():
            found += check_images(part)
    return found


def names_of(findings):
    """Pairs (level, name)."""
    return [('ERROR' if finding.error else 'WARNING', finding.name)
            for finding in findings]


def text_of(findings):
    """What a user reads."""
    return '\n'.join(map(str, findings))


# The images of the training, or those of indices, are validated on.
ON_TRAIN = '''
val_dataloader['dataset'].update(dataset{})
val_evaluator = dict(ann_file=dataset['data_root'] + 'train.json')
'''


def bbox(*numbers, box=0):
    """A fault of one box of the training data."""

    def fault(train, val, root):
        train['annotations'][box]['bbox'] = list(numbers)

    return fault


def entry(key, value, number=1, kind='annotations', split=0):
    """A fault of one field of the first entries; None removes it."""

    def fault(*files):
        for item in files[split][kind][:number]:
            if value is None:
                del item[key]
            else:
                item[key] = value

    return fault


def null(key, kind='annotations', split=0):
    """A fault of one field of the first entry, which is there but empty."""

    def fault(*files):
        files[split][kind][0][key] = None

    return fault


def lines(text):
    """A fault of the config."""
    return lambda train, val, root: text


def voc_config(root, folder, batch_size=8):
    """The tiny data as VOC, trained on without validation."""
    return write_config(
        folder / 'voc.py',
        root,
        image_size=128,
        extra=f"""
train_dataloader = dict(
    batch_size={batch_size}, num_workers=0, persistent_workers=False,
    dataset=dict(
        type='VOCDataset', data_root={str(root)!r}, ann_file='ids.txt',
        data_prefix=dict(_delete_=True, sub_data_root='')))
val_dataloader = val_cfg = val_evaluator = None
train_cfg = dict(max_epochs=300)
auto_scale_lr = dict(base_batch_size=8)
""")
