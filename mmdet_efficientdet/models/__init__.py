"""Importing this package registers the models."""
from .anchors import AnchorBoxCoder, AnchorGenerator
from .bifpn import BiFPN
from .efficientdet import EfficientDet
from .efficientdet_head import EfficientDetHead
from .efficientnet import EfficientNet

__all__ = [
    'AnchorBoxCoder', 'AnchorGenerator', 'BiFPN', 'EfficientDet',
    'EfficientDetHead', 'EfficientNet'
]
