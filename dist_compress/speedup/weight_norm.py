"""weight = v * g / |v|: any slice of a normalised weight may go, if the gain makes up for it (gains.py)."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dist_compress.speedup.facts import Facts
from dist_compress.speedup.rule import Rule, Seen, rank
from dist_compress.speedup.structure import Structure
from dist_compress.tracing import Op, Ref

NAMES = ("_weight_norm_interface", "_weight_norm")


class WeightNorm(Rule):
    """v [..], g [size along dim, 1 elsewhere] -> (weight like v, norms like g). A unit is masked by its gain: v would
    have no direction.
    """

    def link(self, op: Op, s: Structure) -> None:
        v, g = op.inputs
        dim = op.arg("dim")
        if any(s.trace.info(ref).dependent or s.trace.info(ref).kind != "param" for ref in op.inputs) or dim < 0:
            return super().link(op, s)
        for a, b in zip(s.dims(v), s.dims(op.out), strict=True):
            s.same(a, b)
        for like_g in (g, *op.outputs[1:]):
            if like_g is not None:
                s.same(s.dims(v)[dim], s.dims(like_g)[dim])
        s.role(v, dim, "normalised")
        s.role(g, dim, "producer")

    def nonzero(self, op: Op, f: Facts) -> list[torch.Tensor]:
        v, g = map(f.nonzero, op.inputs)
        return [v & g, *(g for _ in op.outputs[1:])]

    def taint(self, op: Op, f: Facts) -> list[torch.Tensor]:
        tainted = any(bool(f.tainted(ref).any()) for ref in op.inputs)
        return [torch.full((1,) * rank(ref, f), tainted) for ref in op.outputs]

    def live(self, op: Op, f: Facts, seen: Seen) -> Iterable[tuple[Ref, torch.Tensor]]:
        for ref in op.inputs:
            yield ref, torch.full((1,) * rank(ref, f), True)
