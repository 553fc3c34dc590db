"""Pruning: which units and elements go, when, and the masks that take them out."""

from dist_compress.pruning.pruner import Pruner, build

__all__ = ["Pruner", "build"]
