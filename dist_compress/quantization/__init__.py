"""Quantization: which tensors become numbers of few bits, with which scales, and what of it is delivered."""

from dist_compress.quantization.defaults import register_defaults
from dist_compress.quantization.deploy import describe, rebuild, round_biases
from dist_compress.quantization.quantizer import Quantizer, build

__all__ = ["Quantizer", "build", "describe", "rebuild", "register_defaults", "round_biases"]
