_base_ = './efficientdet_d0_8xb16-300e_coco.py'

# The inputs of Det-AdvProp: -1 to 1, padded with black. Its adversarial
# training and AutoAugment policy were not released in full.
model = dict(
    data_preprocessor=dict(
        mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], pad_value=-1),
    backbone=dict(
        init_cfg=dict(checkpoint='timm://tf_efficientnet_b0.ap_in1k')))
