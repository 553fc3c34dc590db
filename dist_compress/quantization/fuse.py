"""Folding of BatchNorm into the layer before it: what runs when the model is deployed is one layer with other weights.

    y = gamma * (conv(x, w) + b - mean) / sigma + beta  =  conv(x, w * f) + (b - mean) * f + beta,   f = gamma / sigma

So it is w * f that is quantized (Jacob et al. 2018, arXiv:1712.05877, section 3.2). During training the layer holds
Q(w * f) / f, with gamma and the running sigma of the last step, and its norm stays: what the norm makes of it in
evaluation is exactly the folded layer. At the end the norm is folded for good and leaves a `Folded` in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm

from dist_compress import comm
from dist_compress.errors import UserError
from dist_compress.quantization.holding import Holding
from dist_compress.sites import Sites
from dist_compress.tracing.recorder import concrete_trace
from dist_compress.tracing.weightless import weightless

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Sigmoid)


@dataclass(frozen=True)
class Fused:
    """Modules in a row that are deployed as one: a layer, then a norm or an activation or both ("": none)."""

    layer: str
    norm: str = ""
    activation: str = ""

    @property
    def last(self) -> str:
        return self.activation or self.norm or self.layer


class Folded(nn.Identity):
    """In the place of a norm that was folded into `layer`."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer


def find(sites: Sites, layers: Sequence[str], wanted: Sequence[list[str]]) -> list[Fused]:
    """What can be fused with each of `layers`, in their order; `wanted`: `fuse_names` of the user, which must be
    possible. Traces the model. Local. Raises UserError."""
    model = sites.model
    if not wanted and not any(isinstance(m, (_BatchNorm, *_ACTIVATIONS)) for m in model.modules()):
        return []
    calls: dict[str, list[Node]] = {}
    with weightless(model, comm.device()):
        traced = concrete_trace(model, sites.args, sites.kwargs)
    for node in traced.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    modules = dict(model.named_modules())
    ran = {layer: sites.meant(layer, "_output_0") for layer in layers}  # a layer may be there and never be called
    flat = {layer for layer, outputs in ran.items() if outputs and len(outputs[0].shape) == 2}
    found = {layer: _after(layer, calls, modules, layer in flat) for layer in layers}
    for names in wanted:
        _check_wanted(names, layers, found, calls, modules)
    return [fused for fused in found.values() if fused.last != fused.layer]


def _after(layer: str, calls: dict[str, list[Node]], modules: dict[str, nn.Module], flat: bool) -> Fused:
    """What follows a layer and can be fused with it."""
    norm = _only_reader(layer, calls)
    if norm and not _folds(modules[layer], modules[norm], flat):
        norm = ""
    activation = _only_reader(norm or layer, calls)
    if activation and type(modules[activation]) not in _ACTIVATIONS:
        activation = ""
    return Fused(layer, norm, activation)


def _only_reader(name: str, calls: dict[str, list[Node]]) -> str:
    """The module that alone reads what a module puts out, if both are called once; else ""."""
    if len(calls.get(name, [])) != 1 or len(calls[name][0].users) != 1:
        return ""
    reader = next(iter(calls[name][0].users))
    return str(reader.target) if reader.op == "call_module" and len(calls[str(reader.target)]) == 1 else ""


def _folds(layer: nn.Module, norm: nn.Module, flat: bool) -> bool:
    """Whether `norm` acts on the output channels of `layer` and has statistics to fold. `flat`: the layer puts out
    [batch, features]; of [batch, tokens, features] a BatchNorm1d would normalise the tokens."""
    if not isinstance(norm, _BatchNorm) or norm.running_var is None:
        return False
    if isinstance(layer, _TRANSPOSED):
        return layer.groups == 1 and norm.num_features == layer.out_channels
    if isinstance(layer, nn.Linear):
        return type(norm) is nn.BatchNorm1d and norm.num_features == layer.out_features and flat
    return isinstance(layer, _CONV) and norm.num_features == layer.out_channels


def _check_wanted(
    names: list[str], layers: Sequence[str], found: dict[str, Fused], calls: dict[str, list[Node]],
    modules: dict[str, nn.Module],
) -> None:  # fmt: skip
    what = f"quantization.config_list: fuse_names={names}"
    for name in names:
        if name not in modules:
            raise UserError(f"{what}: the model has no module {name!r}.")
    if names[0] not in layers:
        raise UserError(f"{what}: {names[0]} must come first and be a target, with its weight, of the config list.")
    for first, second in zip(names, names[1:], strict=False):
        if _only_reader(first, calls) != second:
            raise UserError(
                f"{what}: {second} does not follow {first}, or is not alone in reading what it puts out. Name modules "
                "that run one after the other, each once."
            )
    fused = found[names[0]]
    if names != [name for name in (fused.layer, fused.norm, fused.activation) if name][: len(names)]:
        kinds = ", ".join(type(modules[name]).__name__ for name in names)
        raise UserError(
            f"{what}: {kinds} cannot be fused. A convolution or linear layer, then a BatchNorm, then an activation can."
        )


class Fold:
    """The arithmetic of one layer and its norm."""

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        self.layer, self.norm = layer, norm
        dim = 1 if isinstance(layer, _TRANSPOSED) else 0
        self.shape = [-1 if d == dim else 1 for d in range(layer.weight.dim())]  # type: ignore[operator, union-attr]
        self.affine = norm.weight is not None
        self.used: torch.Tensor | None = None  # the factor that the weights are quantized with; the norm goes on

    def factor(self, gamma: torch.Tensor | None = None) -> torch.Tensor:
        """gamma / sigma as they are now, float32, in a shape that broadcasts to the weight. `gamma`: None where the
        module has all of it."""
        norm: Any = self.norm
        inverse = torch.rsqrt(norm.running_var.float() + norm.eps)
        gamma = norm.weight if gamma is None else gamma
        return (inverse if gamma is None else gamma.detach().float() * inverse).view(self.shape)

    def used_in(self, holding: Holding | None) -> torch.Tensor:
        """The factor that is used, in a shape that broadcasts to what is held of the weight."""
        assert self.used is not None, "nobody has looked at the norm"
        return self.used if holding is None else holding.cut(self.used)

    def into(self, weight: torch.Tensor, factor: torch.Tensor | None = None) -> torch.Tensor:
        """The weight of the folded layer."""
        return weight.float() * (self.factor() if factor is None else factor)

    def out_of(self, folded: torch.Tensor, factor: torch.Tensor | None = None) -> torch.Tensor:
        """The weight that the norm makes `folded` of; 0 where gamma is, since then nothing of it is seen."""
        factor = self.factor() if factor is None else factor
        return torch.where(factor == 0, 0.0, folded / torch.where(factor == 0, 1.0, factor))

    def bias(self) -> torch.Tensor:
        """The bias of the folded layer, float32 [channels]."""
        layer: Any = self.layer
        norm: Any = self.norm
        own = norm.running_mean.new_zeros(()) if layer.bias is None else layer.bias.detach()
        bias = (own - norm.running_mean).float() * self.factor().flatten()
        return bias if norm.bias is None else bias + norm.bias.detach()


@torch.no_grad()
def fold(model: nn.Module, fused: Fused, weight: torch.Tensor) -> None:
    """Give the layer `weight` and the bias of the folded one, and put a `Folded` in the place of the norm. Local."""
    layer: Any = model.get_submodule(fused.layer)
    norm = model.get_submodule(fused.norm)
    bias = Fold(layer, norm).bias()
    layer.weight.copy_(weight)
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype))
    parent, _, name = fused.norm.rpartition(".")
    setattr(model.get_submodule(parent), name, Folded(fused.layer))
