"""Weights of others and of ours: found, read, renamed, checked, converted."""
__all__ = []
