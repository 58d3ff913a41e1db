_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

# Two images on a GPU are too few for batch norm.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdet_efficientdet.EfficientNet',
        arch='b0',
        out_indices=(3, 4, 5),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='timm://tf_efficientnet_b0.aa_in1k')),
    neck=dict(
        _delete_=True,
        type='mmdet_efficientdet.BiFPN',
        in_channels=[40, 112, 320],
        out_channels=256,
        num_outs=5,
        norm_cfg=dict(type='GN', num_groups=32)))
# Text in a checkpoint that is resumed is not executed.
default_hooks = dict(
    checkpoint=dict(type='mmdet_efficientdet.SafeCheckpointHook'))
