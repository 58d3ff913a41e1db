"""Small trainings of configs for COCO, for verify_detectors.py."""
import json
from pathlib import Path

from mmengine.config import Config

from mmdet_efficientdet.utils import write_file

DATA = Path(__file__).resolve().parents[2] / 'data' / 'trees'
WINDOW = 400  # pixels, the side of the data's images
NUM_IMAGES = 4  # in every batch
NUM_UNCOUNTED = 10  # steps before those whose losses are compared


def to_random_weights(node) -> None:
    """Makes a model's config one class and all weights trained from scratch.

    Args:
        node (dict | list | any): Changed in place, with all that is in it.
    """
    if isinstance(node, (list, tuple)):
        for value in node:
            to_random_weights(value)
    if not isinstance(node, dict):
        return
    if (node.get('init_cfg') or {}).get('type') == 'Pretrained':
        node['init_cfg'] = None
    if 'num_classes' in node:
        node['num_classes'] = 1
    if node.get('frozen_stages', 0) > 0:
        node['frozen_stages'] = -1
    for key, value in dict(norm_eval=False, requires_grad=True).items():
        if key in node:
            node[key] = value
    for value in node.values():
        to_random_weights(value)


def with_masks(name: str, folder: Path) -> Path:
    """Writes annotations whose masks are the boxes; returns the file."""
    content = json.loads((DATA / name).read_text())
    for annotation in content['annotations']:
        x, y, w, h = annotation['bbox']
        annotation['segmentation'] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    write_file(folder / name, json.dumps(content).encode())
    return folder / name


def derive(config: Path, folder: Path, image_size: int, steps: int) -> Config:
    """The config on the trees, for a training of ``steps`` steps.

    Args:
        config (Path): A config for COCO.
        folder (Path): Where annotations with masks are written.
        image_size (int): Height and width of training images in pixels.
        steps (int): Steps that count.
    """
    cfg = Config.fromfile(config)
    for key in ('custom_hooks', 'auto_scale_lr', 'tta_model', 'tta_pipeline'):
        cfg.pop(key, None)
    make_small(cfg.model)
    set_data(cfg, folder, image_size)
    set_schedule(cfg, NUM_UNCOUNTED + steps)
    return cfg


def make_small(model: dict) -> None:
    """One class, random weights, few queries or regions; in place."""
    to_random_weights(model)
    model.data_preprocessor.pop('batch_augments', None)
    if 'num_queries' in model:
        # No more than the pixels that they are chosen from
        model.num_queries = model.test_cfg.max_per_img = 50
    if 'rpn_head' in model:
        stages = model.train_cfg.rcnn
        for stage in stages if isinstance(stages, list) else [stages]:
            stage.sampler.num = 64
        model.test_cfg.rpn.max_per_img = 100


def set_data(cfg: Config, folder: Path, image_size: int) -> None:
    """Trains on the same four windows, tests on the held-out photograph."""
    has_masks = 'mask_head' in cfg.model.get('roi_head', {})
    resize = dict(
        type='Resize', scale_factor=image_size / WINDOW, keep_ratio=True)
    load = dict(type='LoadImageFromFile')
    annotations = dict(
        type='LoadAnnotations', with_bbox=True, with_mask=has_masks)
    pack = dict(type='PackDetInputs')
    meta_keys = ('img_id', 'img_path', 'ori_shape', 'img_shape',
                 'scale_factor')

    def loader(name: str, pipeline: list, sampler: dict, batch_size: int,
               **options) -> dict:
        ann_file = with_masks(name, folder)
        return dict(
            batch_size=batch_size,
            num_workers=0,
            sampler=sampler,
            dataset=dict(
                type='CocoDataset',
                ann_file=str(ann_file),
                data_prefix=dict(img=str(DATA / 'images')),
                metainfo=dict(classes=('Tree', )),
                pipeline=pipeline,
                **options))

    flip = dict(type='RandomFlip', prob=0.5)
    cfg.train_dataloader = loader(
        'train.json', [load, annotations, resize, flip, pack],
        dict(type='InfiniteSampler'),
        NUM_IMAGES,
        filter_cfg=dict(filter_empty_gt=True),
        indices=NUM_IMAGES)
    cfg.test_dataloader = loader(
        'test.json',
        [load, resize, annotations,
         dict(pack, meta_keys=meta_keys)],
        dict(type='DefaultSampler', shuffle=False),
        1,
        test_mode=True)
    cfg.test_evaluator = dict(
        type='CocoMetric',
        ann_file=cfg.test_dataloader['dataset']['ann_file'],
        metric=['bbox', 'segm'] if has_masks else 'bbox')
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None


def set_schedule(cfg: Config, steps: int) -> None:
    """The same optimizer for all, a line of the log for each step."""
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=steps)
    cfg.optim_wrapper = dict(
        type='OptimWrapper',
        optimizer=dict(type='AdamW', lr=5e-4, weight_decay=1e-4),
        clip_grad=dict(max_norm=10))
    cfg.param_scheduler = []
    cfg.default_hooks.logger.interval = 1
    cfg.default_hooks.checkpoint = dict(
        type='mmdet_efficientdet.SafeCheckpointHook',
        by_epoch=False,
        interval=steps)
    cfg.log_processor = dict(
        type='LogProcessor', window_size=1, by_epoch=False)
    cfg.randomness = dict(seed=0)
