"""Layers and backbones that several papers share."""
