"""Where models come from: `build` by source and name, `load_weights` from a file."""

from dist_compress.models.builder import build, describe
from dist_compress.models.weights import load_weights

__all__ = ["build", "describe", "load_weights"]
