"""Trained detectors without MMDetection, by PyTorch and safetensors alone."""
from .folding import plain_network
from .network import PlainNetwork, load_plain, save_plain

__all__ = ['PlainNetwork', 'load_plain', 'plain_network', 'save_plain']
