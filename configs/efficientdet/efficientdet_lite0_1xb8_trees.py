_base_ = './efficientdet_d0_1xb8-adamw-1k_coco.py'

from mmdet_efficientdet.scaling import scale_config

scale_config(_base_, 'lite0', image_size=256, classes=['Tree'])

data_root = 'data/trees/'
# Trees have 8 to 108 px, anchors at least 24.
enlargement = 1.8

model = dict(test_cfg=dict(max_per_img=300))

train_pipeline = [
    dict(type='mmdet_efficientdet.SeedTransforms'),
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='RandomFlip',
        prob=[0.25, 0.25, 0.25],
        direction=['horizontal', 'vertical', 'diagonal']),
    # Enlarges windows of 400 px by 1.4 to 2.2.
    dict(
        type='mmdet_efficientdet.ResizeCrop',
        image_size=256,
        ratio_range=(2.19, 3.44)),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(8, 8), keep_empty=False),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackDetInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale_factor=enlargement, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
                   'scale_factor'))
]
# With --tta: from above, a tree may be seen mirrored in both axes.
tta_model = dict(
    type='DetTTAModel',
    tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=300))
tta_pipeline = [
    *test_pipeline[:2],
    dict(
        type='TestTimeAug',
        transforms=[[
            dict(type='RandomFlip', prob=0.0),
            *(dict(type='RandomFlip', prob=1.0, direction=direction)
              for direction in ('horizontal', 'vertical', 'diagonal'))
        ],
                    [
                        dict(
                            type='PackDetInputs',
                            meta_keys=(*test_pipeline[-1]['meta_keys'], 'flip',
                                       'flip_direction'))
                    ]])
]
images = dict(data_root=data_root, data_prefix=dict(img='images/'))
train_dataloader = dict(
    num_workers=1,
    dataset=dict(ann_file='train.json', pipeline=train_pipeline, **images))
val_dataloader = dict(
    num_workers=1,
    dataset=dict(ann_file='test.json', pipeline=test_pipeline, **images))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'test.json')
test_evaluator = val_evaluator

# The held-out part is looked at once, at the end, and then by test --tta.
train_cfg = dict(max_iters=1200, val_interval=1200)
default_hooks = dict(checkpoint=dict(save_best=None))
