"""Distributed compression for PyTorch: prune, shrink and verify in one training loop."""

__version__ = "0.1.0"
