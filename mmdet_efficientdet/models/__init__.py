"""The network: backbone, neck, head and detector."""
from .anchors import AnchorBoxCoder, AnchorGenerator
from .bifpn import BiFPN
from .data_preprocessor import RectDataPreprocessor
from .efficientdet import EfficientDet
from .efficientdet_head import EfficientDetHead
from .efficientnet import EfficientNet
from .focal_loss import FocalLoss

__all__ = [
    'AnchorBoxCoder', 'AnchorGenerator', 'BiFPN', 'EfficientDet',
    'EfficientDetHead', 'EfficientNet', 'FocalLoss', 'RectDataPreprocessor'
]
