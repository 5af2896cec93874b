"""Papers on images and language."""
