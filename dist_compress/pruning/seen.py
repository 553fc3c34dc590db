"""What the scores of each decision looked like: histograms of what it kept and what it removed, small and exact.

Bins are those of the float pattern, eight to an octave, so that ranks count their own scores and add whole numbers;
no rank needs to know the range of the others. What is told keeps the 16 highest octaves; below them everything is
taken for zero.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dist_compress.pruning.radix import score_key

SHIFT = 20  # of the 32 bits of a score: 8 bins an octave
HALF = 2**11  # bins of one sign
INFINITE = 255 * 8  # the bin of infinity, of either sign
OCTAVES, BARS, MOST_GROUPS = 16, 32, 24


def bins(scores: torch.Tensor) -> torch.Tensor:
    """int16 of the shape of `scores`: the bin of each, ascending with the score."""
    return (score_key(scores) >> SHIFT).to(torch.int16)


def count(bin_of: torch.Tensor, removed: torch.Tensor) -> torch.Tensor:
    """int64 [2, 2 * HALF]: how many are kept and how many removed in each bin. Local; sums over ranks are exact."""
    index = bin_of.flatten() + HALF + removed.flatten().to(torch.int16) * (2 * HALF)
    return torch.bincount(index, minlength=4 * HALF).view(2, 2 * HALF)


def count_all(tensors: Sequence[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]]) -> torch.Tensor:
    """`count` of several (bins, removed) in parts, of which this rank may have none. Local."""
    total = torch.zeros(2, 2 * HALF, dtype=torch.int64)
    for spots, removed in tensors:
        for spot, gone in zip(spots, removed, strict=True):
            total = total.to(spot.device) + count(spot, gone)
    return total


def histogram(counts: np.ndarray) -> dict[str, Any]:
    """{edges, kept, removed}: at most about BARS bars over the scores that are there; empty lists when all are
    infinite. `counts` as in `count`."""
    at = np.flatnonzero(counts.sum(0))
    size = np.where(at >= HALF, at - HALF, HALF - 1 - at)
    at, size = at[size < INFINITE], size[size < INFINITE]
    if not len(at):
        return {"edges": [], "kept": [], "removed": []}
    floor = max(int(size.max()) - 8 * OCTAVES, 0)
    place = np.where(at >= HALF, 1, -1) * np.maximum(size - floor, 0)
    first, last = int(place.min()), int(place.max())
    wide = -(-(last - first + 1) // BARS)
    num = -(-(last - first + 1) // wide)
    bars = np.zeros((2, num), np.int64)
    for which in (0, 1):
        np.add.at(bars[which], (place - first) // wide, counts[which, at])
    edges = [_value(first + i * wide, floor) for i in range(num + 1)]
    return {"edges": edges, "kept": bars[0].tolist(), "removed": bars[1].tolist()}


def _value(place: int, floor: int) -> float:
    """The least score of a place."""
    if place == 0:
        return 0.0
    bits = np.array([min(abs(place) + floor, INFINITE - 1) << SHIFT], np.int32)
    return float(np.float32(np.sign(place) * bits.view(np.float32)[0]))


@dataclass
class Seen:
    """A row {step, name, edges, kept, removed} for each decision and each of its groups, the first MOST_GROUPS ones."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    now: dict[str, torch.Tensor] = field(default_factory=dict)  # counts by group, of the decision that is being taken

    def add(self, name: str, scores: Sequence[torch.Tensor], removed: Sequence[torch.Tensor]) -> None:
        """The units of a group with the scores by which they were ranked, -inf: gone before. The same on every rank."""
        both = [torch.zeros(0), *scores], [torch.zeros(0, dtype=torch.bool), *removed]
        self.now[name] = count(bins(torch.cat(both[0])), torch.cat(both[1]))

    def close(self, step: int, between: bool) -> None:
        """The decision at `step` is taken. `between`: it takes the place of the one told before, as those beside the
        schedule do."""
        if between and self.rows:
            dropped = self.rows[-1]["step"]
            self.rows = [row for row in self.rows if row["step"] != dropped]
        for name, counts in list(self.now.items())[:MOST_GROUPS]:
            self.rows.append({"step": step, "name": name, **histogram(counts.cpu().numpy())})
        self.now.clear()

    def state(self) -> str:
        return json.dumps(self.rows)

    def load(self, state: str) -> None:
        self.rows = json.loads(state)
