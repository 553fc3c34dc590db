"""DoReFa (Zhou et al. 2016, arXiv:1606.06160): bounded weights, activations and, if asked for, gradients of few bits.

    weight       w_t = tanh(w) / max|tanh(w)|, the largest of the block (by default the tensor); round(n * w_t) / n
    activation   round(n * clamp(x, 0, 1)) / n
    gradient     of an activation, with `gradient_bits`: stochastic, by the largest of each sample (equation 12)

The paper cuts [-1, 1] into 2^k - 1 steps, and zero is no number; here it is 2^k - 2 (n = 2^(k-1) - 1) and zero is one:
pruned weights stay pruned, and integer kernels need no zero point. With quant_dtype: binary weights are the paper's
sign(w) * mean|w|. Weights lose their magnitude, so a BatchNorm has to follow, which stays as it is (it is not folded).
The rounding of a gradient is drawn from the seed of the micro-batch, whoever computes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dist_compress.errors import UserError
from dist_compress.quantization.affine import EPS, fake_quantize
from dist_compress.quantization.fake_quant import FakeQuantize, Spec


@dataclass
class Options:
    gradient_bits: int | None = None  # of the gradients that go back through an activation; None: as they are

    def __post_init__(self) -> None:
        if self.gradient_bits is not None and not 2 <= self.gradient_bits <= 16:
            raise UserError(f"quantization.options.gradient_bits={self.gradient_bits}: must be 2 to 16, or null.")


class Dorefa(FakeQuantize):
    most: torch.Tensor  # the largest abs(tanh(w)) of each block
    folds = mixes = elementwise = False
    binary = True
    weight_granularity = "per_tensor"
    apply_method = "dorefa_clamp_round"

    def __init__(self, spec: Spec, shape: Sequence[int], options: Any, device: torch.device | str = "cpu") -> None:
        dtype, said = spec.dtype, f"quant_dtype={spec.dtype.name}, quant_scheme={spec.scheme}"
        if spec.is_activation and (not dtype.is_integer or dtype.is_signed or spec.granularity.dynamic):
            raise UserError(
                f"dorefa quantizes activations to [0, 1]: {said}, {spec.granularity} is not for it. Use an unsigned "
                "dtype such as uint4, per_tensor; or another method, such as pact, for this target."
            )
        if not spec.is_activation and not dtype.is_binary and dtype.quant_min != -dtype.quant_max:
            raise UserError(
                f"dorefa quantizes weights to [-1, 1]: {said} is not for it. Use a signed dtype such as int4 with "
                "quant_scheme: symmetric_restricted, or quant_dtype: binary."
            )
        super().__init__(spec, shape, options, device)
        self.scale.fill_(1 / dtype.quant_max)
        self.reduced_by = "sum" if dtype.is_binary else "max"
        self.register_buffer("most", torch.ones_like(self.scale), persistent=False)

    def new_observer(self, shape: Sequence[int], device: torch.device | str) -> None:
        return None

    def quantized(self, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        out = Bounded.apply(x, fake_quantize(x, scale, zero_point, self.spec.dtype), self.options.gradient_bits)
        return out  # type: ignore[no-any-return]

    def statistic(self, weight: torch.Tensor) -> torch.Tensor:
        """The sum of abs(w), or the largest abs(tanh(w))."""
        weight = weight.detach()
        return (self.block_sums(weight.abs()) if self.spec.dtype.is_binary else self.extent(weight.tanh().abs())[1])[
            None
        ]

    def take(self, statistic: torch.Tensor) -> None:
        if self.spec.dtype.is_binary:
            mean = statistic[0] / (math.prod(self.shape) // self.scale.numel())
            self.scale.copy_(mean.view_as(self.scale).clamp(min=EPS))
        else:
            self.most.copy_(statistic[0].view_as(self.most).clamp(min=EPS))

    @torch.no_grad()
    def compress(self, weight: torch.Tensor) -> torch.Tensor:
        binary = self.spec.dtype.is_binary
        return super().compress(weight if binary else weight.tanh() / self.spread(self.most, weight.shape))

    @torch.no_grad()
    def gradient_sums(self, weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor | None:
        """Of gradient times tanh(w), and the number of the largest."""
        if self.spec.dtype.is_binary:
            return None
        bounded = weight.tanh()
        at_most = bounded.abs() == self.spread(self.most, weight.shape)
        return torch.stack([self.block_sums(grad * bounded), self.block_sums(at_most)])

    @torch.no_grad()
    def weight_gradient(self, weight: torch.Tensor, grad: torch.Tensor, sums: torch.Tensor | None) -> torch.Tensor:
        """Through tanh(w) / m; that of the maximum m is shared by the elements that have it."""
        if sums is None:  # signs: straight through
            return grad
        bounded, most = weight.tanh(), self.spread(self.most, weight.shape)
        of_most = -sums[0].view_as(self.most) / self.most.double().square() / sums[1].view_as(self.most).clamp(min=1)
        share = self.spread(of_most.float(), weight.shape)
        of_bounded = grad / most + torch.where(bounded.abs() == most, bounded.sign() * share, 0.0)
        return of_bounded * (1 - bounded.square())


def rounded_gradient(grad: torch.Tensor, bits: int) -> torch.Tensor:
    """Equation 12: each sample (index of dimension 0) has steps of 2 * max / (2^bits - 1); expected to be `grad`."""
    steps = 2**bits - 1
    most = grad.abs().amax(tuple(range(1, grad.dim())), keepdim=True) if grad.dim() > 1 else grad.abs()
    unit = grad / most.clamp(min=torch.finfo(grad.dtype).tiny) * 0.5 + 0.5 + (torch.rand_like(grad) - 0.5) / steps
    return (torch.round(unit.clamp(0, 1) * steps) / steps - 0.5) * 2 * most


class Bounded(torch.autograd.Function):
    """`quantized` as it is; the gradient of clamp(x, 0, 1), rounded."""

    @staticmethod
    def forward(ctx: Any, x, quantized, bits):  # type: ignore[no-untyped-def]
        ctx.save_for_backward((x >= 0) & (x <= 1))
        ctx.bits = bits
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad = torch.where(ctx.saved_tensors[0], grads[0], 0.0)
        return (grad if ctx.bits is None else rounded_gradient(grad, ctx.bits)), None, None
