"""Readers for the checkpoint files of other frameworks; none of them executes what it reads."""
