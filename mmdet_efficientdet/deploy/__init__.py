"""Trained detectors without MMDetection; each module imports what it needs."""
