"""Parameterized clipping (PACT, Choi et al. 2018, arXiv:1805.06085): activations have the range [0, clip], clip learns.

The gradient of clip is that of the clipped values, and half its square times `decay` is part of the loss. It begins at
the largest value of the calibration. A signed dtype has the range [quant_min / quant_max * clip, clip]. Parameters are
quantized as by qat; the paper takes the weights of dorefa: method: dorefa in their target_settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dist_compress.errors import UserError
from dist_compress.quantization.affine import EPS, fake_quantize
from dist_compress.quantization.dtypes import QuantDtype
from dist_compress.quantization.fake_quant import FakeQuantize, Spec
from dist_compress.quantization.granularity import spread


@dataclass
class Options:
    decay: float = 0.0001  # L2, of clip; the paper takes the weight decay of the weights

    def __post_init__(self) -> None:
        if self.decay < 0:
            raise UserError(f"quantization.options.decay={self.decay}: must be at least 0.")


class Pact(FakeQuantize):
    clip: nn.Parameter

    def __init__(self, spec: Spec, shape: Sequence[int], options: Any, device: torch.device | str = "cpu") -> None:
        if spec.is_activation and (spec.granularity.dynamic or not spec.dtype.is_integer):
            raise UserError("pact learns the range of integers: neither per_token nor fp8. Choose qat for those.")
        super().__init__(spec, shape, options, device)
        if spec.is_activation:
            self.register_parameter("clip", nn.Parameter(torch.ones_like(self.scale)))

    def begin(self) -> None:
        if self.observer is None:
            return
        low, high = self.observer.range()
        self.cut_off = 0.0 if self.spec.dtype.is_signed else float(low.min())
        with torch.no_grad():
            self.clip.copy_(torch.maximum(-low, high) if self.spec.dtype.is_signed else high)
        self.observer = None  # learned from here on
        self.stepped(None)

    @torch.no_grad()
    def stepped(self, latent: torch.Tensor | None) -> None:
        if latent is None:
            self.clip.clamp_(min=EPS * self.spec.dtype.quant_max)
            self.scale.copy_(self.clip / self.spec.dtype.quant_max)

    def before_step(self) -> None:
        if self.clip.grad is not None:
            self.clip.grad.add_(self.clip.detach(), alpha=self.options.decay)

    def quantized(self, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        if "clip" not in self._parameters:  # over, when the model is delivered
            return super().quantized(x, scale, zero_point)
        clip = spread(self.clip, x.shape, self.spec.granularity)
        return LearnedClip.apply(x, clip, scale, zero_point, self.spec.dtype)  # type: ignore[no-any-return]


class LearnedClip(torch.autograd.Function):
    """round(clamp(x, 0, clip) / scale) * scale with scale = clip / quant_max."""

    @staticmethod
    def forward(ctx: Any, x, clip, scale, zero_point, dtype):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, clip)
        ctx.dtype = dtype
        return fake_quantize(x, scale, zero_point, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, clip = ctx.saved_tensors
        of_x, of_clip = gradients(x, clip, grads[0], ctx.dtype)
        return of_x, of_clip.sum_to_size(clip.shape), None, None, None


def gradients(
    x: torch.Tensor, clip: torch.Tensor, grad: torch.Tensor, dtype: QuantDtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Equation 3: of x, and of clip before it is summed over what shares it; both of the shape of x."""
    low = dtype.quant_min / dtype.quant_max
    above, below = x >= clip, x < low * clip
    slope = above.to(grad.dtype) + below.to(grad.dtype) * low
    return torch.where(above | below, 0.0, grad), grad.float() * slope
