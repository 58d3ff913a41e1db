_base_ = './efficientdet_lite0_8xb16-300e_coco.py'

from mmdet_efficientdet.scaling import scale_config

scale_config(_base_, 'lite0', image_size=256, classes=['Tree'])

data_root = 'data/trees/'
# Trees have 8 to 108 px, anchors at least 24.
enlargement = 1.8

# The official momentum of 0.01 would leave the statistics behind the weights
# in so few steps.
norm_cfg = dict(type='BN', momentum=0.1, eps=1e-3)
model = dict(
    backbone=dict(frozen_stages=4, norm_eval=True, drop_path_rate=0.0),
    neck=dict(norm_cfg=norm_cfg),
    bbox_head=dict(norm_cfg=norm_cfg),
    test_cfg=dict(max_per_img=300))

train_pipeline = [
    dict(type='mmdet_efficientdet.SeedTransforms'),
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='RandomFlip',
        prob=[0.25, 0.25, 0.25],
        direction=['horizontal', 'vertical', 'diagonal']),
    # Enlarges windows of 400 px by 1.4 to 2.2.
    dict(
        type='mmdet_efficientdet.ResizeCrop',
        image_size=256,
        ratio_range=(2.19, 3.44)),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(8, 8), keep_empty=False),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackDetInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale_factor=enlargement, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
                   'scale_factor'))
]
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    sampler=dict(infinite=True),
    dataset=dict(
        data_root=data_root,
        ann_file='train.json',
        data_prefix=dict(img='images/'),
        pipeline=train_pipeline))
val_dataloader = dict(
    num_workers=1,
    dataset=dict(
        data_root=data_root,
        ann_file='test.json',
        data_prefix=dict(img='images/'),
        pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'test.json')
test_evaluator = val_evaluator

max_iters = 1000
train_cfg = dict(
    _delete_=True,
    type='mmdet_efficientdet.SeededIterBasedTrainLoop',
    max_iters=max_iters,
    val_interval=max_iters)
# Steps as large as neck and head need would destroy the pretrained backbone.
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=6e-3, weight_decay=1e-2),
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1))))
auto_scale_lr = dict(base_batch_size=8)
param_scheduler = [
    dict(
        type='mmdet_efficientdet.WarmupCosineLR',
        by_epoch=False,
        warmup=30,
        start_factor=0.01)
]
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(
        by_epoch=False, interval=100, save_best=None, max_keep_ckpts=1))
log_processor = dict(by_epoch=False, window_size=20)
