"""Where models come from: `build` by source and name, `load_weights` from a file."""

from dist_compress.models.builder import build, describe, has_weights
from dist_compress.models.weights import load_weights

__all__ = ["build", "describe", "has_weights", "load_weights"]
