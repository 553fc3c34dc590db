"""The base of the op rules, which is itself the rule for an op nobody knows: a barrier, always right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from dist_compress.speedup import sets
from dist_compress.speedup.facts import Facts
from dist_compress.speedup.structure import Structure
from dist_compress.tracing import Op, Ref

Seen = list[torch.Tensor | None]  # per output of an op: its observed elements; None when nothing sees it


class Rule:
    """What an op does to slices (`link`), to taint (`taint`) and to liveness (`live`). Stateless.

    `taint` gives one set per output of the op; `live` yields the observed elements of each tensor input.
    `nonzero` gives what is not a known zero of each output, without its values, from what is not of the inputs.
    """

    makes_zeros = False  # from inputs without any
    user = False  # registered by the user
    # Of rules of module classes. resize(module, keep): repair what `apply` does not slice; replace(module, keep): the
    # module to put in its place. keep: {"input0" | "output0" | parameter name: {dim: kept index}}, of what shrinks.
    resize: Callable[[nn.Module, Mapping[str, Mapping[int, torch.Tensor]]], None] | None = None
    replace: Callable[[nn.Module, Mapping[str, Mapping[int, torch.Tensor]]], nn.Module] | None = None

    def link(self, op: Op, s: Structure) -> None:
        why = "has no rule and keeps everything it touches" if op.inputs else "creates a tensor of a fixed size"
        for ref in (*op.inputs, *op.outputs):
            if ref is not None:
                s.pin_all(ref, why, op)

    def taint(self, op: Op, f: Facts) -> list[torch.Tensor]:
        tainted = not all(sets.is_none(f.tainted(ref)) for ref in op.inputs)
        return [sets.uniform(rank(ref, f), tainted) for ref in op.outputs]

    def nonzero(self, op: Op, f: Facts) -> list[torch.Tensor]:
        return [sets.uniform(rank(ref, f), True) for ref in op.outputs]

    def live(self, op: Op, f: Facts, seen: Seen) -> Iterable[tuple[Ref, torch.Tensor]]:
        for ref in op.inputs:
            yield ref, sets.uniform(len(f.shape(ref)), True)


def rank(ref: Ref | None, f: Facts) -> int:
    return 0 if ref is None else len(f.shape(ref))


def union(seen: Seen) -> torch.Tensor:
    """What is observed of any output of an op whose outputs all have the rank of the first observed one."""
    known = [s for s in seen if s is not None]
    total = known[0]
    for s in known[1:]:
        total = total | s if s.dim() == total.dim() else total
    return total
