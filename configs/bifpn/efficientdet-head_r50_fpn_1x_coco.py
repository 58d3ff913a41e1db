_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

# Two images on a GPU are too few for batch norm.
model = dict(
    train_cfg=None,  # an assigner, which the head does not have
    bbox_head=dict(
        _delete_=True,
        type='mmdet_efficientdet.EfficientDetHead',
        num_classes=80,
        in_channels=256,
        norm_cfg=dict(type='GN', num_groups=32)))
# Text in a checkpoint that is resumed is not executed.
default_hooks = dict(
    checkpoint=dict(type='mmdet_efficientdet.SafeCheckpointHook'))
