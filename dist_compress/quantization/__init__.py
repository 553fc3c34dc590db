"""Quantization: which tensors become numbers of few bits, with which scales, and what of it is delivered."""

from dist_compress.quantization.deploy import describe, rebuild, round_biases
from dist_compress.quantization.quantizer import Quantizer, build

__all__ = ["Quantizer", "build", "describe", "rebuild", "round_biases"]
