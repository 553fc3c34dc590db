"""Taint and liveness on a tape: which elements may depend on the input, and which of them the output can see.

Values of elements that do not depend on the input are read off the one real run. `alive` = observed and tainted:
what is left is a known constant or invisible, and may go (constants are folded or kept, see fold.py).
"""

from __future__ import annotations

import torch

from dist_compress.speedup import sets
from dist_compress.speedup.rules import rule_of
from dist_compress.tracing import Ref, Trace


class Facts:
    """Needs a trace with values. Sets are on the CPU, broadcast-compressed."""

    def __init__(self, trace: Trace):
        self.trace = trace
        self._tainted: dict[int, torch.Tensor] = {}
        self._observed: dict[int, torch.Tensor] = {}
        self._nonzero: dict[int, torch.Tensor] = {}
        for ref in trace.inputs:
            self._tainted[ref.id] = sets.uniform(len(self.shape(ref)), True)
        self._forward()
        self._backward()

    def shape(self, ref: Ref) -> tuple[int, ...]:
        return self.trace.info(ref).shape

    def dependent(self, ref: Ref) -> bool:
        return self.trace.info(ref).dependent

    def value(self, ref: Ref) -> torch.Tensor:
        return self.trace.values[ref.id]

    def tainted(self, ref: Ref) -> torch.Tensor:
        """Elements that may depend on the input."""
        known = self._tainted.get(ref.id)
        return sets.uniform(len(self.shape(ref)), False) if known is None else known

    def observed(self, ref: Ref) -> torch.Tensor:
        """Elements that the output can see; only of tensors that depend on the input."""
        known = self._observed.get(ref.id)
        return sets.uniform(len(self.shape(ref)), False) if known is None else known

    def nonzero(self, ref: Ref) -> torch.Tensor:
        """Elements that are not a known zero."""
        if ref.id not in self._nonzero:
            tainted = self.tainted(ref)
            if not sets.is_all(tainted):
                value = (self.value(ref) != 0).cpu()
                known = sets.restrict(value, tainted) if tainted.numel() > 1 else value
                tainted = sets.canonical(known | tainted)
            self._nonzero[ref.id] = tainted
        return self._nonzero[ref.id]

    def alive(self, ref: Ref) -> torch.Tensor:
        return self.observed(ref) & self.tainted(ref)

    def _forward(self) -> None:
        for op in self.trace.tape:
            if any(self.dependent(ref) for ref in op.inputs):
                for ref, s in zip(op.outputs, rule_of(op).taint(op, self), strict=True):
                    if ref is not None:
                        self._tainted[ref.id] = sets.canonical(s)

    def _backward(self) -> None:
        for ref in self.trace.outputs:
            self._observed[ref.id] = sets.uniform(len(self.shape(ref)), True)
        for op in reversed(self.trace.tape):
            seen = [None if ref is None else self._observed.get(ref.id) for ref in op.outputs]
            if all(s is None for s in seen) or not any(self.dependent(ref) for ref in op.inputs):
                continue
            for ref, s in rule_of(op).live(op, self, seen):
                if self.dependent(ref):
                    old = self._observed.get(ref.id)
                    self._observed[ref.id] = sets.canonical(s if old is None else old | s)
