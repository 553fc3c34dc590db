"""Results of common ops on the meta device whose shapes torch works out in Python, slower than many a real op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func(*args, **kwargs)`, quickly where shapes and types agree in the usual way."""
    kernel = _KERNELS.get(func)
    result = kernel(*args) if kernel is not None and not kwargs and _on_meta(args[0]) else None
    return func(*args, **kwargs) if result is None else result


def _on_meta(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_meta


def _like(x: torch.Tensor, *settings: Any) -> torch.Tensor | None:
    return torch.empty_like(x) if x.is_floating_point() else None


def _itself(x: torch.Tensor, *settings: Any) -> torch.Tensor | None:
    return x if x.is_floating_point() else None


def _sum_or_product(x: torch.Tensor, y: Any) -> torch.Tensor | None:
    alike = _on_meta(y) and x.shape == y.shape and x.dtype == y.dtype and x.stride() == y.stride()
    return torch.empty_like(x) if alike else None


def _batch_norm(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...] | None:
    *tensors, training, _, _ = rest
    if training or x.dim() < 2 or x.dtype not in (torch.float32, torch.float64):
        return None
    if not all(t is None or _of(t, (x.size(1),), x.dtype) for t in tensors):
        return None
    return torch.empty_like(x), x.new_empty(x.size(1)), x.new_empty(x.size(1))


def _layer_norm(x: torch.Tensor, shape: list[int], weight: Any, bias: Any, eps: float) -> Any:
    normalised, rows = x.shape[x.dim() - len(shape) :], x.shape[: x.dim() - len(shape)]
    if tuple(shape) != normalised or not x.is_contiguous() or x.dtype not in (torch.float32, torch.float64):
        return None
    if not all(t is None or _of(t, tuple(shape), x.dtype) for t in (weight, bias)):
        return None
    statistics = x.new_empty((*rows, *(1 for _ in shape)))
    return torch.empty_like(x), statistics, torch.empty_like(statistics)


def _addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor | None:
    fits = a.dim() == b.dim() == 2 and a.size(1) == b.size(0) and a.dtype == b.dtype
    return a.new_empty(a.size(0), b.size(1)) if fits and _of(bias, (b.size(1),), a.dtype) else None


def _of(tensor: Any, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    return _on_meta(tensor) and tuple(tensor.shape) == shape and tensor.dtype == dtype


_KERNELS: dict[Any, Callable[..., Any]] = {
    aten.native_batch_norm.default: _batch_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.addmm.default: _addmm,
    aten.add.Tensor: _sum_or_product,
    aten.mul.Tensor: _sum_or_product,
    aten.add_.Tensor: lambda x, y: None if _sum_or_product(x, y) is None else x,
    **dict.fromkeys((aten.relu.default, aten.gelu.default, aten.hardtanh.default, aten.hardswish.default,
                     aten.hardsigmoid.default), _like),
    **dict.fromkeys((aten.relu_.default, aten.hardtanh_.default, aten.hardswish_.default, aten.hardsigmoid_.default),
                    _itself),
}  # fmt: skip
