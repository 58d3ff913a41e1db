_base_ = './efficientdet_d0_8xb16-300e_coco.py'

# A few hundred to a few thousand pictures of your own, from ImageNet weights.
# Your config inherits this one, names classes and data (see README), and
# another size by scale_config. The length is in steps of 8 images: 1000 do
# for up to 800 pictures; for more, set train_cfg.max_iters to 10 epochs.

# The official momentum of 0.01 would leave the statistics behind the weights
# in so few steps.
norm_cfg = dict(type='BN', momentum=0.1, eps=1e-3)
model = dict(
    # What ImageNet has taught up to stride 16 stays, with all statistics.
    backbone=dict(frozen_stages=4, norm_eval=True, drop_path_rate=0.0),
    # Channels that keep their meaning through neck and head learn faster.
    neck=dict(norm_cfg=norm_cfg, identity_init=True),
    bbox_head=dict(norm_cfg=norm_cfg, identity_init=True))

train_pipeline = _base_.train_pipeline
train_pipeline[-2].ratio_range = (0.5, 1.5)

train_dataloader = dict(
    batch_size=8,
    num_workers=2,
    sampler=dict(infinite=True),
    dataset=dict(pipeline=train_pipeline))

train_cfg = dict(
    _delete_=True,
    type='mmdet_efficientdet.SeededIterBasedTrainLoop',
    max_iters=1000,
    val_interval=100)
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
        hold=0.5,  # the official cosine ends with a larger loss
        start_factor=0.01)
]
# The averages need no other number: they span a tenth of the steps so far.
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(by_epoch=False, interval=100, max_keep_ckpts=1))
log_processor = dict(by_epoch=False, window_size=20)
