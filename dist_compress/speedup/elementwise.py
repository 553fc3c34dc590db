"""Pointwise ops: broadcast operands share their dims; a known zero factor hides the other one."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dist_compress.speedup import sets
from dist_compress.speedup.rule import Rule, Seen, rank, union
from dist_compress.speedup.structure import Structure
from dist_compress.tracing import Op, Ref, Trace
from dist_compress.tracing.tape import map_tensors


class Pointwise(Rule):
    """f(0) need not be 0: whether an untainted result is zero is read off the real run."""

    role = "added"  # of a parameter operand

    def operands(self, op: Op) -> tuple[Ref, ...]:
        return op.inputs

    def link(self, op: Op, s: Structure) -> None:
        for out in op.outputs:
            if out is None:
                continue
            dims = s.dims(out)
            for ref in op.inputs:
                own = s.dims(ref)
                for d in range(1, len(own) + 1):
                    if s.sizes[own[-d]] == s.sizes[dims[-d]]:
                        s.same(dims[-d], own[-d])
        for ref in op.inputs:
            for d in range(len(s.dims(ref))):
                s.role(ref, d, self.role)

    def taint(self, op: Op, f) -> list[torch.Tensor]:
        parts = [f.tainted(ref) for ref in self.operands(op)]
        return [sets.union(parts, rank(ref, f)) for ref in op.outputs]

    def live(self, op: Op, f, seen: Seen) -> Iterable[tuple[Ref, torch.Tensor]]:
        total = union(seen)
        for ref in self.operands(op):
            yield ref, sets.fit(total, f.shape(ref))

    def nonzero(self, op: Op, f) -> list[torch.Tensor]:
        sources = self._sources(op)
        if sources is None:
            return super().nonzero(op, f)
        parts = [f.nonzero(ref) for ref in sources]
        return [sets.union(parts, rank(ref, f)) for ref in op.outputs]

    def _sources(self, op: Op) -> tuple[Ref, ...] | None:
        """The operands whose common zeros are zeros of the result; None when f(0) is not 0."""
        if op.name == "div":
            return op.inputs[:1] if op.arg("rounding_mode") is None else op.inputs
        if op.name == "where" and len(op.inputs) == 3:
            return op.inputs[1:]
        if op.name == "masked_fill":
            value = op.arg("value")
            if not isinstance(value, Ref):
                return op.inputs[:1] if value == 0 else None
            return op.inputs[0], value
        return op.inputs if keeps_zero(op) else None


class Copy(Pointwise):
    """copy_(target, source): the old target is gone, only its shape remains."""

    def operands(self, op: Op) -> tuple[Ref, ...]:
        return op.inputs[1:]

    def _sources(self, op: Op) -> tuple[Ref, ...] | None:
        return op.inputs[1:]


class Fill(Pointwise):
    """zeros_like(x), x.fill_(2): the shape of x, none of its values."""

    makes_zeros = True

    def operands(self, op: Op) -> tuple[Ref, ...]:
        return op.inputs[1:]

    def _sources(self, op: Op) -> tuple[Ref, ...] | None:
        if "zero" in op.name or op.arg("value", op.arg("fill_value")) == 0:
            return ()
        return op.inputs[1:] or None


class New(Rule):
    """zeros(size), x.new_full(size, 2): one number everywhere, so that any of its slices may go."""

    makes_zeros = True

    def link(self, op: Op, s: Structure) -> None:
        s.dims(op.out)

    def taint(self, op: Op, f) -> list[torch.Tensor]:
        return [sets.uniform(rank(op.out, f), False)]

    def nonzero(self, op: Op, f) -> list[torch.Tensor]:
        return [sets.uniform(rank(op.out, f), op.name not in ("zeros", "empty", "new_zeros", "new_empty"))]

    def live(self, op: Op, f, seen: Seen) -> Iterable[tuple[Ref, torch.Tensor]]:
        return ()


class Restride(Pointwise):
    """as_strided of the mean over an image that lies channels-last: the same elements. Of anything else a barrier."""

    unknown = Rule()

    def link(self, op: Op, s: Structure) -> None:
        (super() if self.same_elements(op, s.trace) else self.unknown).link(op, s)

    def taint(self, op: Op, f) -> list[torch.Tensor]:
        return (super() if self.same_elements(op, f.trace) else self.unknown).taint(op, f)

    def nonzero(self, op: Op, f) -> list[torch.Tensor]:
        return [f.nonzero(op.inputs[0])] if self.same_elements(op, f.trace) else self.unknown.nonzero(op, f)

    def live(self, op: Op, f, seen: Seen) -> Iterable[tuple[Ref, torch.Tensor]]:
        return (super() if self.same_elements(op, f.trace) else self.unknown).live(op, f, seen)

    def same_elements(self, op: Op, trace: Trace) -> bool:
        """Whether the op only says how its tensor lies in memory, which a shrunk model need not do."""
        maker = next((o for o in trace.tape if op.inputs[0] in o.outputs), None)
        shape = trace.info(op.inputs[0]).shape
        return maker is not None and maker.name == "mean" and shape == trace.info(op.out).shape and shape[2:] == (1, 1)


class Choice(Pointwise):
    """where, masked_fill: zero wherever both choices are, whatever chooses."""

    def taint(self, op: Op, f) -> list[torch.Tensor]:
        return [t & n for t, n in zip(super().taint(op, f), self.nonzero(op, f), strict=True)]


class Quotient(Pointwise):
    """a / b: zero where a is, whatever b is."""

    def taint(self, op: Op, f) -> list[torch.Tensor]:
        if len(op.inputs) != 2:
            return super().taint(op, f)
        a, b = op.inputs
        total = f.tainted(a) | (f.nonzero(a) & f.tainted(b))
        return [sets.pad(total, rank(ref, f)) for ref in op.outputs]

    def live(self, op: Op, f, seen: Seen) -> Iterable[tuple[Ref, torch.Tensor]]:
        if len(op.inputs) != 2:
            yield from super().live(op, f, seen)
            return
        a, b = op.inputs
        yield a, sets.fit(union(seen), f.shape(a))
        yield b, sets.fit(union(seen) & f.nonzero(a), f.shape(b))


class Product(Pointwise):
    """a * b: each side is seen and tainted only where the other is not a known zero."""

    role = "affine"

    def taint(self, op: Op, f) -> list[torch.Tensor]:
        if len(op.inputs) != 2:
            return super().taint(op, f)
        a, b = op.inputs
        total = (f.tainted(a) & f.nonzero(b)) | (f.nonzero(a) & f.tainted(b))
        return [sets.pad(total, rank(ref, f)) for ref in op.outputs]

    def nonzero(self, op: Op, f) -> list[torch.Tensor]:
        total = torch.tensor(True)
        for ref in op.inputs:
            total = total & f.nonzero(ref)
        return [sets.pad(total, rank(ref, f)) for ref in op.outputs]

    def live(self, op: Op, f, seen: Seen) -> Iterable[tuple[Ref, torch.Tensor]]:
        if len(op.inputs) != 2:
            yield from super().live(op, f, seen)
            return
        total = union(seen)
        for ref, other in (op.inputs, reversed(op.inputs)):
            yield ref, sets.fit(total & f.nonzero(other), f.shape(ref))


def keeps_zero(op: Op) -> bool:
    """Whether f(0, ..., 0) is 0, found by running the op on scalars, once for all that do the same."""
    key = (op.target, repr(map_tensors((op.args, op.kwargs), lambda ref: None)))
    if key not in _known:
        _known[key] = _keeps_zero(op)
    return _known[key]


_known: dict[tuple[object, str], bool] = {}


def _keeps_zero(op: Op) -> bool:
    def zero(ref: Ref) -> torch.Tensor:
        return torch.zeros(())

    try:
        result = op.target(*map_tensors(op.args, zero), **map_tensors(op.kwargs, zero))
        results = result if isinstance(result, (tuple, list)) else [result]
        return not any(bool(x.any()) for x in results)
    except Exception:  # an op that takes no scalars, or makes a tensor without values
        return False
