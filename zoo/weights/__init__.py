"""Published weights: downloads, strict conversion, loading by name."""
