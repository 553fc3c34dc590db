"""Pruning: which units and elements go, when, and the masks that take them out."""

from dist_compress.pruning.defaults import register_defaults
from dist_compress.pruning.pruner import Pruner, build

__all__ = ["Pruner", "build", "register_defaults"]
