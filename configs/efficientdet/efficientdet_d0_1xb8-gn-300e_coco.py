_base_ = './efficientdet_d0_8xb16-300e_coco.py'

# One small GPU: 8 images are too few for statistics of the batch. The batch
# norms of the backbone keep those of ImageNet, neck and head get group norms.
# For 4 or 16 images set batch_size and add --auto-scale-lr.
norm_cfg = dict(_delete_=True, type='GN', num_groups=8, eps=1e-3)
model = dict(
    backbone=dict(norm_eval=True),
    neck=dict(norm_cfg=norm_cfg),
    bbox_head=dict(norm_cfg=norm_cfg))

train_dataloader = dict(batch_size=8)
optim_wrapper = dict(optimizer=dict(lr=0.01))
auto_scale_lr = dict(base_batch_size=8)
