_base_ = ['../_base_/coco_detection.py', '../_base_/schedule_300e.py']

image_size = 512
norm_cfg = dict(type='BN', momentum=0.01, eps=1e-3)
act_cfg = dict(type='SiLU')

model = dict(
    type='mmdet_efficientdet.EfficientDet',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=image_size),  # pads to image_size x image_size
    backbone=dict(
        type='mmdet_efficientdet.EfficientNet',
        arch='b0',
        out_indices=(3, 4, 5),
        norm_cfg=norm_cfg,
        act_cfg=act_cfg,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='timm://tf_efficientnet_b0.aa_in1k')),
    neck=dict(
        type='mmdet_efficientdet.BiFPN',
        in_channels=[40, 112, 320],
        out_channels=64,
        num_outs=5,
        stack_times=3,
        fusion='fast_normalized',
        norm_cfg=norm_cfg,
        act_cfg=act_cfg),
    bbox_head=dict(
        type='mmdet_efficientdet.EfficientDetHead',
        num_classes=80,
        in_channels=64,
        stacked_convs=3,
        num_levels=5,
        norm_cfg=norm_cfg,
        act_cfg=act_cfg,
        anchor_generator=dict(
            type='mmdet_efficientdet.AnchorGenerator',
            octave_base_scale=4.0,
            scales_per_octave=3,
            aspect_pairs=[(1.0, 1.0), (1.4, 0.7), (0.7, 1.4)]),
        bbox_coder=dict(type='mmdet_efficientdet.AnchorBoxCoder'),
        loss_cls=dict(
            type='mmdet_efficientdet.FocalLoss',
            use_sigmoid=True,
            gamma=1.5,
            alpha=0.25),
        # Equals 50 * Huber(delta=0.1) / 4.
        loss_bbox=dict(type='SmoothL1Loss', beta=0.1, loss_weight=1.25)),
    test_cfg=dict(
        nms_pre=5000,
        nms=dict(type='soft_nms', sigma=0.5, min_score=0.001),
        max_per_img=100))

train_pipeline = [
    dict(type='mmdet_efficientdet.SeedTransforms'),
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomFlip', prob=0.5),
    dict(
        type='mmdet_efficientdet.ResizeCrop',
        image_size=image_size,
        ratio_range=(0.1, 2.0)),
    dict(type='PackDetInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='mmdet_efficientdet.ResizeCrop',
        image_size=image_size,
        ratio_range=(1.0, 1.0)),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
                   'scale_factor'))
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
