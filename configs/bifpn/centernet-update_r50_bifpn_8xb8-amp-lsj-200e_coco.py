_base_ = 'mmdet::centernet/centernet-update_r50_fpn_8xb8-amp-lsj-200e_coco.py'

model = dict(
    neck=dict(
        _delete_=True,
        type='mmdet_efficientdet.BiFPN',
        in_channels=[256, 512, 1024, 2048],
        out_channels=256,
        num_outs=5,
        start_level=1))
# Without decay, as the base has it for norms.
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(fusion_weights=dict(decay_mult=0))))
# Text in a checkpoint that is resumed is not executed.
default_hooks = dict(
    checkpoint=dict(type='mmdet_efficientdet.SafeCheckpointHook'))
