_base_ = 'mmdet::efficientnet/retinanet_effb3_fpn_8xb4-crop896-1x_coco.py'

model = dict(
    neck=dict(
        _delete_=True,
        type='mmdet_efficientdet.BiFPN',
        in_channels=[48, 136, 384],
        out_channels=256,
        num_outs=5,
        norm_cfg=dict(type='GN', num_groups=32)))
# Without decay, as the base has it for norms.
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(fusion_weights=dict(decay_mult=0))))
# Text in a checkpoint that is resumed is not executed.
default_hooks = dict(
    checkpoint=dict(type='mmdet_efficientdet.SafeCheckpointHook'))
