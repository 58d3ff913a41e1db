# The official recipe for 8 GPUs with 16 images each, and the runtime.
default_scope = 'mmdet'
# Names data that cannot be read; takes default_hooks.NAME=None for every hook
# and num_workers=0 alone.
runner_type = 'mmdet_efficientdet.DetRunner'

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=300, val_interval=10)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    constructor='mmdet_efficientdet.GroupedOptimWrapperConstructor',
    # 0.08 for every 64 images
    optimizer=dict(type='SGD', lr=0.16, momentum=0.9, weight_decay=4e-5),
    # Only kernels decay: no biases, norms and fusion weights.
    paramwise_cfg=dict(
        flat_decay_mult=0,
        custom_keys=dict(fusion_weights=dict(decay_mult=0))),
    # Of the gradient that all GPUs share; LocalClipOptimWrapper clips that of
    # each, as TPUs do.
    clip_grad=dict(max_norm=10, norm_type=2))
# --auto-scale-lr fits the rate, with its start, to another batch.
auto_scale_lr = dict(enable=False, base_batch_size=128)

# One epoch of warm-up from 0.008, then the cosine, to the end of train_cfg
param_scheduler = [
    dict(
        type='mmdet_efficientdet.WarmupCosineLR',
        warmup=1,
        start_factor=0.05,
        convert_to_iter_based=True)
]

# Batch norms share their statistics between GPUs.
sync_bn = 'torch'

# All in default_hooks, which a child config merges by name; custom_hooks is a
# list, which it would replace.
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    # AP at the same steps as the loss; a count of epochs stays 0 where the
    # loop counts iterations.
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    # An interruption costs less than an epoch, which may take hours.
    checkpoint=dict(
        type='mmdet_efficientdet.SafeCheckpointHook',
        interval=1,
        max_keep_ckpts=3,
        save_best='auto'),
    sampler_seed=dict(type='mmdet_efficientdet.SeedHook'),
    visualization=dict(type='DetVisualizationHook'),
    # Official averages: decay min(0.9998, (1 + n) / (10 + n)), norms included
    ema=dict(
        type='EMAHook',
        ema_type='mmdet_efficientdet.ForeachEMA',
        momentum=2e-4,
        gamma=9,
        update_buffers=True,
        strict_load=True,
        priority=49),
    batch_scale=dict(type='mmdet_efficientdet.BatchScaleHook'),
    # Off: --cfg-options default_hooks.preflight.enabled=False
    preflight=dict(type='mmdet_efficientdet.PreflightHook'),
    class_transfer=dict(type='mmdet_efficientdet.ClassTransferHook'))

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'))

# A config that inherits this one sets visualizer = dict(vis_backends=[...]).
vis_backends = [
    dict(type='LocalVisBackend')
    # dict(type='TensorboardVisBackend')
    # dict(type='WandbVisBackend')
]
visualizer = dict(
    type='DetLocalVisualizer', vis_backends=vis_backends, name='visualizer')
log_processor = dict(type='LogProcessor', window_size=50, by_epoch=True)
log_level = 'INFO'
load_from = None
# Fits the checkpoint of load_from to the classes of the data, by their names.
transfer_classes = False
resume = False
