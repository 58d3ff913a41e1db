"""Trained detectors without MMDetection, by PyTorch and safetensors alone."""
from .detector import Detections, Detector, load_detector
from .folding import plain_network
from .network import PlainNetwork, load_plain, save_plain

__all__ = [
    'Detections', 'Detector', 'PlainNetwork', 'load_detector', 'load_plain',
    'plain_network', 'save_plain'
]
