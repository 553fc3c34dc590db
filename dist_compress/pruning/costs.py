"""What a model, or a group of targets, costs as a function of the units that go: channels, parameters, MACs, latency.

Parameters and MACs are sums of products of what is kept along the dims of a layer, so they are exact. Latency is what
was measured (`Latencies`) of each group alone and of all groups at once: the savings of the groups are added, and the
sum is corrected by what the same sum would have been, and what was really saved, when all groups shrank together (two
layers that meet save the same time only once). Between measured points everything is linear. All arithmetic is in
fractions on data that every rank holds, so that all ranks, and a run that goes on, decide the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Protocol

import numpy as np
import torch
from torch import nn

from dist_compress.errors import UserError
from dist_compress.pruning.setting import Setting
from dist_compress.pruning.units import UnitSet
from dist_compress.target import Coupling, GroupLatency, Latencies, LayerCost, Member


class Cost(Protocol):
    """One currency. `removed`: bool [num_units] of each set."""

    def left(self, removed: Sequence[np.ndarray]) -> Fraction:
        """Cost that is left without these units. Never grows when more of them go."""
        ...

    def prices(self) -> list[torch.Tensor]:
        """float64 [num_units] for each set: what one unit costs while all others are there."""
        ...


@dataclass
class Products:
    """Layers whose factors name positions in `sets`."""

    sets: Sequence[UnitSet]
    layers: Sequence[LayerCost]
    round_to: int = 1
    rounded: Sequence[np.ndarray] = ()  # of each set, int64 [num_units + 1]: what the speedup keeps of so many units

    def left(self, removed: Sequence[np.ndarray]) -> Fraction:
        kept = [~gone for gone in removed]
        if self.round_to > 1:
            more = [int(table[k.sum()] - k.sum()) for k, table in zip(kept, self.rounded, strict=True)]
        else:
            more = [0] * len(kept)
        total = Fraction(0)
        for layer in self.layers:
            cost = Fraction(layer.macs)
            for fixed, parts in layer.factors:
                full = fixed + sum(float(weight.sum()) for _, weight in parts)
                left = fixed + sum(float(w.numpy()[kept[i]].sum()) + more[i] * float(w.mean()) for i, w in parts)
                if len(parts) > 1 and self.round_to > 1 and left < full:
                    left = min(full, -(-left // self.round_to) * self.round_to)
                cost *= Fraction(left) / Fraction(full)
            total += cost
        return total

    def prices(self) -> list[torch.Tensor]:
        prices = [torch.zeros(s.num_units, dtype=torch.float64) for s in self.sets]
        for layer in self.layers:
            for fixed, parts in layer.factors:
                full = fixed + sum(float(weight.sum()) for _, weight in parts)
                for i, weight in parts:
                    prices[i] += weight * (layer.macs / full)
        return prices


@dataclass
class Measured:
    """Milliseconds of a call of the whole model. `groups`: the row of each set; None: nothing is saved by it."""

    sets: Sequence[UnitSet]
    groups: Sequence[GroupLatency | None]
    table: Latencies

    def left(self, removed: Sequence[np.ndarray]) -> Fraction:
        saved = Fraction(0)
        for units, row in zip(removed, self.groups, strict=True):
            saved += _saved(row, Fraction(int(len(units) - units.sum()))) if row is not None else 0
        return Fraction(self.table.together.ms[-1]) - self._true(saved)

    def prices(self) -> list[torch.Tensor]:
        prices = []
        for s, row in zip(self.sets, self.groups, strict=True):
            each = 0.0 if row is None else (row.ms[-1] - row.ms[0]) / (row.num_units - row.kept[0])
            prices.append(torch.full((s.num_units,), each, dtype=torch.float64))
        return prices

    def _true(self, saved: Fraction) -> Fraction:
        """What groups save together that would save `saved` in all, each alone. Beyond what was measured: no more."""
        whole = self.table.together
        below = (Fraction(0), Fraction(0))
        for kept, ms in zip(reversed(whole.kept[:-1]), reversed(whole.ms[:-1]), strict=True):
            share = Fraction(kept, whole.num_units)
            alone = sum((_saved(row, share * row.num_units) for row in self.table.groups), Fraction(0))
            if alone > below[0]:
                here = (alone, Fraction(whole.ms[-1]) - Fraction(ms))
                if saved <= alone:
                    return _between(below, here, saved)
                below = here
        return below[1]


def _saved(row: GroupLatency, kept: Fraction) -> Fraction:
    """Milliseconds that a group saves alone with so many units, linear between those that were measured."""
    points = list(zip(row.kept, row.ms, strict=True))
    low = next((i for i in reversed(range(len(points) - 1)) if points[i][0] <= kept), 0)
    (a, at_a), (b, at_b) = points[low], points[low + 1]
    kept = max(kept, Fraction(a))  # fewer than was measured: as the fewest that were
    return Fraction(row.ms[-1]) - _between((Fraction(a), Fraction(at_a)), (Fraction(b), Fraction(at_b)), kept)


def _between(low: tuple[Fraction, Fraction], high: tuple[Fraction, Fraction], at: Fraction) -> Fraction:
    return low[1] + (high[1] - low[1]) * (at - low[0]) / (high[0] - low[0])


def channels(sets: Sequence[UnitSet]) -> Products:
    """The number of units."""
    ones = [torch.ones(s.num_units, dtype=torch.float64) for s in sets]
    return Products(sets, [LayerCost(s.name, s.num_units, ((0.0, ((i, ones[i]),)),)) for i, s in enumerate(sets)])


def macs_of(sets: Sequence[UnitSet], coupling: Coupling, settings: Sequence[Setting]) -> Products:
    """MACs of the layers that are targets of a group, prunable or not. Raises UserError where there are none."""
    modules = list(dict.fromkeys(s.module for s in settings if s.target == "weight"))
    position = {s.coupled: i for i, s in enumerate(sets) if s.coupled is not None}
    alone = {target: i for i, s in enumerate(sets) if s.coupled is None for target in s.targets}
    layers = [_macs(c, position, alone, sets) for c in coupling.layers if c.fqn in set(modules)]
    other = [s.name for s in settings if s.target != "weight"]
    if not layers or other:
        names = ", ".join(other or modules)
        raise UserError(
            f"pruning.compute=macs: the trace has no MACs for {names} ({settings[0].said_by('global_group_id')}). "
            "Use params."
        )
    return Products(sets, layers)


def params_of(sets: Sequence[UnitSet], model: nn.Module, settings: Sequence[Setting]) -> Products:
    """Elements of the targets of a group. A module whose weight is a target counts as a whole, any other target by
    itself."""
    counted: dict[str, None] = {}
    for s in settings:
        own = [n for n, _ in model.get_submodule(s.module).named_parameters(recurse=False)]
        counted |= dict.fromkeys(f"{s.module}.{n}" for n in (own if s.target == "weight" else [s.target]))
    return Products(sets, _params(sets, model, list(counted)))


def all_macs(sets: Sequence[UnitSet], coupling: Coupling, model: nn.Module, round_to: int) -> Products:
    """MACs of the whole model. Sets of the user's own count as whole: what goes of them only the speedup knows."""
    position = {s.coupled: i for i, s in enumerate(sets) if s.coupled is not None}
    layers = [_macs(c, position, {}, sets) for c in coupling.layers]
    return Products(sets, layers, round_to, _rounded(sets, _all_params(sets, model), round_to))


def all_params(sets: Sequence[UnitSet], model: nn.Module, round_to: int) -> Products:
    """Elements of all parameters, tied ones once."""
    layers = _all_params(sets, model)
    return Products(sets, layers, round_to, _rounded(sets, layers, round_to))


def _all_params(sets: Sequence[UnitSet], model: nn.Module) -> list[LayerCost]:
    coupled = [s if s.coupled is not None else replace(s, members=()) for s in sets]
    return _params(coupled, model, [name for name, _ in model.named_parameters()])


def _rounded(sets: Sequence[UnitSet], parameters: Sequence[LayerCost], round_to: int) -> list[np.ndarray]:
    """Of each set, how many units stay when k are kept: as few more as make every dim of a parameter that holds no
    other set a multiple of `round_to`, or all. Units of a dim are of one size there."""
    fits = [np.ones(s.num_units + 1, bool) for s in sets]
    for layer in parameters:
        for fixed, parts in layer.factors:
            if len(parts) == 1:
                [(i, weight)] = parts
                fits[i] &= (int(fixed) + np.arange(len(fits[i])) * int(weight[0])) % round_to == 0
    tables = []
    for fit in fits:
        fit[-1] = True  # a dim that does not shrink is left as it is
        where = np.flatnonzero(fit)
        tables.append(where[np.searchsorted(where, np.arange(len(fit)))])
    return tables


def latency_of(sets: Sequence[UnitSet], coupling: Coupling, table: Latencies | None) -> Measured:
    """The latency of the whole model. Raises UserError when the table is of another model."""
    assert table is not None, "whoever attaches measures the latencies, or loads them"
    rows: dict[str, list[GroupLatency]] = {}
    for row in table.groups:
        rows.setdefault(row.name, []).append(row)
    by_index = {}
    for index, group in enumerate(coupling.groups):
        if group.blocked or group.num_units < 2:
            continue
        row = rows[group.name].pop(0) if rows.get(group.name) else None
        if row is None or row.num_units != group.num_units:
            has = "has no such row" if row is None else f"has {row.num_units} units there"
            raise UserError(
                f"pruning.latency.table: the model has {group.num_units} units of the group {group.name!r}, the table "
                f"{has}. It was measured on another model; measure this one (docs/pruning.md), or leave it null."
            )
        by_index[index] = row
    return Measured(sets, [by_index.get(s.coupled) if s.coupled is not None else None for s in sets], table)


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


def _params(sets: Sequence[UnitSet], model: nn.Module, counted: Sequence[str]) -> list[LayerCost]:
    """Each parameter as a product over its dims: elements that stay, elements of each unit."""
    members: dict[str, dict[int, list[tuple[int, Member]]]] = {}
    for i, s in enumerate(sets):
        for m in s.members:
            members.setdefault(m.fqn, {}).setdefault(m.dim, []).append((i, m))
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
