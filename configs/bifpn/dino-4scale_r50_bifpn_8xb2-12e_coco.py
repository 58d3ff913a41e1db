_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'

# Two images on a GPU are too few for batch norm.
model = dict(
    neck=dict(
        _delete_=True,
        type='mmdet_efficientdet.BiFPN',
        in_channels=[512, 1024, 2048],
        out_channels=256,
        num_outs=4,
        norm_cfg=dict(type='GN', num_groups=32)))
# Text in a checkpoint that is resumed is not executed.
default_hooks = dict(
    checkpoint=dict(type='mmdet_efficientdet.SafeCheckpointHook'))
