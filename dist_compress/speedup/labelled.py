"""Ops that can be told by naming dims: equal names are one dim, what has none is kept whole.

Most ops that are neither pointwise nor movement are of this kind: indexing by data touches one dim and lets the
others pass, a Fourier transform mixes along its own dims, a bilinear op sums over what only its operands have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from dist_compress.speedup import sets
from dist_compress.speedup.rule import Rule, Seen
from dist_compress.speedup.structure import Structure
from dist_compress.tracing import Op, Ref, Trace

Dims = tuple[str | None, ...]  # per dim of a tensor its name; "!name": kept whole, but element by element; None: mixed


class Names(NamedTuple):
    inputs: tuple[Dims, ...]  # per tensor of `op.inputs`
    outputs: tuple[Dims, ...]  # per output, () for one that is no tensor


class Labelled(Rule):
    """Subclasses say the names. An element depends on what agrees with it in every name that both have."""

    why = "mixes along it"

    def names(self, op: Op, trace: Trace) -> Names | None:
        """None where the op is not of this kind: a barrier."""
        raise NotImplementedError

    def sources(self, op: Op) -> tuple[Ref, ...] | None:
        """The inputs whose common zeros are zeros of the result; None when there are none."""
        return None

    def link(self, op: Op, s: Structure) -> None:
        names = self.names(op, s.trace)
        if names is None:
            super().link(op, s)
        else:
            self.link_names(op, names, s)

    def link_names(self, op: Op, names: Names, s: Structure) -> dict[str, int]:
        """Ties the dims; returns the variable of each name."""
        found: dict[str, int] = {}
        for ref, dims in (*zip(op.inputs, names.inputs, strict=True), *zip(op.outputs, names.outputs, strict=True)):
            for var, name in zip(s.dims(ref) if ref is not None else (), dims, strict=True):
                if name is None:
                    s.pin(var, self.why, op)
                elif s.sizes[var] > 1:
                    first = found.setdefault(name, var)
                    if s.sizes[first] == s.sizes[var]:
                        s.same(first, var)
                    if s.sizes[first] != s.sizes[var] or name.startswith("!"):
                        s.pin(first, self.why, op)
                        s.pin(var, self.why, op)
        return found

    def _spread(self, op: Op, f, names: Names, refs: tuple[Ref, ...], elements: Callable) -> list[torch.Tensor]:
        """Per output the elements that agree with one of the sets of `refs`."""
        result = []
        for out, dims in zip(op.outputs, names.outputs, strict=True):
            total = sets.uniform(len(dims), False)
            for ref, own in zip(op.inputs, names.inputs, strict=True):
                if out is not None and ref in refs:
                    total = total | project(elements(ref), own, f.shape(ref), dims, f.shape(out))
            result.append(total)
        return result

    def taint(self, op: Op, f) -> list[torch.Tensor]:
        names = self.names(op, f.trace)
        if names is None:
            return super().taint(op, f)
        tainted = self._spread(op, f, names, op.inputs, f.tainted)
        cuts = self._cuts(op, f, names)
        return [s & cut for s, cut in zip(tainted, cuts, strict=True)]

    def _cuts(self, op: Op, f, names: Names) -> list[torch.Tensor]:
        """Per output what is not zero for the zeros of the sources alone, whatever data says of positions."""
        sources = self.sources(op)
        if sources is None:
            return [sets.uniform(len(dims), True) for dims in names.outputs]
        return self._spread(op, f, names, sources, f.nonzero)

    def nonzero(self, op: Op, f) -> list[torch.Tensor]:
        names = self.names(op, f.trace)
        return super().nonzero(op, f) if names is None else self._cuts(op, f, names)

    def live(self, op: Op, f, seen: Seen) -> Iterable[tuple[Ref, torch.Tensor]]:
        names = self.names(op, f.trace)
        if names is None:
            yield from super().live(op, f, seen)
            return
        sources, cuts = self.sources(op) or op.inputs, self._cuts(op, f, names)
        for ref, own in zip(op.inputs, names.inputs, strict=True):
            for out, dims, s, cut in zip(op.outputs, names.outputs, seen, cuts, strict=True):
                if out is not None and s is not None:
                    s = s if ref in sources else s & cut
                    yield ref, project(s, dims, f.shape(out), own, f.shape(ref))


def project(s: torch.Tensor, dims: Dims, shape: tuple[int, ...], to: Dims, to_shape: tuple[int, ...]) -> torch.Tensor:
    """The elements of a tensor (`to`, `to_shape`) that agree with one of the set in every name that both have."""
    place = {name: d for d, name in enumerate(to) if name is not None}
    common = [d for d, name in enumerate(dims) if name in place and shape[d] == to_shape[place[name]]]
    rest = [d for d in range(len(dims)) if d not in common]
    s = sets.any_over(s, rest).permute(common + rest).reshape([s.size(d) for d in common])
    order = [dims[d] for d in common]
    s = s.permute([order.index(name) for name in to if name in order])
    for d, name in enumerate(to):
        if name not in order:
            s = s.unsqueeze(d)
    return s


def take(tensor: torch.Tensor, dims: Sequence[str | None], kept: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The slices `kept` {name: index}; a dim of size 1 is broadcast and stays."""
    for d, name in enumerate(dims):
        if name is not None and name in kept and tensor.size(d) > 1:
            tensor = tensor.index_select(d, kept[name])
    return tensor
