"""Writes through a view: y[:, :4] = x leaves y with the elements of x where the view is, and its own elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from dist_compress.speedup import sets
from dist_compress.speedup.dim_map import DimMap, separate
from dist_compress.speedup.rule import Rule, Seen, union
from dist_compress.speedup.structure import Structure
from dist_compress.tracing import Op, Ref
from dist_compress.tracing.tape import Overlay


class Write(Rule):
    """inputs (old, source); `Overlay.index` says which element of the source each element of the result is."""

    def link(self, op: Op, s: Structure) -> None:
        old, source = op.inputs
        for a, b in zip(s.dims(old), s.dims(op.out), strict=True):
            s.same(a, b)
        index = _index(op)
        found = _separable(index, s.trace.info(source).shape)
        if found is None:
            if bool((index >= 0).any()):
                s.box(s.dims(source), s.dims(op.out), op, index.flatten())
            return
        where, dim_map = found
        dim_map.link(source, op.out, s, op, False)
        for d, (var, places) in enumerate(zip(s.dims(op.out), where, strict=True)):
            if not bool(places.all()) and dim_map.dims[d][0] is None:
                s.pin(var, "is written to at a fixed position", op)

    def _merge(self, op: Op, f, of: Callable[[Ref], torch.Tensor]) -> list[torch.Tensor]:
        old, source = of(op.inputs[0]), of(op.inputs[1])
        index, shape = _index(op), f.shape(op.inputs[1])
        found = _separable(index, shape)
        if found is not None:
            where, dim_map = found
            inside = _grid(where)
            return [(old & ~inside) | (dim_map.push(source, shape) & inside)]
        flat = source.expand(shape).reshape(-1)
        return [sets.compress(torch.where(index >= 0, flat[index.clamp(min=0)], old))]

    def taint(self, op: Op, f) -> list[torch.Tensor]:
        return self._merge(op, f, f.tainted)

    def nonzero(self, op: Op, f) -> list[torch.Tensor]:
        return self._merge(op, f, f.nonzero)

    def live(self, op: Op, f, seen: Seen) -> Iterable[tuple[Ref, torch.Tensor]]:
        old, source = op.inputs
        s, index, shape = union(seen), _index(op), f.shape(source)
        found = _separable(index, shape)
        if found is not None:
            where, dim_map = found
            inside = _grid(where)
            yield old, s & ~inside
            yield source, dim_map.pull(s & inside, shape)
            return
        s = s.expand(index.shape)
        yield old, sets.compress(s & (index < 0))
        flat = torch.zeros(torch.Size(shape).numel(), dtype=torch.bool)
        flat[index[s & (index >= 0)]] = True
        yield source, sets.compress(flat.view(shape))


def same_writes(op: Op, new: Op, kept: Callable[[Ref], list[torch.Tensor]]) -> bool:
    """Whether `new` writes the kept elements of the source to the places, among the kept, that `op` wrote them to."""
    source, places = kept(op.inputs[1]), kept(op.out)
    assert isinstance(op.target, Overlay)
    ids = torch.arange(torch.Size(op.target.source.shape).numel()).view(op.target.source.shape)
    renumbered = torch.full((ids.numel() + 1,), -1)
    left = _select(ids, source).flatten()
    renumbered[left] = torch.arange(len(left))
    return torch.equal(renumbered[_select(_index(op), places)], _index(new))


def _index(op: Op) -> torch.Tensor:
    assert isinstance(op.target, Overlay)
    return op.target.index()


def _select(ids: torch.Tensor, kept: list[torch.Tensor]) -> torch.Tensor:
    for dim, index in enumerate(kept):
        ids = ids.index_select(dim, index)
    return ids


def _grid(where: list[torch.Tensor]) -> torch.Tensor:
    """The written box, of size 1 along dims that are written whole."""
    inside = torch.ones((1,) * len(where), dtype=torch.bool)
    for d, places in enumerate(where):
        if not bool(places.all()):
            inside = inside & places.view([-1 if e == d else 1 for e in range(len(where))])
    return inside


def _separable(index: torch.Tensor, shape: tuple[int, ...]) -> tuple[list[torch.Tensor], DimMap] | None:
    """(written places per dim, where each dim of the result reads the source), or None when it is no box of slices."""
    covered = index >= 0
    if index.dim() == 0 or not bool(covered.any()):
        return None
    where = sets.sides(covered.flatten(), index.shape)
    if not torch.equal(covered.flatten(), sets.outer(where)):
        return None
    box = _select(index, [places.nonzero().flatten() for places in where])
    grids, rest = [], box
    for dim in reversed(range(len(shape))):
        if shape[dim] > 1:
            grids.append((dim, rest % shape[dim]))
        rest = rest // shape[dim]
    if not grids:
        return where, DimMap(tuple((None, None) for _ in where))
    inner = separate(grids[::-1], shape)
    if inner is None or inner.fixed:
        return None
    dims: list[tuple[int | None, torch.Tensor | None]] = []
    for places, (dim, read) in zip(where, inner.dims, strict=True):
        if dim is not None and not (bool(places.all()) and read is None):
            wide = torch.full((len(places),), -1)
            wide[places] = torch.arange(int(places.sum())) if read is None else read
            read = wide
        dims.append((dim, read))
    return where, DimMap(tuple(dims))
