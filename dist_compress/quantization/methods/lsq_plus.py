"""Learned scale and offset (LSQ+, Bhalgat et al. 2020, arXiv:2004.09576): lsq, for activations with negative values.

    clamp(round((x - offset) / scale), quant_min, quant_max) * scale + offset

An activation begins at the range with the smallest squared error over the calibration; a weight, which has no offset,
at max|mean -+ 3 std| / 2^(bits - 1). Zero has to be a number of its own, so what acts is the offset rounded to whole
steps, -zero_point * scale; gradients are the paper's at that offset. Both have the gradient scale of lsq.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dist_compress.quantization import histogram
from dist_compress.quantization.affine import EPS, fake_quantize, qparams
from dist_compress.quantization.dtypes import QuantDtype
from dist_compress.quantization.fake_quant import FakeQuantize, Spec
from dist_compress.quantization.granularity import rows, spread
from dist_compress.quantization.methods.lsq import Lsq
from dist_compress.quantization.observer import Observer


@dataclass
class Options:
    pass


class LsqPlus(Lsq):
    apply_method = "lsq_plus_clamp_round"
    offset: nn.Parameter

    def __init__(self, spec: Spec, shape: Sequence[int], options: Any, device: torch.device | str = "cpu") -> None:
        super().__init__(spec, shape, options, device)
        if spec.is_activation:
            self.register_parameter("offset", nn.Parameter(torch.zeros(self.zero_point.shape, device=device)))

    def new_observer(self, shape: Sequence[int], device: torch.device | str) -> Observer:
        search = histogram.mse(self.spec.dtype, self.spec.scheme)
        return histogram.Histogram(self.spec.granularity, shape, device, search)

    def begin(self) -> None:
        if self.observer is None:
            return
        scale, zero_point = qparams(*self.observer.range(), self.spec.dtype, self.spec.scheme)
        self._set_scale(scale.flatten())
        with torch.no_grad():
            self.offset.copy_((-zero_point * scale).view_as(self.offset))
        self.observer = None  # learned from here on
        self.stepped(None)

    def fit(self, weight: torch.Tensor) -> None:
        cut = rows(weight.detach(), self.spec.granularity).double()
        kept = cut != 0  # the weights that are not masked
        count = kept.sum(1).clamp(min=1)
        mean = cut.sum(1) / count
        three = 3 * (torch.where(kept, cut - mean[:, None], 0.0).square().sum(1) / count).sqrt()
        self._set_scale(torch.maximum((mean - three).abs(), (mean + three).abs()) / (self.spec.dtype.num_levels / 2))

    @torch.no_grad()
    def stepped(self, latent: torch.Tensor | None) -> None:
        if latent is None:
            steps = torch.round(-self.offset / self.scale.clamp(min=EPS))
            dtype = self.spec.dtype
            self.zero_point.copy_(steps.clamp(dtype.quant_min, dtype.quant_max))

    def quantized(self, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        if "offset" not in self._parameters:  # over, when the model is delivered
            return FakeQuantize.quantized(self, x, scale, zero_point)
        offset = spread(self.offset, x.shape, self.spec.granularity)
        args = (x, scale, offset, zero_point, self.spec.dtype, self.gain)
        return LearnedOffset.apply(*args)  # type: ignore[no-any-return]


class LearnedOffset(torch.autograd.Function):
    """fake_quantize, where -zero_point * scale stands for the offset."""

    @staticmethod
    def forward(ctx: Any, x, scale, offset, zero_point, dtype, gain):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, scale, zero_point)
        ctx.rest = dtype, gain
        return fake_quantize(x, scale, zero_point, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x, scale, zero_point), (dtype, gain) = ctx.saved_tensors, ctx.rest
        of_x, of_scale, of_offset = gradients(x, scale, zero_point, grads[0], dtype)
        both = [(g.sum_to_size(scale.shape) * gain) for g in (of_scale, of_offset)]
        return of_x, *both, None, None, None


def gradients(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, grad: torch.Tensor, dtype: QuantDtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of x, and of scale and offset before they are summed over what shares them; all of the shape of x."""
    level = x.float() / scale + zero_point
    inside = (level >= dtype.quant_min) & (level <= dtype.quant_max)
    slope = torch.where(inside, torch.round(level) - level, level.clamp(dtype.quant_min, dtype.quant_max))
    return torch.where(inside, grad, 0.0), grad.float() * slope, torch.where(inside, 0.0, grad.float())
