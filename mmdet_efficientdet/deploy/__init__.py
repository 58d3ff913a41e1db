"""What runs a trained detector without MMDetection."""
