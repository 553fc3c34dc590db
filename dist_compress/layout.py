"""Which part of each parameter a rank holds: all of it, or runs of its flattened elements.

The seam between backends and everything that decides on weights. A parameter's elements are numbered in row-major
order; a rank holds runs (first, length) of these numbers, in the order in which they lie in its local tensor. That
covers replicas, FSDP2 (rows, none on the last ranks of a small parameter), tensor parallel columns and flat ZeRO
partitions, where rows straddle ranks. The runs of every rank are arithmetic, so nobody has to send them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from dist_compress import comm
from dist_compress.errors import UserError

Run = tuple[int, int]  # first element, number of elements


class Layout:
    """Reads it off the parameters: a plain tensor is whole on every rank, a DTensor (FSDP2) knows its place.

    All of it is local and about the moment between two steps, when a sharded model is sharded: after an evaluation
    FSDP2 needs `reshard()` first. A backend with partitions of its own overrides what is above `is_whole`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def shape(self, name: str) -> torch.Size:
        """Of the whole parameter; the same on every rank."""
        return self.model.get_parameter(name).shape

    def local(self, name: str) -> torch.Tensor:
        """What this rank holds, live: writing to it changes the parameter. May be empty."""
        return local_part(self.model.get_parameter(name).detach())

    def device(self, name: str) -> torch.device:
        """Of `local`, or where that is going to be."""
        device = self.local(name).device
        return comm.device() if device.type == "meta" else device

    def grad(self, name: str) -> torch.Tensor | None:
        """The reduced gradient of what this rank holds, live."""
        grad = self.model.get_parameter(name).grad
        return None if grad is None else local_part(grad.detach())

    def runs(self, name: str, rank: int) -> Sequence[Run]:
        """What rank `rank` holds; the same answer on every rank."""
        parameter = self.model.get_parameter(name)
        if isinstance(parameter, DTensor):
            return box_runs(parameter.shape, _box(name, parameter, rank))
        return [(0, parameter.numel())]

    def wrapped(self, name: str, local: torch.Tensor) -> torch.Tensor:
        """A tensor that lies as the parameter does, as optimizers and checkpoints take it: of a DTensor, a DTensor."""
        parameter = self.model.get_parameter(name)
        if not isinstance(parameter, DTensor):
            return local
        return DTensor.from_local(
            local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        )

    def unwrapped(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The inverse of `wrapped`."""
        return local_part(tensor)

    def blank(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Of the kind that `wrapped` returns, to be read into."""
        if isinstance(self.model.get_parameter(name), DTensor):
            return self.wrapped(name, torch.empty_like(self.local(name), dtype=dtype))
        return torch.empty(self.shape(name), dtype=dtype)

    def publish(self) -> None:
        """`local` was written to: bring it into what the model computes with, if that is another tensor. Collective."""

    def is_whole(self, name: str) -> bool:
        """Every rank holds all of it; the same on every rank."""
        whole = [(0, self.shape(name).numel())]
        return all(list(self.runs(name, rank)) == whole for rank in range(comm.world_size()))

    def holdings(self, name: str) -> list[list[Run]]:
        """The runs of every rank."""
        return [list(self.runs(name, rank)) for rank in range(comm.world_size())]

    def part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Of a tensor that is broadcastable to the whole parameter what this rank holds, broadcastable to `local`."""
        if self.is_whole(name):
            return tensor
        full = tensor.expand(self.shape(name))
        pieces = [cut(full, first, first + length) for first, length in self.runs(name, comm.rank())]
        return torch.cat([tensor.new_empty(0), *pieces]).view(self.local(name).shape)


def cut(full: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Elements [start, end) of a tensor, maybe an expanded one: only the rows they lie in are written out."""
    if full.dim() < 2 or start == end:
        return full.reshape(-1)[start:end]
    width = math.prod(full.shape[1:])
    row = start // width
    return full[row : -(-end // width)].reshape(-1)[start - row * width : end - row * width]


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes, also while its parameters have no values. Local."""
    device = next(model.parameters()).device
    return comm.device() if device.type == "meta" else device


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, which may be a DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _box(name: str, parameter: DTensor, rank: int) -> list[tuple[int, int]]:
    """[start, end) of each dim that `rank` holds: what torch.chunk leaves to it, once per dim of the mesh."""
    mesh = parameter.device_mesh
    if mesh.size() != comm.world_size():
        raise UserError(
            f"{name} is spread over {mesh.size()} of {comm.world_size()} ranks. A parameter must be sharded over a "
            "mesh that has all of them."
        )
    place = (mesh.mesh == rank).nonzero()[0].tolist()
    box = [(0, size) for size in parameter.shape]
    for axis, placement in enumerate(parameter.placements):
        if type(placement) is Shard:
            start, end = box[placement.dim]
            width = -(-(end - start) // mesh.size(axis))
            first = min(start + place[axis] * width, end)
            box[placement.dim] = (first, min(first + width, end))
        elif not placement.is_replicate():
            raise UserError(f"{name} is placed by {placement}; Shard and Replicate are supported.")
    return box


def box_runs(shape: Sequence[int], box: Sequence[tuple[int, int]]) -> list[Run]:
    """The runs of a box [start, end) in each dim of a tensor of `shape`."""
    if any(start >= end for start, end in box):
        return []
    inner = len(shape)  # dims from here on are whole
    while inner and box[inner - 1] == (0, shape[inner - 1]):
        inner -= 1
    if inner == 0:
        return [(0, math.prod(shape))]
    start, end = box[inner - 1]
    strides = [math.prod(shape[d + 1 :]) for d in range(inner)]
    return [
        (sum(i * stride for i, stride in zip((*outer, start), strides, strict=True)), (end - start) * strides[-1])
        for outer in itertools.product(*(range(*sides) for sides in box[: inner - 1]))
    ]
