"""What several sets of units spend together: a ratio of what they cost, or what the whole model may cost at most.

The units of all sets are ranked together. The score of a unit is divided by its price, so that the importance lost for
the cost saved is least (as Liu et al. 2021, arXiv:2108.00708, normalise by the memory saved), and the shortest prefix
goes that saves enough. Costs are not additive (a layer costs the product of what is kept at both of its ends), so they
are recomputed exactly for each prefix; what is saved only grows with it, hence the binary search.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from dist_compress.errors import UserError
from dist_compress.method import Context
from dist_compress.pruning import costs
from dist_compress.pruning.checks import has_limit
from dist_compress.pruning.costs import Cost
from dist_compress.pruning.setting import AT_MOST, Setting
from dist_compress.pruning.sparsity import Ranked, by_share, count_bounds, share
from dist_compress.pruning.units import UnitSet

Removed = Sequence[np.ndarray]  # of each set, bool [num_units]


@dataclass
class Currency:
    """One thing that is counted. `at_most`: what may be left in the end; None: the ratio of the sets says."""

    unit: str
    cost: Cost
    at_most: Fraction | None = None


@dataclass
class Budget:
    """Sets that compete, `free`, and others, decided before them, that change what these cost."""

    name: str
    sets: Sequence[UnitSet]
    currencies: Sequence[Currency]
    free: Sequence[bool]

    @property
    def unit(self) -> str:
        return self.currencies[0].unit

    @property
    def title(self) -> str:
        return AT_MOST if self.name == AT_MOST else f"global_group_id={self.name}"

    def cost(self, removed: Removed) -> Fraction:
        """What is left without these units, in the first currency. Exact."""
        return self.currencies[0].cost.left(removed)

    def in_order(self) -> list[Currency]:
        """The limit that asks for the largest part first."""
        return sorted(self.currencies, key=lambda c: (c.at_most or 0) / self._total(c))

    def prices(self, currency: Currency) -> list[torch.Tensor]:
        """float64 [num_units] for each set: what one unit costs in the dense group, relative to the mean unit."""
        prices = currency.cost.prices()
        mean = torch.cat([p for p, free in zip(prices, self.free, strict=True) if free]).mean()
        return [price / mean for price in prices]

    def weighed(self, currency: Currency, scores: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """float32 [num_units] for each set: score by price; what saves nothing is kept."""
        return [
            torch.where(price > 0, score.double() / price, torch.inf).float()
            for score, price in zip(scores, self.prices(currency), strict=True)
        ]

    def wanted(self, fraction: float, decided: Removed | None = None) -> list[Fraction]:
        """Cost to save in each currency, after rounding the bounds to units.

        `decided`: what is gone of each set; without it as much as can go of those that are not free. Raises UserError
        when in the end more is asked than can go.
        """
        least, most = self._extremes(fraction, decided)
        return [
            self._ratio(c, least, most, fraction) if c.at_most is None else self._limit(c, least, most, fraction)
            for c in self.currencies
        ]

    def spend(
        self,
        scores: Sequence[torch.Tensor],
        removed: Sequence[torch.Tensor],
        bases: Sequence[int],
        fraction: float,
        weights: Sequence[float] | None = None,
    ) -> list[np.ndarray]:
        """For each set bool [num_units]: what is removed after this decision, old and new.

        `scores`: float32 [num_units] of each set. `removed`: bool, by earlier decisions, and by this one in sets that
        are not free. `bases`: global index of the first unit. `weights` of the sets: they share in proportion to these,
        whatever the scores of the one are to those of another. One limit after the other, where it does not hold yet.
        """
        gone = [r.numpy() for r in removed]
        wanted = dict(zip((c.unit for c in self.currencies), self.wanted(fraction, gone), strict=True))
        for c in self.in_order():
            now = [torch.from_numpy(g) for g in gone]
            ranked = [Ranked.of(*item) for item in zip(self.weighed(c, scores), now, bases, strict=True)]
            if weights is not None:
                ranked = [by_share(units, weight) for units, weight in zip(ranked, weights, strict=True)]
            gone = self.take(c, ranked, wanted[c.unit], fraction, gone)
        return gone

    def binding(self, removed: Removed) -> list[bool]:
        """For each currency whether some removed unit, put back alone, would break its limit: then more could not stay
        for its sake. Of several limits those that do not bind are met by what the others ask."""
        return [
            any(c.cost.left(back) > (c.at_most or 0) for back in self._one_back(c, removed)) for c in self.currencies
        ]

    def _one_back(self, currency: Currency, removed: Removed) -> Iterator[list[np.ndarray]]:
        """`removed` with the dearest unit of one set put back, for each set that lost any for the limits."""
        for i, price in enumerate(currency.cost.prices()):
            if self.free[i] and removed[i].any():
                kept = removed[i].copy()
                kept[np.where(removed[i], price.numpy(), -1.0).argmax()] = False
                yield [kept if j == i else gone for j, gone in enumerate(removed)]

    def take(
        self, currency: Currency, ranked: Sequence[Ranked], wanted: Fraction, fraction: float, decided: Removed
    ) -> list[np.ndarray]:
        """The shortest prefix of the ranked units that saves `wanted`, with all that was removed before."""
        start, where, which = [], [], []
        for i, (units, r) in enumerate(zip(self.sets, ranked, strict=True)):
            low, high = count_bounds(units.num_units, units.setting, fraction)
            start.append(r.first(low) if self.free[i] else decided[i])
            may = r.first(min(high, units.num_units - 1)) & ~start[i] if self.free[i] else start[i] & False
            which.append(np.flatnonzero(may))
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

        most = self._total(currency) - wanted
        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            if currency.cost.left(prefix(middle)) <= most:
                high = middle
            else:
                low = middle + 1
        return prefix(low)

    def _total(self, currency: Currency) -> Fraction:
        return currency.cost.left([np.zeros(s.num_units, bool) for s in self.sets])

    def _extremes(self, fraction: float, decided: Removed | None) -> tuple[list[np.ndarray], list[np.ndarray]]:
        least, most = [], []
        for i, s in enumerate(self.sets):
            num = s.num_units
            low, high = count_bounds(num, s.setting, fraction)
            if self.free[i]:
                least.append(_leading(num, low))
                most.append(_leading(num, min(high, num - 1)))
            else:
                gone = _leading(num, num - 1) if decided is None else decided[i]
                least.append(gone)
                most.append(gone)
        return least, most

    def _ratio(self, c: Currency, least: Removed, most: Removed, fraction: float) -> Fraction:
        setting, total = self.sets[0].setting, self._total(c)
        wanted = share(setting.sparse_ratio, fraction) * total
        widest: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for s in self.sets:
            num = s.num_units
            widest[0].append(_leading(num, math.floor(share(s.setting.min_sparse_ratio, fraction) * num)))
            widest[1].append(_leading(num, min(math.ceil(share(s.setting.max_sparse_ratio) * num), num - 1)))
        reach = [total - c.cost.left(x) for x in widest]
        if total == 0 or not reach[0] <= wanted <= reach[1]:
            raise UserError(
                f"global_group_id={setting.global_group_id!r}: {setting.said_by('sparse_ratio')} asks to remove "
                f"{float(wanted):.6g} of {float(total):.6g} {c.unit}, but {float(reach[0]):.6g} to "
                f"{float(reach[1]):.6g} can go: units keep at least one of each set, max_sparse_ratio and "
                f"min_sparse_ratio bound the rest, and {len(self.sets)} sets of units are free."
            )
        return min(max(wanted, total - c.cost.left(least)), total - c.cost.left(most))

    def _limit(self, c: Currency, least: Removed, most: Removed, fraction: float) -> Fraction:
        assert c.at_most is not None
        total, key = self._total(c), f"{AT_MOST}.{c.unit}={float(c.at_most):.10g}"
        if c.at_most >= total:
            raise UserError(
                f"{key}: the dense model has {said(c.unit, total)} already, so nothing would go. Lower it, or leave it "
                "out."
            )
        can = total - c.cost.left(most)
        if fraction == 1 and total - can > c.at_most:
            raise UserError(
                f"{key}: of {said(c.unit, total)} of the dense model {said(c.unit, can)} can go, which leaves "
                f"{said(c.unit, total - can)}: one unit of each of {sum(self.free)} sets stays, max_sparse_ratio "
                "bounds what goes, and so does what cannot be pruned or is no target. Raise it, or name more targets "
                "in pruning.config_list."
            )
        need = share(1.0, fraction) * (total - c.at_most)
        return min(max(need, total - c.cost.left(least)), can)


def said(unit: str, amount: Fraction) -> str:
    """An amount of a currency for people: "40813184 MACs", "3.21 ms"."""
    if unit == "latency_ms":
        return f"{float(amount):.4g} ms"
    return f"{math.ceil(amount)} {'MACs' if unit == 'macs' else 'parameters'}"


def budgets(sets: Sequence[UnitSet], settings: Sequence[Setting], context: Context) -> dict[str, Budget]:
    """One for each global group of units; that of the whole model, which depends on all others, last."""
    found = {}
    for gid in dict.fromkeys(s.setting.global_group_id for s in sets):
        if gid is not None and gid != AT_MOST:
            own = [s for s in sets if s.setting.global_group_id == gid]
            members = [s for s in settings if s.global_group_id == gid and not s.align]
            found[gid] = _ratio_budget(gid, own, members, context)
    if has_limit(context.config.pruning):
        found[AT_MOST] = _limit_budget(sets, context)
    return found


def _ratio_budget(name: str, sets: Sequence[UnitSet], members: Sequence[Setting], context: Context) -> Budget:
    """The budget of a global group whose targets, prunable or not, are `members`."""
    compute = context.config.pruning.compute
    cost: Cost
    if compute != "channels" and (no_cost := [s.name for s in members if s.activation]):
        raise UserError(
            f"pruning.compute={compute}: {', '.join(no_cost)} are activations, which have no cost of their own "
            f"({members[0].said_by('global_group_id')}). Use channels."
        )
    if compute == "channels":
        cost = costs.channels(sets)
    elif compute == "macs":
        cost = costs.macs_of(sets, context.coupling, members)
    elif compute == "params":
        cost = costs.params_of(sets, context.model, members)
    else:
        cost = costs.latency_of(sets, context.coupling, context.latencies)
    return Budget(name, sets, [Currency(compute, cost)], [True] * len(sets))


def _limit_budget(sets: Sequence[UnitSet], context: Context) -> Budget:
    """What `pruning.at_most` asks of the whole model; `sets` are all there are."""
    at_most, round_to = context.config.pruning.at_most, context.config.speedup.round_to
    currencies = []
    if at_most.macs is not None:
        cost = costs.all_macs(sets, context.coupling, context.model, round_to)
        currencies.append(Currency("macs", cost, share(at_most.macs)))
    if at_most.params is not None:
        currencies.append(Currency("params", costs.all_params(sets, context.model, round_to), share(at_most.params)))
    if at_most.latency_ms is not None:
        cost = costs.latency_of(sets, context.coupling, context.latencies)
        currencies.append(Currency("latency_ms", cost, share(at_most.latency_ms)))
    return Budget(AT_MOST, sets, currencies, [s.setting.limited for s in sets])


def _leading(num: int, count: int) -> np.ndarray:
    out = np.zeros(num, bool)
    out[:count] = True
    return out
