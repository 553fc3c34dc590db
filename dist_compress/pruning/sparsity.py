"""How many units of a set go, and which: counts, bounds and the order of importance.

Every rank holds all unit scores (a unit is a channel, so they are few) and runs the same integer arithmetic on
them. Ascending order: (score bits, hash of the global index, global index), as in `select`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch

from dist_compress.pruning.radix import KEPT, score_key, tie_key
from dist_compress.pruning.setting import Setting
from dist_compress.pruning.units import UnitSet


def share(ratio: float | Fraction, fraction: float = 1.0) -> Fraction:
    """ratio * fraction as they are meant: 0.29 of 100 is 29, where floats give 28, and a third is one."""
    return Fraction(str(ratio)) * Fraction(str(fraction)).limit_denominator(10**9)


def count_bounds(num: int, setting: Setting, fraction: float) -> tuple[int, int]:
    """Fewest and most units to remove by min_ and max_sparse_ratio. Until the last decision the least
    rounds down."""
    low = share(setting.min_sparse_ratio, fraction) * num
    return math.ceil(low) if fraction == 1 else math.floor(low), math.floor(share(setting.max_sparse_ratio) * num)


def threshold(setting: Setting, fraction: float) -> float:
    """What a score has to reach at a decision: like the ratio it grows with the schedule."""
    assert setting.sparse_threshold is not None
    return float(share(setting.sparse_threshold, fraction))


def threshold_count(below: int, num: int, setting: Setting, fraction: float) -> int:
    """How many of `num` go when `below` of them do not reach the threshold: the bounds, which grow with it, hold."""
    low, _ = count_bounds(num, setting, fraction)
    return min(max(below, low), math.floor(share(setting.max_sparse_ratio, fraction) * num))


@dataclass
class Ranked:
    """The units of one set at a decision."""

    key: np.ndarray  # int64 [num_units]
    tie: np.ndarray  # int64 [num_units], distinct over all sets
    removed: np.ndarray  # bool [num_units], by earlier decisions

    @classmethod
    def of(cls, scores: torch.Tensor, removed: torch.Tensor, base: int) -> Ranked:
        """`scores`: float32 [num_units] on the CPU; `base`: global index of the first unit."""
        gone = torch.where(removed, -torch.inf, scores)
        tie = tie_key(torch.arange(base, base + len(scores)))
        return cls(score_key(gone).numpy(), tie.numpy(), removed.numpy())

    def order(self) -> np.ndarray:
        """Unit numbers, least important first; those removed already come before all others."""
        return np.lexsort((self.tie, self.key, ~self.removed))

    def first(self, count: int, num_parts: int = 1) -> np.ndarray:
        """bool [num_units]: the `count` least important of each of `num_parts` equal parts, and all that were removed
        before."""
        out = self.removed.copy()
        order, size = self.order(), len(out) // num_parts
        for part in range(num_parts):
            out[order[order // size == part][:count]] = True
        return out


def by_share(units: Ranked, weight: float) -> Ranked:
    """The units of one set with keys that put those of several in one order: the k-th least important of n has k / n /
    weight. What must stay (+inf) still must."""
    share = np.empty(len(units.key))
    share[units.order()] = np.arange(1, len(share) + 1) / len(share) / weight
    share = np.where(units.removed, -np.inf, np.where(units.key >= KEPT, np.inf, share))
    return replace(units, key=score_key(torch.from_numpy(share).float()).numpy())


def decide_alone(units: UnitSet, ranked: Ranked, scores: torch.Tensor, fraction: float) -> np.ndarray:
    """bool [num_units]: what of a set outside of any global group is removed after this decision, old and new. At
    least one unit stays."""
    setting, num = units.setting, units.num_units
    if setting.sparse_threshold is None:
        count = int(share(setting.sparse_ratio, fraction) * (num // units.num_parts))
        return ranked.first(count, units.num_parts)
    below = int(((scores < threshold(setting, fraction)) | torch.from_numpy(ranked.removed)).sum())
    return ranked.first(min(threshold_count(below, num, setting, fraction), num - 1))
