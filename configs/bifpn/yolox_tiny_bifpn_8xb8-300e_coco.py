_base_ = 'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py'

model = dict(
    neck=dict(
        _delete_=True,
        type='mmdet_efficientdet.BiFPN',
        in_channels=[96, 192, 384],
        out_channels=96,
        num_outs=3))
# Without decay, as the base has it for norms.
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(fusion_weights=dict(decay_mult=0))))
# Text in a checkpoint that is resumed is not executed.
default_hooks = dict(
    checkpoint=dict(type='mmdet_efficientdet.SafeCheckpointHook'))
