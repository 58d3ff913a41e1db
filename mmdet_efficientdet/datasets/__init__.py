"""Data: the transform, and what is read and checked before a training."""
from .transforms import ResizeCrop

__all__ = ['ResizeCrop']
