"""A quantized model as it is delivered: how quantizers are put into a model, described, and put into another one.

    {"format": 1, "folded": [["conv1", "bn1"]], "calls": [["layer1.0.add_0", "add", 1]],
     "quantizers": [{"module": "conv1", "target": "weight", "quant_scheme": "symmetric_restricted",
                     "quant_dtype": "int8", "quant_min": -127, "quant_max": 127,
                     "granularity": ["PerChannel", 0], "scale_shape": [16, 1, 1, 1]}]}

Scales and zero points are buffers, with the weights. Everything here is local.
"""

from __future__ import annotations

import copy
from dataclasses import astuple
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dist_compress import call_sites
from dist_compress.config_list import is_activation
from dist_compress.quantization.dtypes import BIAS, DTYPES, QuantDtype
from dist_compress.quantization.fake_quant import FakeQuantize, Spec
from dist_compress.quantization.fuse import Folded
from dist_compress.quantization.granularity import Granularity, PerChannel, PerTensor
from dist_compress.sites import replace

_FORMAT = 1
_KINDS = {kind.__name__: kind for kind in Granularity.__subclasses__()}
_MOST = 2**30  # a bias of more units of its scale stays float


def install(model: nn.Module, module: str, target: str, quantizer: FakeQuantize) -> RemovableHandle | None:
    """Let `quantizer` be a submodule of `module`: quantizer_input_0, quantizer_weight; one of an activation is called
    in the data flow from now on, until the handle takes it off again."""
    owner = model.get_submodule(module)
    owner.add_module(name_of(target), quantizer)
    quantizer.place = (module, target)
    return replace(owner, target, quantizer, module) if is_activation(target) else None


def name_of(target: str) -> str:
    return f"quantizer_{target.strip('_').replace('.', '_')}"


def quantizers(model: nn.Module) -> dict[tuple[str, str], FakeQuantize]:
    """{(module, target): quantizer} of all that were installed, in the order of the model."""
    return {module.place: module for module in model.modules() if isinstance(module, FakeQuantize)}


def without_quantizers(model: nn.Module) -> nn.Module:
    """A copy with the quantized weights in it, but no quantizer: what goes into a layer is float."""
    copied = copy.deepcopy(model)
    for (module, target), quantizer in quantizers(copied).items():
        owner = copied.get_submodule(module)
        delattr(owner, name_of(target))
        for hooks in (owner._forward_pre_hooks, owner._forward_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "fn", None) is quantizer]:
                del hooks[key]
                owner._forward_pre_hooks_with_kwargs.pop(key, None)
    return copied


@torch.no_grad()
def round_biases(model: nn.Module) -> None:
    """Biases as integer kernels add them: int32 in units of (scale of the input) * (scale of the weight).

    Where the input has one integer scale and the weight, without zero point, one or one for each output channel.
    """
    found = quantizers(model)
    for (module, target), weight in found.items():
        source = found.get((module, "_input_0"))
        layer: Any = model.get_submodule(module)
        if target != "weight" or source is None or layer.bias is None or (module, "bias") in found:
            continue
        dim = 1 if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) else 0
        by_channel = isinstance(weight.spec.granularity, PerTensor) or weight.spec.granularity == PerChannel(dim)
        integers = source.spec.dtype.is_integer and weight.spec.dtype.is_integer
        if not (by_channel and integers and isinstance(source.spec.granularity, PerTensor)):
            continue
        scale = (source.scale * weight.scale.flatten()).expand(layer.bias.shape).contiguous()
        if weight.zero_point.any() or (layer.bias.abs() / scale).max() > _MOST:
            continue
        spec = Spec(BIAS, "symmetric", PerChannel(0), False, False)
        quantizer = FakeQuantize(spec, layer.bias.shape, None, layer.bias.device)
        quantizer.scale.copy_(scale)
        quantizer.enabled = True
        install(model, module, "bias", quantizer)
        layer.bias.copy_(quantizer.compress(layer.bias))


def describe(model: nn.Module) -> dict[str, Any] | None:
    """What `rebuild` needs beside the weights; None for a model without quantizers."""
    found = quantizers(model)
    if not found:
        return None
    return {
        "format": _FORMAT,
        "folded": [[m.layer, name] for name, m in model.named_modules() if isinstance(m, Folded)],
        "calls": call_sites.describe(model),
        "quantizers": [
            {
                "module": module,
                "target": target,
                "quant_dtype": q.spec.dtype.name,
                "quant_min": q.spec.dtype.quant_min,
                "quant_max": q.spec.dtype.quant_max,
                "quant_scheme": q.spec.scheme,
                "granularity": [type(q.spec.granularity).__name__, *map(_plain, astuple(q.spec.granularity))],
                "scale_shape": list(q.scale.shape),
            }
            for (module, target), q in found.items()
        ],
    }


def rebuild(model: nn.Module, description: dict[str, Any]) -> None:
    """Make the float model one that `describe` described, in place; weights and scales are then loaded into it."""
    for layer_name, norm in description["folded"]:
        layer: Any = model.get_submodule(layer_name)
        channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        layer.bias = nn.Parameter(torch.zeros(channels, dtype=layer.weight.dtype, device=layer.weight.device))
        parent, _, name = norm.rpartition(".")
        setattr(model.get_submodule(parent), name, Folded(layer_name))
    call_sites.restore(model, description.get("calls", []))
    device = next(model.parameters()).device
    for d in description["quantizers"]:
        kind, *values = d["granularity"]
        granularity = _KINDS[kind](*(tuple(v) if isinstance(v, list) else v for v in values))
        known = BIAS if d["quant_dtype"] == BIAS.name else DTYPES[d["quant_dtype"]]
        dtype = QuantDtype(known.name, d["quant_min"], d["quant_max"], known.storage)
        spec = Spec(dtype, d["quant_scheme"], granularity, False, is_activation(d["target"]))
        quantizer = _Loaded(spec, d["scale_shape"], device)
        install(model, d["module"], d["target"], quantizer)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class _Loaded(FakeQuantize):
    """A quantizer whose scale comes from a file."""

    def __init__(self, spec: Spec, scale_shape: list[int], device: torch.device) -> None:
        nn.Module.__init__(self)
        self.spec, self.options, self.observer, self.place = spec, None, None, ("", "")
        self.register_buffer("scale", torch.ones(scale_shape, device=device))
        self.register_buffer("zero_point", torch.zeros(scale_shape, dtype=torch.int32, device=device))
        self.enabled, self.hearing, self.measured, self.watch = True, False, [], None
