"""Recognition: image classification."""
