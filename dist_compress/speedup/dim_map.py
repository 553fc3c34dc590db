"""Where each dim of what an op returns comes from, found by running the op on coordinate grids."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from dist_compress.speedup import sets
from dist_compress.speedup.structure import Structure
from dist_compress.tracing import Op, Ref
from dist_compress.tracing.tape import map_tensors


@dataclass(frozen=True)
class DimMap:
    """Where each dim of one output comes from: (input dim, index vector); index None is the identity.

    Index -1 is a position that holds a constant. Input dim None: a new dim. `fixed`: input dims read at one position.
    """

    dims: tuple[tuple[int | None, torch.Tensor | None], ...]
    fixed: dict[int, int] = field(default_factory=dict)

    def push(self, s: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """The set of the output from the set of the input, which has `shape`."""
        for dim, position in self.fixed.items():
            s = s.narrow(dim, position if s.size(dim) > 1 else 0, 1)
        used = [dim for dim, _ in self.dims if dim is not None]
        s = s.permute(used + [d for d in range(s.dim()) if d not in used])
        s = s.reshape(s.shape[: len(used)])
        for position, (dim, _) in enumerate(self.dims):
            if dim is None:
                s = s.unsqueeze(position)
        for position, (dim, index) in enumerate(self.dims):
            if dim is not None and index is not None:
                s = self._read(s, position, index)
        return s

    def _read(self, s: torch.Tensor, position: int, index: torch.Tensor) -> torch.Tensor:
        valid = index >= 0
        if s.size(position) > 1:
            s = s.index_select(position, index.clamp(min=0))
        elif bool(valid.all()):
            return s
        return s & valid.view([-1 if d == position else 1 for d in range(s.dim())])

    def pull(self, s: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """The observed set of the input, which has `shape`, from the one of the output."""
        s = sets.any_over(s, [d for d, (dim, _) in enumerate(self.dims) if dim is None])
        for position, (dim, index) in enumerate(self.dims):
            if dim is not None and index is not None:
                s = self._scatter(s, position, index, shape[dim])
        kept = [d for d, (dim, _) in enumerate(self.dims) if dim is not None]
        s = s.permute(kept + [d for d in range(s.dim()) if d not in kept]).reshape([s.size(d) for d in kept])
        used = [dim for dim, _ in self.dims if dim is not None]
        missing = [d for d in range(len(shape)) if d not in used]
        s = s.reshape(list(s.shape) + [1] * len(missing))
        order = used + missing
        s = s.permute([order.index(d) for d in range(len(shape))])
        for dim, position in self.fixed.items():
            place = torch.arange(shape[dim]) == position
            s = s & place.view([-1 if d == dim else 1 for d in range(len(shape))])
        return s

    def _scatter(self, s: torch.Tensor, position: int, index: torch.Tensor, size: int) -> torch.Tensor:
        valid = index >= 0
        if s.size(position) == 1 and int(index[valid].unique().numel()) == size:
            return s
        wide = s.expand([len(index) if d == position else n for d, n in enumerate(s.shape)])
        source = wide.index_select(position, valid.nonzero().flatten()).to(torch.int32)
        total = torch.zeros([size if d == position else n for d, n in enumerate(s.shape)], dtype=torch.int32)
        return total.index_add_(position, index[valid], source) > 0

    def link(self, a: Ref, b: Ref, s: Structure, op: Op, pin_index: bool) -> None:
        dims_a, dims_b = s.dims(a), s.dims(b)
        for position, (dim, index) in enumerate(self.dims):
            if dim is None:
                continue
            if index is None:
                s.same(dims_a[dim], dims_b[position])
                continue
            valid = index >= 0
            s.link(dims_a[dim], index[valid], dims_b[position], valid.nonzero().flatten())
            if pin_index:
                s.pin(dims_a[dim], "reads it through an index or pads it by a fixed size", op)
                s.pin(dims_b[position], "reads it through an index or pads it by a fixed size", op)
        for dim in self.fixed:
            s.pin(dims_a[dim], "reads it at a fixed position", op)


@dataclass(frozen=True)
class _Call:
    """An op on one tensor of a shape, equal to others that do the same; `text` holds its plain arguments."""

    target: Any
    shape: tuple[int, ...]
    text: str
    op: Op = field(compare=False)


def maps_of(op: Op, shape: tuple[int, ...]) -> list[DimMap | None]:
    """`coordinates` of an op on one tensor of `shape`, found once for all that do the same."""
    text = repr(map_tensors((op.args, op.kwargs), lambda ref: None))
    return _known_maps(_Call(op.target, shape, text, op))


@lru_cache(maxsize=4096)
def _known_maps(call: _Call) -> list[DimMap | None]:
    return coordinates(call.op, call.op.inputs[0], call.shape, {})


def coordinates(op: Op, source: Ref, shape: tuple[int, ...], constants: dict[int, torch.Tensor]) -> list[Any]:
    """A `DimMap` per output, or None for an output that is not separable."""
    outputs: list[Any] = [None if ref is None else ([], {}) for ref in op.outputs]
    for dim, size in enumerate(shape):
        if size == 1:
            continue
        grid = torch.arange(size).view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)
        for slot, result in zip(outputs, run(op, source, grid, constants), strict=True):
            if slot is not None:
                slot[0].append((dim, result))
    return [None if slot is None else separate(slot[0], shape) for slot in outputs]


def separate(grids: list[tuple[int, torch.Tensor]], shape: tuple[int, ...]) -> DimMap | None:
    """The map of an output from the coordinate along each input dim of its elements; None if it is not separable."""
    if not grids:
        return None
    num_dims = grids[0][1].dim()
    dims: list[tuple[int | None, torch.Tensor | None]] = [(None, None)] * num_dims
    fixed: dict[int, int] = {}
    for dim, grid in grids:
        grid, varying = squeeze_uniform(grid)
        if len(varying) > 1 or (varying and dims[varying[0]][0] is not None):
            return None
        if varying:
            index = grid.flatten()
            same = len(index) == shape[dim] and bool((index == torch.arange(shape[dim])).all())
            dims[varying[0]] = (dim, None if same else index)
        else:
            fixed[dim] = int(grid.flatten()[0])
    return DimMap(tuple(dims), fixed)


def squeeze_uniform(grid: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """`grid` with each uniform dim narrowed to size 1, and the dims that vary."""
    for dim in range(grid.dim()):
        if grid.stride(dim) == 0:  # what views of an expanded grid keep: no pass over the elements
            grid = grid.narrow(dim, 0, 1)
    varying = []
    for dim in range(grid.dim()):
        first = grid.narrow(dim, 0, 1)
        if grid.size(dim) == 1 or bool((grid == first).all()):
            grid = first
        else:
            varying.append(dim)
    return grid, varying


def run(op: Op, source: Ref, value: torch.Tensor, constants: dict[int, torch.Tensor]) -> list[torch.Tensor]:
    """The op executed with `value` in place of tensor `source`."""

    def argument(ref: Ref) -> torch.Tensor:
        return value if ref == source else constants[ref.id]

    result = op.target(*map_tensors(op.args, argument), **map_tensors(op.kwargs, argument))
    return list(result) if isinstance(result, (tuple, list)) else [result]
