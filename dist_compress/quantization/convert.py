"""A delivered model in the operators of torch's export: integers in the weights, quantize and dequantize in the flow.

torch.ops.quantized_decomposed is what torch.export programs of quantized models are made of, and what the ONNX exporter
turns into QuantizeLinear and DequantizeLinear. Everything here is local; the model itself stays as it is.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401 - defines torch.ops.quantized_decomposed
from torch.nn.utils import parametrize

from dist_compress.errors import UserError
from dist_compress.quantization.affine import quantize
from dist_compress.quantization.deploy import quantizers
from dist_compress.quantization.fake_quant import FakeQuantize
from dist_compress.quantization.granularity import PerChannel, PerTensor

_OPS: Any = torch.ops.quantized_decomposed


def check(model: nn.Module, key: str) -> None:
    """Raise UserError, which begins with `key`, for what has no such operator. Local."""
    for (module, target), q in quantizers(model).items():
        what = f"{key}: {module}.{target} is quantized "
        granularity = q.spec.granularity
        if q.spec.dtype.is_float:
            raise UserError(f"{what}to {q.spec.dtype.name}; only integers can be exported. Use int8 or uint8.")
        if not isinstance(granularity, PerTensor | PerChannel) or granularity.dynamic:
            raise UserError(
                f"{what}with {granularity}; only per_tensor, out_channel, in_channel and per_channel can be exported."
            )


def convert(model: nn.Module) -> nn.Module:
    """A copy, for inference, whose parameters with a quantizer are integers and whose activations are quantized and
    dequantized by torch.ops.quantized_decomposed. Local."""
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    for (name, target), q in quantizers(copied).items():
        if q.spec.is_activation:
            q.quantized = _Activation(q)  # type: ignore[method-assign]
            continue
        module = copied.get_submodule(name)
        integers = integers_of(module.get_parameter(target), q)
        delattr(module, target)
        module.register_buffer(target, integers)
        parametrize.register_parametrization(module, target, _Dequantize(q), unsafe=True)
        delattr(module, f"quantizer_{target}")
    return copied


def integers_of(parameter: torch.Tensor, q: FakeQuantize) -> torch.Tensor:
    """What the file holds of a parameter: int8, uint8, int16 or, of a bias, int32."""
    return quantize(parameter.detach(), *q.scales_for(parameter), q.spec.dtype)


class _Dequantize(nn.Module):
    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, q: FakeQuantize) -> None:
        super().__init__()
        self.spec = q.spec
        self.register_buffer("scale", q.scale.detach().flatten())
        self.register_buffer("zero_point", q.zero_point.detach().flatten())

    def forward(self, integers: torch.Tensor) -> torch.Tensor:
        dtype, granularity = self.spec.dtype, self.spec.granularity
        rest = (dtype.quant_min, dtype.quant_max, dtype.storage)
        if isinstance(granularity, PerChannel):
            return _OPS.dequantize_per_channel(integers, self.scale, self.zero_point, granularity.dim, *rest)
        return _OPS.dequantize_per_tensor(integers, float(self.scale), int(self.zero_point), *rest)


class _Activation:
    """Quantize, then dequantize. A storage type that holds more numbers than the dtype needs a clamp before."""

    def __init__(self, q: FakeQuantize) -> None:
        self.spec = q.spec
        self.scale, self.zero_point = q.scale.detach().flatten(), q.zero_point.detach().flatten()

    def __call__(self, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        dtype, granularity = self.spec.dtype, self.spec.granularity
        whole = torch.iinfo(dtype.storage)
        if (dtype.quant_min, dtype.quant_max) != (whole.min, whole.max):
            x = torch.clamp(x, (dtype.quant_min - zero_point) * scale, (dtype.quant_max - zero_point) * scale)
        rest = (dtype.quant_min, dtype.quant_max, dtype.storage)
        if isinstance(granularity, PerChannel):
            both = (self.scale, self.zero_point, granularity.dim)
            return _OPS.dequantize_per_channel(_OPS.quantize_per_channel(x, *both, *rest), *both, *rest)
        one = (float(self.scale), int(self.zero_point))
        return _OPS.dequantize_per_tensor(_OPS.quantize_per_tensor(x, *one, *rest), *one, *rest)

