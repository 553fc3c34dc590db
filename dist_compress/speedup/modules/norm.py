"""Norms over a dim that shrank: as if the slices that went, all zero, were still there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_HALF = (torch.float16, torch.bfloat16)
# What a norm module may apply to its result, one after the other: pointwise, and zero of zero.
TAILS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.GELU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish)


def behind(module: nn.Module, y: Tensor) -> Tensor:
    """`y` after the children of a norm module, which may work in place: nobody else holds it."""
    for child in module.children():
        y = child(y)
    return y


def normalise(
    x: Tensor,
    affine: tuple[Tensor, ...],
    *,
    width: int,
    eps: float,
    axis: int,
    centred: bool,
    one_plus: bool,
    single: bool,
    cast_first: bool = False,
    packed: bool = False,
) -> Tensor:
    """x over `axis`, divided by its root mean square (of the deviations, when `centred`) over `width` positions.

    Positions that x does not have count as zeros. affine: (), (weight,) or (weight, bias), each [x.size(axis)].
    one_plus: the factor is 1 + weight. single: computed in float32 whatever x is, as half precision always is.
    cast_first: back in the type of x before the factor. packed: the result is dense with `axis` innermost, not as x.
    """
    wide = x.float() if single or x.dtype in _HALF else x
    if centred:
        mean = wide.sum(axis, keepdim=True) / width
        wide = wide - mean
        variance = (wide.square().sum(axis, keepdim=True) + (width - x.size(axis)) * mean.square()) / width
    else:
        variance = wide.square().sum(axis, keepdim=True) / width
    y = wide * torch.rsqrt(variance + eps)
    y = y.to(x.dtype) if cast_first else y
    shape = [-1 if d == axis % x.dim() else 1 for d in range(x.dim())]
    for position, parameter in enumerate(affine):
        parameter = parameter.view(shape) if cast_first else parameter.view(shape).to(y.dtype)
        if position == 0:
            y = y * (1 + parameter if one_plus else parameter)
        else:
            y = y + parameter
    y = y if cast_first else y.to(x.dtype)
    return y.movedim(axis, -1).contiguous().movedim(-1, axis) if packed else y


class ExactNorm(nn.Module):
    """A layer norm or RMS norm that divides by the width it had. Never built, only exchanged for.

    Its own parameters, in their order, are weight and bias, if it has any.
    """

    formula: dict[str, Any]

    @classmethod
    def exchange(cls, module: nn.Module, settings: Mapping[str, int | float | bool]) -> None:
        """Make a norm one of this class, in place; it stays an `nn.LayerNorm` or `nn.RMSNorm` if it was one."""
        module.__class__ = next((kind for kind in (ExactLayerNorm, ExactRMSNorm) if _is_kind(module, kind)), cls)
        vars(module)["formula"] = dict(settings)
        NarrowNorm.exchange(module, {"kept": settings["kept"]})

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., kept], or [B, kept, ...] for norms over dim 1; the same shape."""
        affine = tuple(p for p in self._parameters.values() if p is not None)
        formula = {name: value for name, value in self.formula.items() if name != "kept"}
        return behind(self, normalise(x, affine, **formula))

    def extra_repr(self) -> str:
        return f"{self.formula['kept']} of {self.formula['width']}, eps={self.formula['eps']}"


class ExactLayerNorm(ExactNorm, nn.LayerNorm):
    """An `ExactNorm` that passes for an `nn.LayerNorm`."""


class ExactRMSNorm(ExactNorm, nn.RMSNorm):
    """An `ExactNorm` that passes for an `nn.RMSNorm`."""


class NarrowNorm:
    """The norm itself over fewer positions: another function, as `norm="plain"` asks for."""

    @classmethod
    def exchange(cls, module: nn.Module, settings: Mapping[str, int | float | bool]) -> None:
        """Tell the norm its new width, where it holds one as `normalized_shape`."""
        if hasattr(module, "normalized_shape"):
            vars(module)["normalized_shape"] = (int(settings["kept"]),)


def _is_kind(module: nn.Module, kind: type[ExactNorm]) -> bool:
    return isinstance(module, kind.__bases__[1])
