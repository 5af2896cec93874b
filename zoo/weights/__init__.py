"""Weights: fetched, read from files of any make, and loaded into models."""
