"""What compare_necks.py compares: the variants of each study."""
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / 'configs/efficientdet/efficientdet_lite0_1xb8_trees.py'
BATCH_SIZE = 4
ENLARGEMENT = 1.2  # less than the recipe's: more trees in each step

SHARED = ('in_channels', 'out_channels', 'num_outs', 'norm_cfg')
BIFPN = dict(type='mmdet_efficientdet.BiFPN', act_cfg=dict(type='ReLU6'))
LITE0 = dict(BIFPN, fusion='sum')
# What each variant changes in the recipe; the first is what others are
# compared with.
STUDIES = dict(
    necks=dict(
        fpn=dict(neck=dict(type='FPN', add_extra_convs='on_input')),
        pafpn=dict(neck=dict(type='PAFPN', add_extra_convs='on_input')),
        nasfpn=dict(neck=dict(type='NASFPN', stack_times=3)),
        bifpn=dict(neck=dict(BIFPN, fusion='fast_normalized')),
        bifpn_softmax=dict(neck=dict(BIFPN, fusion='softmax')),
        bifpn_sum=dict(neck=dict(BIFPN, fusion='sum')),
        bifpn_unbounded=dict(neck=dict(BIFPN, fusion='unbounded')),
        bifpn_1_layer=dict(
            neck=dict(BIFPN, fusion='fast_normalized', stack_times=1)),
        bifpn_2_layers=dict(
            neck=dict(BIFPN, fusion='fast_normalized', stack_times=2))),
    # All but the first have 42 % more multiply-adds than it has. The
    # backbone stays, as there are ImageNet weights of few others.
    scaling=dict(
        lite0=dict(neck=LITE0),
        resolution=dict(neck=LITE0, image_size=296),
        width=dict(
            neck=dict(LITE0, out_channels=140),
            bbox_head=dict(in_channels=140)),
        depth=dict(
            neck=dict(LITE0, stack_times=15),
            bbox_head=dict(stacked_convs=14)),
        compound=dict(
            neck=dict(LITE0, out_channels=88, stack_times=6),
            bbox_head=dict(in_channels=88, stacked_convs=4),
            image_size=272)))


def make_config(study, variant, seed, fold, steps, folder):
    """The shipped recipe for trees with a variant, cut short.

    The whole backbone is frozen. ``folder`` has the folds.
    """
    from mmengine.config import Config
    cfg = Config.fromfile(RECIPE, import_custom_modules=False)
    changes = STUDIES[study][variant]
    cfg.model.neck = dict({key: cfg.model.neck[key]
                           for key in SHARED}, **changes['neck'])
    cfg.model.bbox_head.update(changes.get('bbox_head', {}))
    cfg.model.backbone.frozen_stages = 5
    # NASFPN needs each level to be half of the one below.
    cfg.model.data_preprocessor.pad_size_divisor = \
        128 if study == 'necks' else 8
    for file, loader in (('train', cfg.train_dataloader),
                         ('test', cfg.test_dataloader)):
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = f'{folder}/'
        loader.dataset.ann_file = f'{file}_{fold}.json'
    cfg.train_dataloader.batch_size = BATCH_SIZE
    scale = ENLARGEMENT / cfg.enlargement
    side = changes.get('image_size', cfg.image_size)
    for transform in cfg.train_dataloader.dataset.pipeline:
        if 'ratio_range' in transform:  # relative to the size
            transform.image_size = side
            transform.ratio_range = [r * scale for r in transform.ratio_range]
    for transform in cfg.test_dataloader.dataset.pipeline:
        if 'scale_factor' in transform:
            transform.scale_factor = ENLARGEMENT * side / cfg.image_size
    cfg.image_size = side
    cfg.test_evaluator.ann_file = f'{folder}/test_{fold}.json'
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.train_cfg.max_iters = steps
    # The official start and cosine, as in both studies of docs/studies.md.
    cfg.model.bbox_head.identity_init = False
    cfg.param_scheduler[0].update(warmup=max(steps // 20, 1), hold=0.0)
    cfg.default_hooks.checkpoint = None
    cfg.default_hooks.preflight.enabled = False
    cfg.randomness = dict(seed=seed)
    return cfg
