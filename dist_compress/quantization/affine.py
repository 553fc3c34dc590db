"""Affine quantization of tensors, as pure functions: q = clamp(round(x / scale) + zero_point, quant_min, quant_max).

As in Jacob et al. 2018, arXiv:1712.05877. Zero is always a number of its own, so every range is extended to hold it.
Rounding is to the nearest, ties to even. The arithmetic is that of torch's own functions (the reciprocal of the scale
is multiplied with), so `fake_quantize` has the bits of torch.fake_quantize_per_tensor_affine and
torch.fake_quantize_per_channel_affine. Scale and zero point broadcast to the tensor. Everything is local.
"""

from __future__ import annotations

from typing import Any

import torch

from dist_compress.quantization.dtypes import QuantDtype

EPS = torch.finfo(torch.float32).eps  # the smallest scale


def qparams(low: torch.Tensor, high: torch.Tensor, dtype: QuantDtype, scheme: str) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 scale and int32 zero point, both of the shape of `low` and `high`, of ranges [low, high].

    int8, [-1, 3]:  affine                (4 / 255, -64)
                    symmetric             (3 / 127.5, 0)     -128..127
                    symmetric_restricted  (3 / 127, 0)       -127..127
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if dtype.is_float:
        amax = torch.maximum(-low, high)
        return (amax / dtype.quant_max).clamp(min=EPS), torch.zeros_like(amax, dtype=torch.int32)
    span = float(dtype.quant_max - dtype.quant_min)
    if scheme == "affine":
        scale = ((high - low) / span).clamp(min=EPS)
        zero_point = dtype.quant_min - torch.round(low / scale).to(torch.int32)
        return scale, zero_point.clamp(dtype.quant_min, dtype.quant_max)
    scale = (torch.maximum(-low, high) / (span / 2)).clamp(min=EPS)
    middle = 0 if dtype.is_signed else (dtype.quant_max + dtype.quant_min + 1) // 2
    return scale, torch.full_like(scale, middle, dtype=torch.int32)


def quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, dtype: QuantDtype) -> torch.Tensor:
    """What is stored: `dtype.storage`, the shape of `x`."""
    if dtype.is_float:
        return (x.float() * (1.0 / scale)).clamp(dtype.quant_min, dtype.quant_max).to(dtype.storage)
    if dtype.is_binary:  # the sign; that of zero is +1
        return torch.where(x >= 0, 1, -1).to(dtype.storage)
    return _levels(x, scale, zero_point, dtype).to(dtype.storage)


def dequantize(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """float32, the shape of `q`."""
    return (q.float() - zero_point) * scale


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, dtype: QuantDtype) -> torch.Tensor:
    """`dequantize(quantize(x))` in the dtype of `x`."""
    if not dtype.is_integer:
        return (quantize(x, scale, zero_point, dtype).float() * scale).to(x.dtype)
    return _scaled(_clip(_rounded(x, scale), zero_point, dtype), scale).to(x.dtype)


def in_range(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, dtype: QuantDtype) -> torch.Tensor:
    """bool, the shape of `x`: what is rounded, not clipped."""
    if not dtype.is_integer:
        return x.float().abs() <= dtype.quant_max * scale
    rounded = _rounded(x, scale)
    return _clip(rounded, zero_point, dtype) == rounded


def _levels(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, dtype: QuantDtype) -> torch.Tensor:
    """float32: whole numbers in [quant_min, quant_max]."""
    return _clip(_rounded(x, scale), zero_point, dtype) + zero_point


def _rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.mul(x.float(), 1.0 / scale).round_()


def _clip(rounded: torch.Tensor, zero_point: torch.Tensor, dtype: QuantDtype) -> torch.Tensor:
    """Levels less their zero point. Without adding it: passes over an activation are what quantizing costs."""
    return rounded.minimum((dtype.quant_max - zero_point).float()).maximum((dtype.quant_min - zero_point).float())


def _scaled(clipped: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(scale.new_zeros(()), clipped, scale)  # adding 0 leaves no -0.0


class StraightThrough(torch.autograd.Function):
    """fake_quantize with a gradient that passes: everywhere, or only where nothing was clipped (`masked`)."""

    @staticmethod
    def forward(ctx: Any, x, scale, zero_point, dtype, masked):  # type: ignore[no-untyped-def]
        ctx.masked = masked
        if not masked or not dtype.is_integer:
            if masked:
                ctx.save_for_backward(in_range(x, scale, zero_point, dtype))
            return fake_quantize(x, scale, zero_point, dtype)
        rounded = _rounded(x, scale)
        clipped = _clip(rounded, zero_point, dtype)
        ctx.save_for_backward(clipped == rounded)
        return _scaled(clipped, scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad = grads[0]
        return (torch.where(ctx.saved_tensors[0], grad, 0.0) if ctx.masked else grad), None, None, None, None


def simulate(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, dtype: QuantDtype, masked: bool
) -> torch.Tensor:
    """`fake_quantize` with the gradient of `apply_method`: qat_clamp_round is `masked`, clamp_round is not."""
    return StraightThrough.apply(x, scale, zero_point, dtype, masked)  # type: ignore[no-any-return]
