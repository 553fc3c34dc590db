"""A delivered model as export formats want it: integers in the weights, quantize and dequantize in the flow.

torch.ops.quantized_decomposed is what torch.export programs of quantized models are made of; granularities it has no
operator for are plain arithmetic. Another format brings `Ops` of its own. Everything here is local; the model itself
stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401 - defines torch.ops.quantized_decomposed
from torch.nn.utils import parametrize

from dist_compress.quantization.affine import dequantize, fake_quantize, quantize
from dist_compress.quantization.deploy import quantizers
from dist_compress.quantization.fake_quant import FakeQuantize, Spec
from dist_compress.quantization.granularity import PerChannel, PerGroup, PerTensor, PerToken, spread

_OPS: Any = torch.ops.quantized_decomposed


class Ops(Protocol):
    """How a format says it. Both are asked once, so that what they compute then is a constant of the format."""

    def parameter(self, q: FakeQuantize, integers: torch.Tensor) -> nn.Module:
        """What makes float32 of the integers of a parameter."""
        ...

    def activation(self, q: FakeQuantize) -> Callable[[torch.Tensor], torch.Tensor]:
        """What quantizes an activation, float32, and dequantizes it. Tensors it needs are buffers of `q`."""
        ...


class Decomposed:
    """torch.ops.quantized_decomposed."""

    def parameter(self, q: FakeQuantize, integers: torch.Tensor) -> nn.Module:
        return _Dequantize(q)

    def activation(self, q: FakeQuantize) -> Callable[[torch.Tensor], torch.Tensor]:
        spec, granularity, rest = q.spec, q.spec.granularity, _rest(q.spec)
        if isinstance(granularity, PerTensor) and spec.dtype.is_integer:
            one = (float(q.scale), int(q.zero_point), *rest)
            return lambda x: _OPS.dequantize_per_tensor(_OPS.quantize_per_tensor(x, *one), *one)

        def quantized(x: torch.Tensor) -> torch.Tensor:
            if isinstance(granularity, PerChannel) and spec.dtype.is_integer:
                axis = (q.scale.flatten(), q.zero_point.flatten(), granularity.dim, *rest)
                return _OPS.dequantize_per_channel(_OPS.quantize_per_channel(x, *axis), *axis)
            scale, zero_point = q.scales_for(x)
            if isinstance(granularity, PerToken) and spec.dtype.is_integer:
                token = (scale, zero_point, *rest)
                return _OPS.dequantize_per_token(_OPS.quantize_per_token(x, *token), *token, torch.float32)
            return fake_quantize(x, scale, zero_point, spec.dtype)

        return quantized


class _Dequantize(nn.Module):
    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, q: FakeQuantize) -> None:
        super().__init__()
        self.spec = q.spec
        self.register_buffer("scale", q.scale.detach())
        self.register_buffer("zero_point", q.zero_point.detach())
        self.one = (float(q.scale), int(q.zero_point)) if isinstance(q.spec.granularity, PerTensor) else (1.0, 0)

    def forward(self, integers: torch.Tensor) -> torch.Tensor:
        spec, granularity, rest = self.spec, self.spec.granularity, _rest(self.spec)
        if not spec.dtype.is_float:  # whose operators subtract an integer, which float8 cannot
            if isinstance(granularity, PerTensor):
                return _OPS.dequantize_per_tensor(integers, *self.one, *rest)
            if isinstance(granularity, PerChannel):
                axis = (self.scale.flatten(), self.zero_point.flatten(), granularity.dim % integers.dim())
                return _OPS.dequantize_per_channel(integers, *axis, *rest)
            if isinstance(granularity, PerGroup) and integers.dim() == 2 and granularity.size > 1:
                groups = (self.scale, self.zero_point, *rest, granularity.size, torch.float32)
                return _OPS.dequantize_per_channel_group(integers, *groups)
        scale, zero_point = (spread(t, integers.shape, granularity) for t in (self.scale, self.zero_point))
        return dequantize(integers, scale, zero_point)


def _rest(spec: Spec) -> tuple[int, int, torch.dtype]:
    return spec.dtype.quant_min, spec.dtype.quant_max, spec.dtype.storage


def convert(model: nn.Module, ops: Ops | None = None) -> nn.Module:
    """A copy, for inference, whose parameters with a quantizer are integers and whose activations are quantized and
    dequantized, all by `ops`. A parameter that modules share stays one. Local."""
    ops = ops or Decomposed()
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    for (name, target), q in quantizers(copied).items():
        if q.spec.is_activation:
            q.forward = _in_dtype(ops.activation(q))  # type: ignore[method-assign]
            continue
        module = copied.get_submodule(name)
        parameter = module.get_parameter(target)
        integers = integers_of(parameter, q)
        dequantizing = _InDtype(ops.parameter(q, integers), parameter.dtype)
        delattr(module, f"quantizer_{target}")
        for owner in list(copied.modules()):
            for own, held in list(owner._parameters.items()):
                if held is parameter:
                    delattr(owner, own)
                    owner.register_buffer(own, integers)
                    parametrize.register_parametrization(owner, own, dequantizing, unsafe=True)
    return copied


def integers_of(parameter: torch.Tensor, q: FakeQuantize) -> torch.Tensor:
    """What the file holds of a parameter: int8, uint8, int16, float8 or, of a bias, int32."""
    return quantize(parameter.detach(), *q.scales_for(parameter), q.spec.dtype)


def compare_integers(model: nn.Module, held: Mapping[str, torch.Tensor], key: str, where: Any) -> int:
    """The number of integers `held` has under the names of the parameters, each of which is the fake quantizer's; of
    equal tensors a file may have kept one, by one of the names. Local. Raises RuntimeError, which begins with `key`."""
    count = 0
    for (module, target), q in quantizers(model).items():
        if q.spec.is_activation:
            continue
        name = f"{module}.{target}".removeprefix(".")
        wanted = integers_of(model.get_parameter(name), q).cpu()
        found = [held[name]] if name in held else held.values()
        if not any(tensor.dtype == wanted.dtype and torch.equal(tensor.float(), wanted.float()) for tensor in found):
            raise RuntimeError(f"{key}: the integers of {name} in {where} are not those of the run.")
        count += wanted.numel()
    return count


class _InDtype(nn.Module):
    """A parametrization whose result has the dtype of the model's parameter."""

    def __init__(self, dequantize: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.dequantize, self.dtype = dequantize, dtype

    def forward(self, integers: torch.Tensor) -> torch.Tensor:
        return self.dequantize(integers).to(self.dtype)


def _in_dtype(quantized: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: quantized(x.float()).to(x.dtype)
