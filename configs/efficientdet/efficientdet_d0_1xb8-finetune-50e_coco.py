_base_ = './efficientdet_d0_8xb16-300e_coco.py'

# A published detector learns the classes of a small dataset, on one GPU. Your
# config inherits this one, names classes and data (see README), and another
# size by scale_config. For 4 or 16 images set batch_size and add
# --auto-scale-lr.
load_from = 'effdet://tf_efficientdet_d0'
transfer_classes = True
# 8 images are too few for statistics of the batch: all norms keep COCO's.
model = dict(norm_eval=True, backbone=dict(init_cfg=None))

# In 30 epochs of the paper's D1, this jitter is worth 0.7 AP more than the
# official one, and 3.1 more than none.
train_pipeline = _base_.train_pipeline
train_pipeline[-2].ratio_range = (0.5, 1.5)

train_dataloader = dict(batch_size=8, dataset=dict(pipeline=train_pipeline))
train_cfg = dict(max_epochs=50, val_interval=5)
# Half of 0.08 for 64 images, since little has to be learned anew.
optim_wrapper = dict(optimizer=dict(lr=0.005))
auto_scale_lr = dict(base_batch_size=8)
