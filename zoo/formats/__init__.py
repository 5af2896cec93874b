"""Files of other frameworks, and PyTorch's own, read without running anything in them."""
