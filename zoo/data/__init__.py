"""Data modules, sources, transforms, and the embedded world."""
