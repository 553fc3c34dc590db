"""Taint and liveness on a tape: which elements may depend on the input, and which of them the output can see.

Values of elements that do not depend on the input are read off the one real run. `alive` = observed and tainted:
what is left is a known constant or invisible, and may go (constants are folded or kept, see fold.py).
"""

from __future__ import annotations

import torch

from dist_compress.speedup import sets
from dist_compress.tracing import Ref, Trace


class Facts:
    """What `propagation.propagate` finds out. Needs a trace with values. Sets are on the CPU, broadcast-compressed."""

    def __init__(self, trace: Trace):
        self.trace = trace
        self._tainted: dict[int, torch.Tensor] = {}
        self._observed: dict[int, torch.Tensor] = {}
        self._nonzero: dict[int, torch.Tensor] = {}

    def taint(self, ref: Ref, elements: torch.Tensor) -> None:
        self._tainted[ref.id] = sets.canonical(elements)

    def observe(self, ref: Ref, elements: torch.Tensor) -> None:
        """Add to what is observed of `ref`."""
        old = self._observed.get(ref.id)
        self._observed[ref.id] = sets.canonical(elements if old is None else old | elements)

    def seen(self, ref: Ref) -> torch.Tensor | None:
        """As `observed`; None when nothing was observed yet."""
        return self._observed.get(ref.id)

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
