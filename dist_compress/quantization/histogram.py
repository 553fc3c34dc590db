"""A histogram that N ranks build like one, in one pass, and what is read off it: percentile, MSE, entropy.

2 * BINS bins of equal width over [-2^e, 2^e), counts in int64. When larger values come e grows, and neighbouring bins
are added: exact, the same as having begun with the final e. The ranks learn the common e from the maxima, which are
reduced before the counts, so nothing is ever put from one binning into another that does not contain it. One outlier
makes all bins wide; `range` still ends at the exact smallest and largest value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dist_compress.quantization.dtypes import QuantDtype
from dist_compress.quantization.granularity import Granularity, rows
from dist_compress.quantization.observer import Measured, Observer
from dist_compress.quantization.search import entropy_range, mse_range, percentile_range

BINS = 2048  # on each side of zero
LEAST = -100  # smallest exponent e

Search = Callable[[torch.Tensor, float, float, float], tuple[float, float]]


class Histogram(Observer):
    """Counts of each block; `search(counts, width, low, high)` chooses the range from them."""

    def __init__(
        self, granularity: Granularity, shape: Sequence[int], device: torch.device | str = "cpu",
        search: Search = lambda counts, width, low, high: (low, high),
    ) -> None:  # fmt: skip
        super().__init__(granularity, shape, device)
        self.search = search
        self.bins = torch.zeros(self.size, 2 * BINS, dtype=torch.int64, device=device)  # the state, at `exponent`
        self.exponent = torch.full((self.size,), LEAST, dtype=torch.int64, device=device)
        self._fresh()

    def _fresh(self) -> None:
        self._step_bins = torch.zeros_like(self.bins)
        self._step_exponent = torch.full_like(self.exponent, LEAST)

    @torch.no_grad()
    def measure(self, x: torch.Tensor) -> Measured:
        extent, seen = super().measure(x)
        exponent = exponents(extent.amax(0))
        return [extent, seen, exponent, count(rows(x.detach().float(), self.granularity), exponent)]

    def fold(self, measured: Measured) -> None:
        extent, seen, exponent, bins = measured
        super().fold([extent, seen])
        common = torch.maximum(self._step_exponent, exponent)
        self._step_bins = coarsen(self._step_bins, self._step_exponent, common) + coarsen(bins, exponent, common)
        self._step_exponent = common

    def sums(self, maxima: torch.Tensor) -> torch.Tensor:
        common = exponents(maxima.view(2, self.size).amax(0))
        return torch.cat([self._seen, coarsen(self._step_bins, self._step_exponent, common).flatten()])

    def commit(self, maxima: torch.Tensor, sums: torch.Tensor) -> None:
        super().commit(maxima, sums)
        new = exponents(maxima.view(2, self.size).amax(0))
        common = torch.maximum(self.exponent, new)
        added = coarsen(sums[2:].view_as(self.bins), new, common)
        self.bins = coarsen(self.bins, self.exponent, common) + added
        self.exponent = common
        self._fresh()

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = super().range()
        found = []
        for counts, e, lo, hi in zip(
            self.bins.cpu(), self.exponent.tolist(), low.flatten().tolist(), high.flatten().tolist(), strict=True
        ):
            found.append(self.search(counts, 2.0**e / BINS, lo, hi))
        both = torch.tensor(found, dtype=torch.float32, device=self.device)
        return both[:, 0].view(self.num_blocks), both[:, 1].view(self.num_blocks)

    def resize(self, num_blocks: Sequence[int], members: torch.Tensor) -> None:
        """The counts of a block are those of all blocks that its elements were in."""
        super().resize(num_blocks, members)
        exponent = self.exponent[members].amax(1)
        bins = torch.zeros(self.size, 2 * BINS, dtype=torch.int64, device=self.device)
        for i, row in enumerate(members):
            old = row.unique()
            bins[i] = coarsen(self.bins[old], self.exponent[old], exponent[i].expand(len(old))).sum(0)
        self.bins, self.exponent = bins, exponent
        self._fresh()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "bins": self.bins, "exponent": self.exponent}


def percentile(keep: float) -> Search:
    return lambda counts, width, low, high: percentile_range(counts, width, low, high, keep)


def mse(dtype: QuantDtype, scheme: str) -> Search:
    return lambda counts, width, low, high: mse_range(counts, width, low, high, dtype, scheme)


def entropy(dtype: QuantDtype, scheme: str) -> Search:
    return lambda counts, width, low, high: entropy_range(counts, width, low, high, dtype, scheme)


def exponents(top: torch.Tensor) -> torch.Tensor:
    """int64 [n]: the smallest e >= LEAST with top < 2^e; LEAST where nothing was seen."""
    top = torch.where(top.isfinite(), top, 0.0)  # what was left out, or never seen
    return torch.where(top > 0, torch.frexp(top).exponent.long(), LEAST).clamp(min=LEAST)


def count(blocks: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """int64 [n, 2 * BINS] of n rows of values below 2^exponent. Multiplying by a power of two and floor are exact."""
    place = torch.floor(torch.ldexp(blocks, -exponent[:, None]) * BINS) + BINS
    finite = blocks.isfinite()
    index = torch.where(finite, place, 0.0).long() + 2 * BINS * torch.arange(len(blocks), device=blocks.device)[:, None]
    return torch.bincount(index[finite], minlength=2 * BINS * len(blocks)).view(len(blocks), 2 * BINS)


def coarsen(bins: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The counts at exponents `new` >= `old`, [n]: neighbouring bins added."""
    if torch.equal(old, new):
        return bins
    centred = torch.arange(-BINS, BINS, device=bins.device)
    shift = (new - old).clamp(max=40)  # 2^40 bins are one bin on each side
    index = (centred[None] >> shift[:, None]) + BINS
    return torch.zeros_like(bins).scatter_add_(1, index, bins)
