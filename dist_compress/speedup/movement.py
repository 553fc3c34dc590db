"""Pure data movement: ops that only say where each element goes.

Views that merge or split dims act on groups of dims. Every other one is *separable* when each of its output dims is
one input dim read through an index vector; this is found by running the op on coordinate grids, so there is no rule
per op. What is not separable (pixel_shuffle) moves by a full element map.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dist_compress.speedup import sets
from dist_compress.speedup.dim_map import DimMap, coordinates, maps_of, run
from dist_compress.speedup.rule import Rule, Seen, rank, union
from dist_compress.speedup.structure import Structure
from dist_compress.tracing import Op, Ref, Trace
from dist_compress.tracing.constants import constant


class View(Rule):
    """view, reshape, flatten, unflatten: the same elements in the same order."""

    def link(self, op: Op, s: Structure) -> None:
        s.view(op.inputs[0], op.out, op)

    def taint(self, op: Op, f) -> list[torch.Tensor]:
        a, b = op.inputs[0], op.out
        return [sets.reshape(f.tainted(a), f.shape(a), f.shape(b))]

    def nonzero(self, op: Op, f) -> list[torch.Tensor]:
        a, b = op.inputs[0], op.out
        return [sets.reshape(f.nonzero(a), f.shape(a), f.shape(b))]

    def live(self, op: Op, f, seen: Seen) -> Iterable[tuple[Ref, torch.Tensor]]:
        yield op.inputs[0], sets.reshape(union(seen), f.shape(op.out), f.shape(op.inputs[0]))


class Move(Rule):
    """Everything else that only moves elements of its first tensor."""

    indexed = False  # reads positions by an index that python holds
    unknown = Rule()  # where the positions are not known

    def maps(self, op: Op, shape: tuple[int, ...], constants: dict[int, torch.Tensor]) -> list[DimMap | None]:
        if constants:
            return coordinates(op, op.inputs[0], shape, constants)
        return maps_of(op, shape)

    def link(self, op: Op, s: Structure) -> None:
        constants = self.constants(op, s.trace)
        if constants is None:
            return self.unknown.link(op, s)
        shape = s.trace.info(op.inputs[0]).shape
        for position, dim_map in enumerate(self.maps(op, shape, constants)):
            out = op.outputs[position]
            if out is None:
                continue
            if dim_map is not None:
                dim_map.link(op.inputs[0], out, s, op, self.indexed)
                continue
            source = self._elements(op, shape, constants)[position]
            s.box(s.dims(op.inputs[0]), s.dims(out), op, source.flatten())

    def _elements(self, op: Op, shape: tuple[int, ...], constants: dict[int, torch.Tensor]) -> list[torch.Tensor]:
        ids = torch.arange(1, torch.Size(shape).numel() + 1).view(shape)
        return [result - 1 for result in run(op, op.inputs[0], ids, constants)]

    def taint(self, op: Op, f) -> list[torch.Tensor]:
        moved = self._moved(op, f, f.tainted(op.inputs[0]) | self._size_dependent(op, f))
        return self.unknown.taint(op, f) if moved is None else moved

    def _size_dependent(self, op: Op, f) -> torch.Tensor:
        """Constants of each place of which a fixed one is read: the last one is another where there are more."""
        constants = f.constants(op.inputs[0])
        if op.name != "select" or op.arg("index") == 0 or not bool(constants.any()):
            return torch.zeros((), dtype=torch.bool)
        if f.hidden(op.inputs[0], constants):
            return constants  # as if they depended on the input: the same is kept, and no value is needed
        value, dim = f.value(op.inputs[0]), op.arg("dim")
        if value is None:
            return constants
        uneven = (value != value.narrow(dim, 0, 1)).any(dim, keepdim=True).cpu()
        return constants & sets.restrict(uneven, constants)

    def nonzero(self, op: Op, f) -> list[torch.Tensor]:
        moved = self._moved(op, f, f.nonzero(op.inputs[0]))
        return self.unknown.nonzero(op, f) if moved is None else moved

    def constants(self, op: Op, trace: Trace) -> dict[int, torch.Tensor] | None:
        """The values of the further tensors (indices); None when they are not known, or where nothing moves."""
        if any(0 in trace.info(ref).shape for ref in (op.inputs[0], *op.outputs) if ref is not None):
            return None
        found = {ref.id: constant(trace, ref) for ref in op.inputs[1:]}
        known = {key: value for key, value in found.items() if value is not None}
        return known if len(known) == len(found) else None

    def _moved(self, op: Op, f, s: torch.Tensor) -> list[torch.Tensor] | None:
        """A set of the first input, as a set of each output; None when it is not known what goes where."""
        shape, constants = f.shape(op.inputs[0]), self.constants(op, f.trace)
        if constants is None:
            return None
        if s.numel() == 1 and type(self) is not Pad:
            return [sets.uniform(rank(ref, f), bool(s)) for ref in op.outputs]
        maps = self.maps(op, shape, constants)
        known = [m.push(s, shape) for m in maps if m is not None]
        if len(known) == len(maps):
            return known
        elements = self._elements(op, shape, constants)
        flat = s.expand(shape).reshape(-1)
        return [sets.compress(flat[e.clamp(min=0)] & (e >= 0)) for e in elements]

    def live(self, op: Op, f, seen: Seen) -> Iterable[tuple[Ref, torch.Tensor]]:
        source, constants = op.inputs[0], self.constants(op, f.trace)
        if constants is None:
            yield from self.unknown.live(op, f, seen)
            return
        shape = f.shape(source)
        maps = self.maps(op, shape, constants)
        elements = None
        for position, (s, dim_map) in enumerate(zip(seen, maps, strict=True)):
            if s is None:
                continue
            if dim_map is not None:
                yield source, dim_map.pull(s, shape)
                continue
            elements = elements or self._elements(op, shape, constants)
            e = elements[position]
            flat = torch.zeros(torch.Size(shape).numel(), dtype=torch.bool)
            flat[e[s.expand(e.shape) & (e >= 0)]] = True
            yield source, sets.compress(flat.view(shape))


class Index(Move):
    """Reads a dim through an index that a buffer or python holds: the dim cannot be renumbered."""

    indexed = True

    def __init__(self, unknown: Rule):
        self.unknown = unknown


class Roll(Move):
    """By a number: with fewer positions others would meet."""

    indexed = True


class Shuffle(Move):
    """Channel shuffle: position j of group i becomes position i of group j. The number of groups stays."""

    def link(self, op: Op, s: Structure) -> None:
        dims, out = s.dims(op.inputs[0]), s.dims(op.out)
        groups = s.new(op.arg("groups"))
        within = s.new(s.sizes[dims[1]] // s.sizes[groups])
        s.pin(groups, "holds the number of groups", op)
        s.box([dims[1]], [groups, within], op)
        s.box([out[1]], [within, groups], op)
        for d in (0, *range(2, len(dims))):
            s.same(dims[d], out[d])


class Pad(Move):
    """constant_pad_nd: the border holds a known constant."""

    indexed = True

    def nonzero(self, op: Op, f) -> list[torch.Tensor]:
        return Rule.nonzero(self, op, f) if op.arg("value") else super().nonzero(op, f)

    def maps(self, op: Op, shape: tuple[int, ...], constants: dict[int, torch.Tensor]) -> list[DimMap | None]:
        dims: list[tuple[int | None, torch.Tensor | None]] = [(d, None) for d in range(len(shape))]
        pad = list(op.arg("pad"))
        for position in range(len(pad) // 2):
            dim, (left, right) = len(shape) - 1 - position, pad[2 * position : 2 * position + 2]
            if left or right:
                index = torch.arange(-left, shape[dim] + right)
                dims[dim] = (dim, torch.where(index < shape[dim], index, -1).clamp(min=-1))
        return [DimMap(tuple(dims))]


class Cat(Rule):
    """Concatenation: positions of each input follow those of the one before."""

    def _parts(self, op: Op, shapes) -> list[tuple[Ref, int, int]]:
        """(input, offset, size) along the dim of concatenation; empty legacy inputs are skipped."""
        parts, offset = [], 0
        dim = op.arg("dim")
        for ref in op.inputs:
            shape = shapes(ref)
            if len(shape) > 1 or shape[0] > 0:
                parts.append((ref, offset, shape[dim]))
                offset += shape[dim]
        return parts

    def link(self, op: Op, s: Structure) -> None:
        out = op.out
        dims = s.dims(out)
        axis = op.arg("dim") % len(dims)
        for ref, offset, size in self._parts(op, lambda r: s.trace.info(r).shape):
            own = s.dims(ref)
            for d, var in enumerate(own):
                if d != axis:
                    s.same(dims[d], var)
                    s.role(ref, d, "added")
            index = torch.arange(size)
            s.link(own[axis], index, dims[axis], index + offset)

    def taint(self, op: Op, f) -> list[torch.Tensor]:
        return self._joined(op, f, f.tainted)

    def nonzero(self, op: Op, f) -> list[torch.Tensor]:
        return self._joined(op, f, f.nonzero)

    def _joined(self, op: Op, f, part) -> list[torch.Tensor]:
        axis = op.arg("dim") % rank(op.out, f)
        parts = [(part(ref), size) for ref, _, size in self._parts(op, f.shape)]
        if all(sets.is_all(s) for s, _ in parts):
            return [parts[0][0]]
        shape = torch.broadcast_shapes(*([1 if d == axis else n for d, n in enumerate(s.shape)] for s, _ in parts))
        wide = [s.expand([size if d == axis else n for d, n in enumerate(shape)]) for s, size in parts]
        return [torch.cat(wide, axis)]

    def live(self, op: Op, f, seen: Seen) -> Iterable[tuple[Ref, torch.Tensor]]:
        axis = op.arg("dim") % rank(op.out, f)
        total = union(seen)
        for ref, offset, size in self._parts(op, f.shape):
            yield ref, total if total.size(axis) == 1 else total.narrow(axis, offset, size)


class Stack(Rule):
    """A new dim, one position per input."""

    def link(self, op: Op, s: Structure) -> None:
        dims = list(s.dims(op.out))
        s.pin(dims.pop(op.arg("dim") % len(dims)), "has one position per input", op)
        for ref in op.inputs:
            for a, b in zip(s.dims(ref), dims, strict=True):
                s.same(b, a)

    def taint(self, op: Op, f) -> list[torch.Tensor]:
        axis = op.arg("dim") % rank(op.out, f)
        return [torch.stack(list(torch.broadcast_tensors(*map(f.tainted, op.inputs))), axis)]

    def nonzero(self, op: Op, f) -> list[torch.Tensor]:
        axis = op.arg("dim") % rank(op.out, f)
        return [torch.stack(list(torch.broadcast_tensors(*map(f.nonzero, op.inputs))), axis)]

    def live(self, op: Op, f, seen: Seen) -> Iterable[tuple[Ref, torch.Tensor]]:
        axis = op.arg("dim") % rank(op.out, f)
        total = union(seen)
        for position, ref in enumerate(op.inputs):
            yield ref, total.select(axis, position if total.size(axis) > 1 else 0)
