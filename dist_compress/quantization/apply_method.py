"""An `apply_method` of one's own: what a tensor becomes in training, and which gradient passes.

A file, named by its dotted path, holds a dataclass `Options` (`apply_options`) and

    apply(x, scale, zero_point, dtype, options) -> tensor like x

made of operations that autograd knows, the gradient with respect to `x` being that of the method. `scale` (float32) and
`zero_point` (int32) broadcast to `x`; `dtype.quant_min` and `dtype.quant_max` bound the integers. What it returns are
numbers that can be stored, (q - zero_point) * scale with a whole q: they are what is evaluated and delivered. A soft
function has the gradient alone: `soft + (rounded - soft).detach()`. Both are tried on some numbers when a run starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dist_compress import method
from dist_compress.config import merge
from dist_compress.errors import UserError
from dist_compress.quantization.affine import fake_quantize
from dist_compress.quantization.dtypes import QuantDtype

GIVEN = ("clamp_round", "qat_clamp_round")  # those that are no file: see affine.simulate


@dataclass(frozen=True)
class Own:
    """`apply` of a file, and its options."""

    apply: Callable[..., torch.Tensor]
    options: Any

    def __call__(
        self, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, dtype: QuantDtype
    ) -> torch.Tensor:
        return self.apply(x, scale, zero_point, dtype, self.options)

    def gradient(
        self, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, dtype: QuantDtype, grad: torch.Tensor
    ) -> torch.Tensor:
        """That of `x`, from that of what it becomes."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self(x, scale, zero_point, dtype), x, grad)[0]


def find(name: str, options: Mapping[str, Any], dtype: QuantDtype, key: str) -> Own | None:
    """The user's rule of that name, tried on some numbers; None for those that are given. `key`: what messages begin
    with. Local. Raises UserError."""
    if name in GIVEN:
        if options:
            raise UserError(f"{key}.apply_options: {name} has none. Leave them out.")
        return None
    module = method.import_file(name, f"{key}.apply_method", f"Available: {', '.join(GIVEN)}")
    lacks = [part for part in ("Options", "apply") if not hasattr(module, part)]
    if lacks:
        raise UserError(f"{key}.apply_method={name!r}: {module.__name__} does not define `{lacks[0]}`. Add it.")
    own = Own(module.apply, merge(module.Options, options, f"{key}.apply_options"))
    if wrong := _tried(own, dtype):
        raise UserError(f"{key}.apply_method={name!r}: {wrong}")
    return own


def _tried(own: Own, dtype: QuantDtype) -> str:
    """What is wrong with it, if anything."""
    scale = torch.tensor([0.125])
    zero_point = torch.tensor([(dtype.quant_min + dtype.quant_max + 1) // 2 if dtype.is_integer else 0])
    zero_point = zero_point.to(torch.int32)
    ends = [float((end - int(zero_point)) * scale) for end in (dtype.quant_min, dtype.quant_max)]
    x = torch.linspace(1.5 * ends[0], 1.5 * ends[1], 257)
    try:
        out = own(x, scale, zero_point, dtype)
        if not isinstance(out, torch.Tensor) or out.shape != x.shape or out.dtype != x.dtype:
            return "apply must return a tensor of the shape and dtype of x."
        grad = own.gradient(x, scale, zero_point, dtype, torch.ones_like(x))
    except Exception as error:
        return f"apply failed on a tensor of shape [257]: {type(error).__name__}: {error}"
    if not bool(((fake_quantize(out, scale, zero_point, dtype) - out).abs() <= 1e-3 * scale).all()):
        return (
            "apply must return (q - zero_point) * scale with whole numbers q in range: that is what is stored. "
            "Return soft + (rounded - soft).detach() for a function that has the gradient alone."
        )
    if not bool(grad.isfinite().all()) or not bool(grad.any()):
        return "the gradient of apply with respect to x is zero everywhere, or not finite. Nothing would train."
    return ""
