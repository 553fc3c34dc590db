"""How many units go, and which: a count in each set, or a budget of a whole group in channels, parameters or MACs.

Every rank holds all unit scores (a unit is a channel, so they are few) and runs the same integer arithmetic on
them. Ascending order: (score bits, hash of the global index, global index), as in `select`. The budget of a global
group is spent on the shortest prefix whose removed cost reaches ratio * cost of the group; there, the score of a unit
is divided by its price, so that the importance lost for the cost saved is least (as Liu et al. 2021,
arXiv:2108.00708, normalise by the memory saved). In channels all prices are one. Costs of layers are products of the
units kept at both of their ends, so they are recomputed exactly for each prefix; they only grow with it, hence the
binary search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import nn

from dist_compress.errors import UserError
from dist_compress.pruning.select import score_key, tie_key
from dist_compress.pruning.setting import Setting
from dist_compress.pruning.units import UnitSet
from dist_compress.target import Coupling, LayerCost, Member


def share(ratio: float | Fraction, fraction: float = 1.0) -> Fraction:
    """ratio * fraction as the user wrote them: 0.29 of 100 is 29, where floats give 28."""
    return Fraction(str(ratio)) * Fraction(str(fraction))


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


def decide_alone(units: UnitSet, ranked: Ranked, scores: torch.Tensor, fraction: float) -> np.ndarray:
    """bool [num_units]: what of a set outside of any global group is removed after this decision, old and new. At
    least one unit stays."""
    setting, num = units.setting, units.num_units
    if setting.sparse_threshold is None:
        count = int(share(setting.sparse_ratio, fraction) * (num // units.num_parts))
        return ranked.first(count, units.num_parts)
    below = int(((scores < threshold(setting, fraction)) | torch.from_numpy(ranked.removed)).sum())
    return ranked.first(min(threshold_count(below, num, setting, fraction), num - 1))




@dataclass
class Budget:
    """One global group: its sets, and the layers whose cost counts (factors name positions in `sets`)."""

    name: str
    sets: Sequence[UnitSet]
    layers: Sequence[LayerCost]
    unit: str  # what the cost is measured in

    def cost(self, removed: Sequence[np.ndarray]) -> Fraction:
        """Cost that is left without these units. Exact."""
        total = Fraction(0)
        for layer in self.layers:
            cost = Fraction(layer.macs)
            for fixed, parts in layer.factors:
                full = fixed + sum(float(weight.sum()) for _, weight in parts)
                left = fixed + sum(float(weight.numpy()[~removed[i]].sum()) for i, weight in parts)
                cost *= Fraction(left) / Fraction(full)
            total += cost
        return total

    def prices(self) -> list[torch.Tensor]:
        """float64 [num_units] for each set: what one unit costs in the dense group, relative to the mean unit."""
        prices = [torch.zeros(s.num_units, dtype=torch.float64) for s in self.sets]
        for layer in self.layers:
            for fixed, parts in layer.factors:
                full = fixed + sum(float(weight.sum()) for _, weight in parts)
                for i, weight in parts:
                    prices[i] += weight * (layer.macs / full)
        mean = torch.cat(prices).mean()
        return [price / mean for price in prices]

    def target(self, fraction: float) -> tuple[Fraction, Fraction]:
        """(cost of the whole group, cost to remove), after rounding the bounds to units. Raises UserError."""
        nothing = [np.zeros(s.num_units, bool) for s in self.sets]
        total = self.cost(nothing)
        setting = self.sets[0].setting
        wanted = share(setting.sparse_ratio, fraction) * total
        least, most, widest = [], [], ([], [])
        for s in self.sets:
            num, allowed = s.num_units, s.num_units - 1
            low, high = count_bounds(num, s.setting, fraction)
            least.append(_leading(num, low))
            most.append(_leading(num, min(high, allowed)))
            widest[0].append(_leading(num, math.floor(share(s.setting.min_sparse_ratio, fraction) * num)))
            widest[1].append(_leading(num, min(math.ceil(share(s.setting.max_sparse_ratio) * num), allowed)))
        reach = [total - self.cost(x) for x in widest]
        if total == 0 or not reach[0] <= wanted <= reach[1]:
            raise UserError(
                f"global_group_id={setting.global_group_id!r}: {setting.said_by('sparse_ratio')} asks to remove "
                f"{float(wanted):.6g} of {float(total):.6g} {self.unit}, but {float(reach[0]):.6g} to "
                f"{float(reach[1]):.6g} can go: units keep at least one of each set, max_sparse_ratio and "
                f"min_sparse_ratio bound the rest, and {len(self.sets)} sets of units are free."
            )
        return total, min(max(wanted, total - self.cost(least)), total - self.cost(most))

    def spend(self, ranked: Sequence[Ranked], fraction: float) -> list[np.ndarray]:
        """For each set bool [num_units]: what is removed after this decision, old and new."""
        total, wanted = self.target(fraction)
        start, where, which = [], [], []
        for i, (units, r) in enumerate(zip(self.sets, ranked, strict=True)):
            low, high = count_bounds(units.num_units, units.setting, fraction)
            start.append(r.first(low))
            which.append(np.flatnonzero(r.first(min(high, units.num_units - 1)) & ~start[i]))
            where.append(np.full(len(which[i]), i))
        tie = np.concatenate([r.tie[u] for r, u in zip(ranked, which, strict=True)])
        key = np.concatenate([r.key[u] for r, u in zip(ranked, which, strict=True)])
        order = np.lexsort((tie, key))
        place = [np.flatnonzero(np.concatenate(where)[order] == i) for i in range(len(start))]
        which = [np.concatenate(which)[order][p] for p in place]

        def prefix(length: int) -> list[np.ndarray]:
            removed = [s.copy() for s in start]
            for gone, units, p in zip(removed, which, place, strict=True):
                gone[units[: np.searchsorted(p, length)]] = True
            return removed

        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            if total - self.cost(prefix(middle)) >= wanted:
                high = middle
            else:
                low = middle + 1
        return prefix(low)


def _leading(num: int, count: int) -> np.ndarray:
    out = np.zeros(num, bool)
    out[:count] = True
    return out


def budget(
    name: str,
    sets: Sequence[UnitSet],
    compute: str,
    coupling: Coupling,
    model: nn.Module,
    settings: Sequence[Setting],
) -> Budget:
    """The budget of a global group whose targets, prunable or not, are `settings`."""
    modules = list(dict.fromkeys(s.module for s in settings if s.target == "weight"))
    position = {s.coupled: i for i, s in enumerate(sets) if s.coupled is not None}
    alone = {target: i for i, s in enumerate(sets) if s.coupled is None for target in s.targets}
    if compute == "channels":
        ones = [torch.ones(s.num_units, dtype=torch.float64) for s in sets]
        layers = [LayerCost(s.name, s.num_units, ((0.0, ((i, ones[i]),)),)) for i, s in enumerate(sets)]
    elif compute == "macs":
        layers = [_macs(c, position, alone, sets) for c in coupling.layers if c.fqn in set(modules)]
        other = [s.name for s in settings if s.target != "weight"]
        if not layers or other:
            names = ", ".join(other or modules)
            raise UserError(
                f"pruning.compute=macs: the trace has no MACs for {names} ({settings[0].said_by('global_group_id')}). "
                "Use params."
            )
    else:
        layers = _params(sets, model, settings)
    return Budget(name, sets, layers, compute)


def _macs(cost: LayerCost, position: dict[int, int], alone: dict[str, int], sets: Sequence[UnitSet]) -> LayerCost:
    """A layer's cost with factors that name positions in the group; units decided elsewhere count as
    whole."""
    if cost.fqn in alone:
        i = alone[cost.fqn]
        return LayerCost(cost.fqn, cost.macs, ((0.0, ((i, torch.ones(sets[i].num_units, dtype=torch.float64)),)),))
    factors = []
    for fixed, parts in cost.factors:
        inside = tuple((position[g], weight) for g, weight in parts if g in position)
        fixed += sum(float(weight.sum()) for g, weight in parts if g not in position)
        factors.append((fixed, inside))
    return LayerCost(cost.fqn, cost.macs, tuple(factors))


def _params(sets: Sequence[UnitSet], model: nn.Module, settings: Sequence[Setting]) -> list[LayerCost]:
    """Each parameter as a product over its dims: elements that stay, elements of each unit. A module whose weight is a
    target counts as a whole, any other target by itself."""
    members: dict[str, dict[int, list[tuple[int, Member]]]] = {}
    for i, s in enumerate(sets):
        for m in s.members:
            members.setdefault(m.fqn, {}).setdefault(m.dim, []).append((i, m))
    counted: dict[str, None] = {}
    for s in settings:
        own = [n for n, _ in model.get_submodule(s.module).named_parameters(recurse=False)]
        counted |= dict.fromkeys(f"{s.module}.{n}" for n in (own if s.target == "weight" else [s.target]))
    layers = []
    for fqn in counted:
        parameter = model.get_parameter(fqn)
        factors = []
        for dim, uses in members.get(fqn, {}).items():
            parts = tuple((i, torch.full((len(m.index),), m.index.shape[1], dtype=torch.float64)) for i, m in uses)
            fixed = parameter.shape[dim] - sum(float(weight.sum()) for _, weight in parts)
            factors.append((fixed, parts))
        layers.append(LayerCost(fqn.rpartition(".")[0], parameter.numel(), tuple(factors)))
    return layers
