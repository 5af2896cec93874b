"""Pure functions on tensors that several papers share."""
