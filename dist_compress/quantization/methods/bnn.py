"""Binarized networks (Courbariaux et al. 2016, arXiv:1602.02830): weights and activations are -1 or +1, by their sign.

Of zero the sign is +1. The gradient of an activation passes where its absolute value is at most 1, that of a weight
everywhere; in return latent weights are clipped to [-1, 1] after every optimizer step. There is no scale: weights lose
their magnitude, so a BatchNorm has to follow, which stays as it is (it is not folded).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dist_compress.errors import UserError
from dist_compress.quantization.fake_quant import FakeQuantize, Spec


@dataclass
class Options:
    pass


class Bnn(FakeQuantize):
    refits = folds = mixes = False
    binary = True
    weight_dtype = activation_dtype = "binary"
    weight_granularity = "per_tensor"
    apply_method = "bnn_clamp_round"

    def __init__(self, spec: Spec, shape: Sequence[int], options: Any, device: torch.device | str = "cpu") -> None:
        if not spec.dtype.is_binary or spec.granularity.dynamic:
            raise UserError(
                f"bnn takes signs: quant_dtype={spec.dtype.name} with {spec.granularity} is not for it. Leave both "
                "out, or choose another method such as qat."
            )
        super().__init__(spec, shape, options, device)

    def new_observer(self, shape: Sequence[int], device: torch.device | str) -> None:
        return None

    def quantized(self, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        return Sign.apply(x)  # type: ignore[no-any-return]

    def fit(self, weight: torch.Tensor) -> None:
        pass

    def weight_gradient(self, weight: torch.Tensor, grad: torch.Tensor, sums: torch.Tensor | None) -> torch.Tensor:
        return grad

    @torch.no_grad()
    def stepped(self, latent: torch.Tensor | None) -> None:
        if latent is not None:
            latent.clamp_(-1, 1)


class Sign(torch.autograd.Function):
    """+1 where x >= 0, else -1; the gradient is that of the hard tanh (equation 4)."""

    @staticmethod
    def forward(ctx: Any, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x.abs() <= 1)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return torch.where(ctx.saved_tensors[0], grads[0], 0.0)
