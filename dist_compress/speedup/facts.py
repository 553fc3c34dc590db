"""Taint and liveness on a tape: which elements may depend on the input, and which of them the output can see.

Known zeros among the rest come from the values of the one real run, or, without values, from masks of the weights.
`alive` = observed and tainted: what is left is a known constant or invisible, and may go (constants are folded or
kept, see fold.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from dist_compress.speedup import sets
from dist_compress.tracing import Ref, Trace


class Facts:
    """What `propagation.propagate` finds out. Sets are on the CPU, broadcast-compressed.

    masks {parameter fqn: bool, of its rank, broadcastable to it}: what is nonzero, without any value; None: the trace
    has values. `values`: how to get those of the masked run should they be needed, {} where there are none.
    """

    def __init__(
        self,
        trace: Trace,
        masks: Mapping[str, torch.Tensor] | None = None,
        values: Callable[[], dict[int, torch.Tensor]] = dict,
    ):
        self.trace, self.masks = trace, masks
        self._make_values = values
        self._values = trace.values if masks is None else None
        self._tainted: dict[int, torch.Tensor] = {}
        self._observed: dict[int, torch.Tensor] = {}
        self._nonzero: dict[int, torch.Tensor] = {}

    def taint(self, ref: Ref, elements: torch.Tensor) -> None:
        self._tainted[ref.id] = sets.canonical(elements)

    def set_nonzero(self, ref: Ref, elements: torch.Tensor) -> None:
        self._nonzero[ref.id] = sets.canonical(elements)

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

    def value(self, ref: Ref) -> torch.Tensor | None:
        """What it was in the masked run; None where that cannot be known."""
        if self._values is None:
            self._values = self._make_values()
        return self._values.get(ref.id)

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
            self._nonzero[ref.id] = self._by_value(ref) if self.masks is None else self._by_mask(ref, self.masks)
        return self._nonzero[ref.id]

    def _by_value(self, ref: Ref) -> torch.Tensor:
        tainted = self.tainted(ref)
        if sets.is_all(tainted):
            return tainted
        values = self.trace.values[ref.id]
        if not self.dependent(ref):
            whole = int(values.count_nonzero()) == values.numel()
            return sets.uniform(values.dim(), True) if whole else sets.compress((values != 0).cpu())
        value = (values != 0).cpu()
        known = sets.restrict(value, tainted) if tainted.numel() > 1 else value
        return sets.canonical(known | tainted)

    def _by_mask(self, ref: Ref, masks: Mapping[str, torch.Tensor]) -> torch.Tensor:
        info = self.trace.info(ref)
        total = sets.uniform(len(info.shape), True)
        for fqn in info.all_fqns:
            if fqn in masks:
                total = total & masks[fqn]
        return sets.canonical(total)

    def alive(self, ref: Ref) -> torch.Tensor:
        return self.observed(ref) & self.tainted(ref)

    def constants(self, ref: Ref) -> torch.Tensor:
        """Elements that may be a constant other than zero."""
        return self.nonzero(ref) & ~self.tainted(ref)
