"""Runs the cases of MoCo v2: the same official code as MoCo's, so the same adapter."""

from __future__ import annotations

from zoo.parity import adapter

run = adapter("moco")
