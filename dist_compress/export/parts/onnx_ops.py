"""QuantizeLinear and DequantizeLinear of ONNX opset 21 as operators of torch, which the exporter writes one to one.

scale []              a tensor
scale [n]             the entries of dim `axis`
scale as x, but dim `axis` shorter: blocks of `block_size` along `axis`; of a computed scale the whole dim
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dist_compress.quantization.affine import dequantize, quantize
from dist_compress.quantization.dtypes import QuantDtype
from dist_compress.quantization.fake_quant import FakeQuantize, Spec
from dist_compress.quantization.granularity import PerChannel, PerTensor

_LIBRARY = torch.library.Library("dist_compress", "DEF")
_LIBRARY.define("quantize_linear(Tensor x, Tensor s, Tensor? z, int axis, int block_size, ScalarType dtype) -> Tensor")
_LIBRARY.define("dequantize_linear(Tensor q, Tensor s, Tensor? z, int axis, int block_size) -> Tensor")
_OPS: Any = torch.ops.dist_compress


def _quantize(x, s, z, axis, block_size, dtype):  # type: ignore[no-untyped-def]
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    whole = QuantDtype("", int(limits.min), int(limits.max), dtype)
    return quantize(x, _spread(s, x, axis), 0 if z is None else _spread(z, x, axis).int(), whole)  # type: ignore[arg-type]


def _dequantize(q, s, z, axis, block_size):  # type: ignore[no-untyped-def]
    return dequantize(q, _spread(s, q, axis), 0 if z is None else _spread(z, q, axis).int())  # type: ignore[arg-type]


def _spread(s: torch.Tensor, x: torch.Tensor, axis: int) -> torch.Tensor:
    if s.dim() == 0:
        return s
    if s.dim() == 1:
        return s.view([-1 if d == axis else 1 for d in range(x.dim())])
    return s if s.shape[axis] == 1 else s.repeat_interleave(x.shape[axis] // s.shape[axis], axis)


_LIBRARY.impl("quantize_linear", _quantize, "CompositeExplicitAutograd")
_LIBRARY.impl("dequantize_linear", _dequantize, "CompositeExplicitAutograd")
_LIBRARY.impl("quantize_linear", lambda x, s, z, axis, block_size, dtype: torch.empty_like(x, dtype=dtype), "Meta")
_LIBRARY.impl("dequantize_linear", lambda q, s, z, axis, block_size: torch.empty_like(q, dtype=torch.float32), "Meta")


def translations() -> dict[Any, Any]:
    """What the exporter makes of the two."""
    from onnxscript import opset21

    op: Any = opset21

    def quantize_linear(x, s, z, axis: int, block_size: int, dtype: int):  # type: ignore[no-untyped-def]
        if z is None:
            return op.QuantizeLinear(x, s, axis=axis, block_size=block_size, output_dtype=dtype)
        return op.QuantizeLinear(x, s, z, axis=axis, block_size=block_size)

    def dequantize_linear(q, s, z, axis: int, block_size: int):  # type: ignore[no-untyped-def]
        both = (q, s) if z is None else (q, s, z)
        return op.DequantizeLinear(*both, axis=axis, block_size=block_size)

    return {_OPS.quantize_linear.default: quantize_linear, _OPS.dequantize_linear.default: dequantize_linear}


class Linear:
    """`convert.Ops` by these two. A zero point that is zero everywhere is left out."""

    def parameter(self, q: FakeQuantize, integers: torch.Tensor) -> nn.Module:
        return _Parameter(q, integers)

    def activation(self, q: FakeQuantize) -> Callable[[torch.Tensor], torch.Tensor]:
        spec, dtype = q.spec, q.spec.dtype
        if not spec.granularity.dynamic:
            q.scale, q.zero_point = _flat(q.scale.detach(), spec), _flat(q.zero_point, spec).to(dtype.storage)

        def quantized(x: torch.Tensor) -> torch.Tensor:
            s, z = q.scales_for(x) if spec.granularity.dynamic else (q.scale, q.zero_point)
            s, axis, size = _blocks(s, x, spec)
            z = None if dtype.is_float else _blocks(z, x, spec)[0].to(dtype.storage)
            x = x if z is None else _clamped(x, _spread(s, x, axis), _spread(z, x, axis).int(), dtype)
            return _OPS.dequantize_linear(_OPS.quantize_linear(x, s, z, axis, size, dtype.storage), s, z, axis, size)

        return quantized


class _Parameter(nn.Module):
    scale: torch.Tensor

    def __init__(self, q: FakeQuantize, integers: torch.Tensor) -> None:
        super().__init__()
        s, self.axis, self.size = _blocks(_flat(q.scale.detach(), q.spec), integers, q.spec)
        z = _blocks(_flat(q.zero_point, q.spec), integers, q.spec)[0].to(q.spec.dtype.storage)
        self.register_buffer("scale", s.contiguous())
        self.register_buffer("zero_point", z.contiguous() if q.zero_point.any() else None)

    def forward(self, integers: torch.Tensor) -> torch.Tensor:
        return _OPS.dequantize_linear(integers, self.scale, self.zero_point, self.axis, self.size)


def _clamped(x: torch.Tensor, s: torch.Tensor, z: torch.Tensor, dtype: QuantDtype) -> torch.Tensor:
    """QuantizeLinear saturates where the storage ends: to where a narrower dtype does."""
    limits = torch.iinfo(dtype.storage)
    if (dtype.quant_min, dtype.quant_max) == (limits.min, limits.max):
        return x
    return torch.clamp(x, (dtype.quant_min - z) * s, (dtype.quant_max - z) * s)


def _flat(scale: torch.Tensor, spec: Spec) -> torch.Tensor:
    """[] of a tensor, [n] of channels, the same of blocks."""
    if isinstance(spec.granularity, PerTensor):
        return scale.reshape(())
    return scale.flatten() if isinstance(spec.granularity, PerChannel) else scale


def _blocks(scale: torch.Tensor, x: torch.Tensor, spec: Spec) -> tuple[torch.Tensor, int, int]:
    """Scale (or zero point) as the operators take it, their axis and block size."""
    if isinstance(spec.granularity, PerTensor):
        return scale, 1, 0
    if isinstance(spec.granularity, PerChannel):
        return scale, spec.granularity.dim % x.dim(), 0
    last = x.dim() - 1
    if spec.granularity.dynamic:
        return scale, last, int(x.shape[last])
    parts = [d for d in range(x.dim()) if scale.shape[d] != 1 and scale.shape[d] != x.shape[d]]
    axis = parts[-1] if parts else last
    for dim in range(x.dim()):  # the other dims of blocks get an entry for each of the tensor's
        if dim != axis and scale.shape[dim] == 1:
            scale = scale.expand([x.shape[d] if d == dim else -1 for d in range(x.dim())])
        elif dim != axis and scale.shape[dim] != x.shape[dim]:
            scale = scale.repeat_interleave(x.shape[dim] // scale.shape[dim], dim)
    return scale, axis, int(x.shape[axis]) // scale.shape[axis]
