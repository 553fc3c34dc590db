"""Quantization: which tensors become numbers of few bits, with which scales, and what of it is delivered."""
