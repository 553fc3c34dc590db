"""What is known of the range of a tensor: observers, defined per optimizer step on the global batch.

    measure      in the forward pass of a micro-batch: what it adds; local, kept back until the pass counts
    fold         the pass counted: add it to what this rank saw during the step; local
    reduce       at the end of the step, for all observers of the model together: one MAX and one SUM collective
    range        [low, high], the same on every rank

Only maxima and integers are reduced, both free of order, so the state has equal bits at any number of ranks and for
any split of the global batch into micro-batches. (Averaging what each rank has averaged, or broadcasting what rank 0
saw, has neither.) What is not finite is counted and left out, by every rank alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dist_compress import comm
from dist_compress.quantization.granularity import Granularity, extent

NONE = float("-inf")  # the neutral element of MAX: nothing seen
Measured = list[torch.Tensor]


class Observer:
    """Smallest and largest value of each block over all steps. The base of the others."""

    def __init__(self, granularity: Granularity, shape: Sequence[int], device: torch.device | str = "cpu") -> None:
        """`shape`: of an example; its batch and token dims may differ later, the number of blocks may not."""
        self.granularity, self.device = granularity, device
        self.num_blocks = granularity.scale_shape(shape)
        self.size = 1
        for n in self.num_blocks:
            self.size *= n
        self.low = torch.full((self.size,), NONE, device=device).neg()  # over all steps: the state
        self.high = torch.full((self.size,), NONE, device=device)
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)  # seen, of them not finite
        self._extent = torch.full((2, self.size), NONE, device=device)  # -low, high of the step so far
        self._seen = torch.zeros(2, dtype=torch.int64, device=device)

    @torch.no_grad()
    def measure(self, x: torch.Tensor) -> Measured:
        """What one micro-batch adds. Local; changes nothing."""
        x = x.detach().float()
        if x.numel() == 0:
            return [torch.full_like(self._extent, NONE), torch.zeros_like(self._seen)]
        low, high = extent(x, self.granularity)
        bad = torch.zeros_like(self._seen[:1])
        # In a graph (torch.compile) no value decides what runs; there the passes over x are one.
        if torch.compiler.is_compiling() or not bool((low.isfinite() & high.isfinite()).all()):
            finite = x.isfinite()
            low, _ = extent(torch.where(finite, x, -NONE), self.granularity)
            _, high = extent(torch.where(finite, x, NONE), self.granularity)
            bad = (~finite).sum().view(1)
        return [torch.stack([-low, high]), torch.cat([torch.full_like(bad, x.numel()), bad])]

    def fold(self, measured: Measured) -> None:
        """Add one micro-batch to the step. Local."""
        self._extent = torch.maximum(self._extent, measured[0])
        self._seen = self._seen + measured[1]

    def maxima(self) -> torch.Tensor:
        """float32 [k] of this rank, to be reduced by MAX: -low and high of each block. Local."""
        return self._extent.flatten()

    def sums(self, maxima: torch.Tensor) -> torch.Tensor:
        """int64 [k] of this rank, to be reduced by SUM, once the maxima of all ranks are known. Local."""
        return self._seen

    def commit(self, maxima: torch.Tensor, sums: torch.Tensor) -> None:
        """Take in the reduced step, and begin the next. Local, the same on every rank."""
        extent = maxima.view(2, self.size)
        self._update(-extent[0], extent[1])
        self.counts += sums[:2]
        self._extent = torch.full_like(self._extent, NONE)
        self._seen = torch.zeros_like(self._seen)

    def _update(self, low: torch.Tensor, high: torch.Tensor) -> None:
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)

    @property
    def empty(self) -> bool:
        """Whether some block was never seen: there is no range yet."""
        return not bool((self.low <= self.high).all())

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 low and high, of the scale's shape."""
        assert not self.empty, "nothing was observed"
        return self.low.view(self.num_blocks), self.high.view(self.num_blocks)

    def resize(self, num_blocks: Sequence[int], members: torch.Tensor) -> None:
        """Between two steps: the tensor was cut to `num_blocks` in each dim. `members`: int64 [blocks, elements of
        one], the block that each element was in; a range holds those of all of them."""
        self.num_blocks, self.size = tuple(num_blocks), len(members)
        self.low, self.high = self.low[members].amin(1), self.high[members].amax(1)
        self._extent = torch.full((2, self.size), NONE, device=self.device)

    def state_dict(self) -> dict[str, Any]:
        """Between two steps; the same on every rank."""
        return {"low": self.low, "high": self.high, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key in self.state_dict():
            setattr(self, key, state[key].to(self.device))


class MovingAverage(Observer):
    """range := momentum * range + (1 - momentum) * range of the step; the first step counts whole."""

    def __init__(
        self, granularity: Granularity, shape: Sequence[int], device: torch.device | str = "cpu", momentum: float = 0.9
    ) -> None:
        super().__init__(granularity, shape, device)
        self.momentum = momentum

    def _update(self, low: torch.Tensor, high: torch.Tensor) -> None:
        seen, first = low <= high, self.low > self.high  # stays a tensor: no waiting for the device
        for name, new in (("low", low), ("high", high)):
            old = getattr(self, name)
            mean = torch.where(first, new, self.momentum * old + (1 - self.momentum) * new)
            setattr(self, name, torch.where(seen, mean, old))


def reduce(observers: Sequence[Observer]) -> None:
    """End the step of all observers of the model, in the same order on every rank. Collective: one MAX, one SUM,
    whatever their number and whatever each rank saw."""
    if not observers:
        return
    maxima = [observer.maxima() for observer in observers]
    flat = comm.all_reduce(torch.cat(maxima), "max").split([len(m) for m in maxima])
    sums = [observer.sums(m) for observer, m in zip(observers, flat, strict=True)]
    total = comm.all_reduce(torch.cat(sums)).split([len(s) for s in sums])
    for observer, most, added in zip(observers, flat, total, strict=True):
        observer.commit(most, added)
