"""Learned step size quantization (Esser et al. 2020, arXiv:1902.08153): the scale is a parameter of the model.

Begins at 2 * mean(abs(x)) / sqrt(quant_max), the mean over the calibration (activations, from the histogram) or over
the weights that are not zero. The gradient of the scale is divided by sqrt(n * quant_max), n: the weights that share a
scale, or the features of one sample, so that it does not depend on batches or ranks. No zero point: an unsigned dtype
is for tensors without negative values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dist_compress.errors import UserError
from dist_compress.quantization import histogram
from dist_compress.quantization.affine import EPS
from dist_compress.quantization.fake_quant import FakeQuantize, Spec
from dist_compress.quantization.granularity import rows
from dist_compress.quantization.observer import Observer


@dataclass
class Options:
    pass


class Lsq(FakeQuantize):
    refits = mixes = False
    weight_scheme = "symmetric"
    apply_method = "lsq_clamp_round"

    def __init__(self, spec: Spec, shape: Sequence[int], options: Any, device: torch.device | str = "cpu") -> None:
        if spec.granularity.dynamic or spec.dtype.is_float:
            raise UserError("a scale of integers is learned: neither per_token nor fp8. Choose ptq or qat for those.")
        super().__init__(spec, shape, options, device)
        self._buffers.pop("scale")
        first = torch.ones(self.zero_point.shape, device=device)
        self.register_parameter("scale", nn.Parameter(first))
        self.gain = self._gain()

    def _gain(self) -> float:
        spec, shape = self.spec, self.shape
        values = math.prod(shape[1:]) * (1 if spec.is_activation else shape[0])  # of one sample
        return 1 / math.sqrt(max(1, values // self.zero_point.numel()) * spec.dtype.quant_max)

    def resize(self, shape: Sequence[int], members: torch.Tensor | None) -> None:
        super().resize(shape, members)
        self.gain = self._gain()

    def new_observer(self, shape: Sequence[int], device: torch.device | str) -> Observer:
        return histogram.Histogram(self.spec.granularity, shape, device, _mean_range(self.spec))

    def begin(self) -> None:
        if self.observer is not None:
            _, high = self.observer.range()
            self.cut_off = 0.0 if self.spec.dtype.is_signed else float(self.observer.low.min())
            self._set_scale(high)
            self.observer = None  # learned from here on

    def follow(self) -> None:
        pass

    def fit(self, weight: torch.Tensor) -> None:
        size = rows(weight.detach(), self.spec.granularity).abs().double()
        mean = size.sum(1) / (size > 0).sum(1).clamp(min=1)  # of the weights that are not masked
        self._set_scale(_first_scale(mean, self.spec))

    def _set_scale(self, scale: torch.Tensor) -> None:
        with torch.no_grad():
            self.scale.copy_(scale.view_as(self.scale).clamp(min=EPS))

    def scales_for(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale, zero_point = super().scales_for(x)
        return scale.clamp(min=EPS), zero_point

    def quantized(self, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        low, high = self.spec.dtype.quant_min, self.spec.dtype.quant_max
        return LearnedStep.apply(x, scale, low, high, self.gain)  # type: ignore[no-any-return]

    @torch.no_grad()
    def gradient_sums(self, weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        low, high = self.spec.dtype.quant_min, self.spec.dtype.quant_max
        return self.block_sums(gradients(weight, self.scales_for(weight)[0], grad, low, high)[1])[None]

    @torch.no_grad()
    def weight_gradient(self, weight: torch.Tensor, grad: torch.Tensor, sums: torch.Tensor | None) -> torch.Tensor:
        assert sums is not None
        self.scale.grad = (sums[0] * self.gain).view_as(self.scale).to(self.scale.dtype)
        level = weight.float() / self.scales_for(weight)[0]
        return grad * _inside(level, self.spec.dtype.quant_min, self.spec.dtype.quant_max)


class LearnedStep(torch.autograd.Function):
    """clamp(round(x / scale), low, high) * scale."""

    @staticmethod
    def forward(ctx: Any, x, scale, low, high, gain):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, scale)
        ctx.rest = low, high, gain
        return (torch.round(x.float() * (1.0 / scale)).clamp(low, high) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x, scale), (low, high, gain) = ctx.saved_tensors, ctx.rest
        of_x, of_scale = gradients(x, scale, grads[0], low, high)
        return of_x, of_scale.sum_to_size(scale.shape) * gain, None, None, None


def gradients(
    x: torch.Tensor, scale: torch.Tensor, grad: torch.Tensor, low: int, high: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Equations 3 and 5: of x, and of the scale before it is summed over what shares it; both of the shape of x."""
    level = x.float() / scale
    inside = _inside(level, low, high)
    slope = torch.where(inside, torch.round(level) - level, level.clamp(low, high))
    return grad * inside, grad.float() * slope


def _inside(level: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return (level >= low) & (level <= high)


def _first_scale(mean: torch.Tensor, spec: Spec) -> torch.Tensor:
    return (2 * mean / math.sqrt(spec.dtype.quant_max)).float()


def _mean_range(spec: Spec) -> histogram.Search:
    """A range whose upper end is the first scale, from the mean of abs(x) by the middles of the bins."""

    def search(counts: torch.Tensor, width: float, low: float, high: float) -> tuple[float, float]:
        half = len(counts) // 2
        middles = ((torch.arange(len(counts), dtype=torch.float64) + 0.5 - half) * width).abs()
        mean = (counts.double() * middles).sum() / counts.sum().clamp(min=1)
        return 0.0, float(_first_scale(mean, spec))

    return search
