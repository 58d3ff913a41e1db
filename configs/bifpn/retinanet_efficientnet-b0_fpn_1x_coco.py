_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdet_efficientdet.EfficientNet',
        arch='b0',
        out_indices=(3, 4, 5),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='timm://tf_efficientnet_b0.aa_in1k')),
    neck=dict(in_channels=[40, 112, 320], start_level=0))
# Text in a checkpoint that is resumed is not executed.
default_hooks = dict(
    checkpoint=dict(type='mmdet_efficientdet.SafeCheckpointHook'))
