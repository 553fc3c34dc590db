"""Taint and liveness on a tape: which elements may depend on the input, and which of them the output can see.

Known zeros among the rest come from the values of the one real run, or, without values, from masks of the weights.
`alive` = observed and tainted: what is left is a known constant or invisible, and may go (constants are folded or
kept, see fold.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from dist_compress.speedup import sets
from dist_compress.tracing import Ref, Trace
from dist_compress.tracing.constants import constant


class Facts:
    """What `propagation.propagate` finds out. Sets are on the CPU, broadcast-compressed.

    masks {parameter fqn: bool, of its rank, broadcastable to it}: what is nonzero, without any value; None: the trace
    has values. `values`: how to get those of the masked run should they be needed, {} where there are none. `zeros`:
    zeros of the weights count as masks do. `stays`: whether a dim of a tensor is kept whole whatever the masks are.
    """

    def __init__(
        self,
        trace: Trace,
        masks: Mapping[str, torch.Tensor] | None = None,
        values: Callable[[], dict[int, torch.Tensor]] = dict,
        zeros: bool = False,
        stays: Callable[[Ref, int], bool] = lambda ref, dim: False,
    ):
        self.trace, self.masks, self.zeros = trace, masks, zeros
        self._make_values, self._stays = values, stays
        self._values = trace.values if masks is None else None
        self._sets: dict[int, torch.Tensor] = {}  # id -> a set that is canonical
        self._tainted: dict[int, torch.Tensor] = {}
        self._observed: dict[int, torch.Tensor] = {}
        self._nonzero: dict[int, torch.Tensor] = {}
        self._weightless = self._find_weightless() if masks is not None else set()

    def _canonical(self, elements: torch.Tensor) -> torch.Tensor:
        known = self._sets.get(id(elements))
        if known is None:
            known = sets.canonical(elements)
            self._sets[id(known)] = known
        return known

    def taint(self, ref: Ref, elements: torch.Tensor) -> None:
        elements = self._canonical(elements)
        known = self._nonzero.get(ref.id)  # one tensor where both are the same: what follows is found once
        self._tainted[ref.id] = elements if known is None or not torch.equal(known, elements) else known

    def set_nonzero(self, ref: Ref, elements: torch.Tensor) -> None:
        self._nonzero[ref.id] = self._canonical(elements)

    def observe(self, ref: Ref, elements: torch.Tensor) -> None:
        """Add to what is observed of `ref`."""
        old = self._observed.get(ref.id)
        self._observed[ref.id] = self._canonical(elements if old is None or old is elements else old | elements)

    def seen(self, ref: Ref) -> torch.Tensor | None:
        """As `observed`; None when nothing was observed yet."""
        return self._observed.get(ref.id)

    def shape(self, ref: Ref) -> tuple[int, ...]:
        return self.trace.info(ref).shape

    def dependent(self, ref: Ref) -> bool:
        return self.trace.info(ref).dependent

    def any_dependent(self, refs: Sequence[Ref]) -> bool:
        tensors = self.trace.tensors
        return any([tensors[ref.id].dependent for ref in refs])

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
        known = self._nonzero.get(ref.id)
        if known is None:
            found = self._by_value(ref) if self.masks is None else self._by_mask(ref, self.masks)
            known = self._nonzero[ref.id] = self._canonical(found)
        return known

    def _by_value(self, ref: Ref) -> torch.Tensor:
        tainted = self.tainted(ref)
        if sets.is_all(tainted):
            return tainted
        value = self.trace.values[ref.id]
        if not self.dependent(ref):
            return _nonzero_elements(value)
        nonzero = (value != 0).cpu()
        return tainted | (sets.restrict(nonzero, tainted) if tainted.numel() > 1 else nonzero)

    def _by_mask(self, ref: Ref, masks: Mapping[str, torch.Tensor]) -> torch.Tensor:
        info = self.trace.info(ref)
        total = sets.uniform(len(info.shape), True)
        for fqn in info.all_fqns:
            if fqn in masks:
                total = masks[fqn] if sets.is_all(total) else total & masks[fqn]
        if ref.id in self._weightless:
            value = constant(self.trace, ref)
            total = total if value is None else _nonzero_elements(value)
        elif self.zeros and info.kind in ("param", "buffer") and not self.trace.values[ref.id].is_meta:
            total = total & _nonzero_slices(self.trace.values[ref.id])
        return total

    def _find_weightless(self) -> set[int]:
        """Ids of tensors that neither inputs nor weights made: their values are those of every run."""
        found = {key for key, info in self.trace.tensors.items() if info.kind == "const"}
        for op in self.trace.tape:
            if all(ref.id in found for ref in op.inputs):
                found.update(ref.id for ref in op.outputs if ref is not None)
        return found

    def alive(self, ref: Ref) -> torch.Tensor:
        observed, tainted = self.observed(ref), self.tainted(ref)
        if observed is tainted or sets.is_all(tainted):
            return observed
        return tainted if sets.is_all(observed) else observed & tainted

    def hidden(self, ref: Ref, elements: torch.Tensor) -> bool:
        """Whether tainting `elements` too taints no more of any dim of `ref` that could shrink."""
        tainted = self.tainted(ref)
        for dim in range(tainted.dim()):
            others = [d for d in range(tainted.dim()) if d != dim]
            more = sets.any_over(elements, others) & ~sets.any_over(tainted, others)
            if bool(more.any()) and not self._stays(ref, dim):
                return False
        return True

    def constants(self, ref: Ref) -> torch.Tensor:
        """Elements that may be a constant other than zero."""
        return self.nonzero(ref) & ~self.tainted(ref)


def _nonzero_slices(value: torch.Tensor) -> torch.Tensor:
    """As `_nonzero_elements`; all where the zeros are far too few to empty a slice: random weights have some."""
    zeros = value.numel() - int(value.count_nonzero())
    if value.dim() and 100 * zeros < value.numel() // max(value.shape):
        return sets.uniform(value.dim(), True)
    return _nonzero_elements(value)


def _nonzero_elements(value: torch.Tensor) -> torch.Tensor:
    if int(value.count_nonzero()) == value.numel():  # one pass, and most weights are so
        return sets.uniform(value.dim(), True)
    return sets.compress((value != 0).cpu())
