"""Models whose parameters lie in parts on the ranks: FSDP2 for real, and flat partitions as ZeRO-3 has them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dist_compress import comm
from dist_compress.exchange import segments_of, within
from dist_compress.layout import Layout, Run


def dealt(num: int, pieces: int, rank: int, size: int) -> list[Run]:
    """Runs of `num` elements cut unevenly into `pieces` (some empty), dealt to the ranks; the last rank has most."""
    edges = [num * i * i // pieces**2 for i in range(pieces + 1)]
    owner = [min((i * i + i // 3) % (size + 1), size - 1) for i in range(pieces)]
    return [(a, b - a) for a, b, r in zip(edges, edges[1:], owner, strict=False) if r == rank]


class Flat(Layout):
    """Every parameter is one flat tensor a rank, of runs that know nothing of rows."""

    def __init__(self, model: nn.Module, pieces: int = 13, unsharded: Collection[str] = ()) -> None:
        """Takes what other ranks hold out of the model: its parameters become their local parts, shape lost."""
        super().__init__(model)
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.pieces, self.unsharded = pieces, set(unsharded)
        self.is_whole_now = True
        self.release()

    def shape(self, name: str) -> torch.Size:
        return self.shapes[name]

    def runs(self, name: str, rank: int) -> list[Run]:
        if name in self.unsharded:
            return [(0, self.shapes[name].numel())]
        return dealt(self.shapes[name].numel(), self.pieces, rank, comm.world_size())

    def gather(self) -> None:
        """Every parameter whole on every rank, as in the forward pass; nothing if it is already."""
        for name, parameter in self._parted() if not self.is_whole_now else ():
            parameter.grad, parameter.data = None, whole(self, name)
        self.is_whole_now = True

    def release(self) -> None:
        """Back to the local parts."""
        for name, parameter in self._parted() if self.is_whole_now else ():
            pieces = [parameter.detach().flatten()[a : a + n] for a, n in self.runs(name, comm.rank())]
            parameter.grad, parameter.data = None, torch.cat([parameter.detach().new_empty(0), *pieces])
        self.is_whole_now = False

    def _parted(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if name not in self.unsharded]


def whole(layout: Layout, name: str) -> torch.Tensor:
    """A parameter in its shape on every rank, from the parts. Collective."""
    if layout.is_whole(name):
        return layout.local(name).clone()
    flat, at = torch.zeros(layout.shape(name).numel()), 0
    local, segments = layout.local(name).flatten(), segments_of(layout.holdings(name))
    for first, length in layout.runs(name, comm.rank()):
        for s in within(segments, first, first + length):
            if s.ranks[0] == comm.rank():
                flat[s.start : s.end] = local[at + s.start - first : at + s.end - first]
        at += length
    return comm.all_reduce(flat).view(layout.shape(name))


def shard(model: nn.Module, kind: str, unsharded: Collection[str] = ()) -> Layout:
    """`model` in parts: "fsdp" (with a unit for two of its layers), "hsdp" (two replicas of it), "flat" or "whole".
    `unsharded`: parameters that stay whole on every rank."""
    if kind == "flat":
        return Flat(model, unsharded=unsharded)
    if kind in ("fsdp", "hsdp"):
        size = comm.world_size()
        names = {"mesh_dim_names": ("replicate", "shard")} if kind == "hsdp" else {}
        mesh = init_device_mesh("cpu", (2, size // 2) if kind == "hsdp" else (size,), **names)
        ignored = {model.get_parameter(name) for name in unsharded}
        for child in [c for c in model.children() if sum(1 for _ in c.parameters())][1:4:2]:
            fully_shard(child, mesh=mesh, ignored_params=ignored)
        fully_shard(model, mesh=mesh, ignored_params=ignored)
    return Layout(model)


def set_gradient(layout: Layout, name: str, grad: torch.Tensor) -> None:
    """The part of a whole gradient that this rank holds becomes that of the parameter."""
    parameter = layout.model.get_parameter(name)
    local = layout.part(name, grad).reshape(layout.local(name).shape).clone()
    if isinstance(parameter, DTensor):
        local = DTensor.from_local(
            local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        )
    parameter.grad = local


def listen(model: nn.Module) -> dict[str, torch.Tensor]:
    """{parameter: its whole gradient of the last backward}, as hooks on the gathered parameters see it."""
    grads: dict[str, torch.Tensor] = {}
    heard: set[nn.Parameter] = set()

    def look(module: nn.Module, args: Any) -> None:
        for key, parameter in module.named_parameters(recurse=False):
            if parameter not in heard:
                heard.add(parameter)
                name = f"{names[module]}.{key}"
                parameter.register_hook(lambda grad, name=name: grads.__setitem__(name, grad.detach().clone()))

    names = {module: name for name, module in model.named_modules()}
    for module in names:
        module.register_forward_pre_hook(look)
    return grads
