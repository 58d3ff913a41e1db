_base_ = './efficientdet_d0_8xb16-300e_coco.py'

from mmdet_efficientdet.scaling import scale_config

scale_config(_base_, 'd7')
