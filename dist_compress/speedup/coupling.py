"""Which slices of which parameters make one removable unit, by the same constraints as the plan.

Positions of variables that links and views tie are components of a graph: a component is a unit. Where a view leaves
a choice (heads or head coordinates) whole outer blocks are units; in a grouped convolution the same position of each
group. At the end random units of every group count as masked and are planned for: what does not vanish is blocked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dist_compress.speedup.capture import Capture, captured
from dist_compress.speedup.masking import masked
from dist_compress.speedup.origin import behind, makers
from dist_compress.speedup.planning import solve
from dist_compress.speedup.propagation import propagate
from dist_compress.speedup.structure import Box, Structure
from dist_compress.target import Coupling, LayerCost, Member, UnitGroup
from dist_compress.tracing import Ref


def coupling(
    model: nn.Module | Capture,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    norm: str = "keep",
    keep: Iterable[str] = (),
    barrier: Iterable[str] = (),
) -> Coupling:
    """Unit groups and layer costs of `model`. Rank 0 only; broadcast the result.

    Zeroing the producer and affine slices of any units of a group that is not blocked makes `plan` remove exactly
    these units. `args`, `kwargs`: an example input whose first tensor has the batch in dim 0. A `Capture` holds model,
    input and settings, and serves `plan` after it. `norm`, `keep`, `barrier` as in `capture`.
    """
    given = captured(model, args, kwargs, {"norm": norm, "keep": tuple(keep), "barrier": tuple(barrier)})
    s = given.structure
    units = _Units(s)
    groups = _check(given, units.groups(_roles(s)))
    return Coupling(tuple(group for group, _ in groups), tuple(_costs(s, groups)))


class _Units:
    """Connected components of (variable, position) nodes."""

    def __init__(self, s: Structure):
        self.structure = s
        self.roots = sorted({s.find(v) for v in range(len(s.parent))})
        sizes = torch.tensor([s.sizes[v] for v in self.roots])
        starts = (sizes.cumsum(0) - sizes).tolist()
        self.start = dict(zip(self.roots, starts, strict=True))
        self.total = int(sizes.sum())
        self.pinned = dict(s.pins)
        self.edges = [(self.start[k.a] + k.index_a, self.start[k.b] + k.index_b) for k in s.links]
        for c in s.contractions:  # grouped convolution: the same position of each group
            if c.groups is not None and max(s.sizes[v] for v in c.factors[1:]) > 1 and s.sizes[c.factors[1]] > 1:
                self.pinned.setdefault(c.groups, "its groups stay, each becomes narrower")
        self._resolve_boxes()

    def _label(self) -> torch.Tensor:
        """The smallest node of the component of each node, int64 [nodes]."""
        label = torch.arange(self.total)
        if not self.edges:
            return label
        a = torch.cat([edge[0] for edge in self.edges])
        b = torch.cat([edge[1] for edge in self.edges])
        while True:
            least = torch.minimum(label[a], label[b])
            new = label.scatter_reduce(0, label[a], least, "amin").scatter_reduce(0, label[b], least, "amin")
            new = new[new]
            if torch.equal(new, label):
                return label
            label = new

    def _pinned_vars(self) -> set[int]:
        """Variables of which every position is tied to a pinned one."""
        s, label = self.structure, self._label()
        held = torch.zeros(self.total, dtype=torch.bool)
        for var in self.pinned:
            held[label[self.start[var] : self.start[var] + s.sizes[var]]] = True
        held = held[label]
        return {v for v in self.roots if bool(held[self.start[v] : self.start[v] + s.sizes[v]].all())}

    def _resolve_boxes(self) -> None:
        """Boxes with one free dim on each side tie its positions; a side that is pinned pins the other.

        What is left is chosen in tape order, one at a time, since a choice clears the boxes behind it.
        """
        waiting = list(self.structure.boxes)
        while waiting:
            pinned = self._pinned_vars()
            free = [sorted(sum(v not in pinned for v in side) for side in (b.a, b.b)) for b in waiting]
            clear = [b for b, (low, high) in zip(waiting, free, strict=True) if low == 0 or high == 1]
            for box in clear:
                self._tie(box, pinned)
            waiting = [b for b in waiting if not any(b is c for c in clear)]
            if not clear:
                self._choose(waiting[0], pinned)

    def _choose(self, box: Box, pinned: set[int]) -> None:
        """Of several free dims on a side, the unit is the outermost along which the units of the other side differ."""
        sizes = self.structure.sizes
        for side, other in ((box.a, box.b), (box.b, box.a)):
            free = [v for v in side if v not in pinned]
            if len(free) < 2:
                continue
            if len(other) == 1 and box.source is None:
                label = self._label()[self.start[other[0]] :][: sizes[other[0]]]
                grid = label.view([sizes[v] for v in side])
                varying = [v for d, v in enumerate(side) if v in free and not torch.equal(grid, _first(grid, d))]
                free = sorted(free, key=lambda v: v not in varying)
            for var in free[1:]:
                self.pinned.setdefault(var, "is an inner part of a dim that a view splits; the outer part is the unit")

    def _tie(self, box: Box, pinned: set[int]) -> None:
        s = self.structure
        if all(v in pinned for v in box.a) or all(v in pinned for v in box.b):
            for var in (*box.a, *box.b):
                self.pinned.setdefault(var, box.reason)
            return
        source = box.source
        if source is None:
            source = torch.arange(math.prod(s.sizes[v] for v in box.a))
        valid = (source >= 0).nonzero().flatten()
        self.edges.append((self._project(box.a, source[valid], pinned), self._project(box.b, valid, pinned)))

    def _project(self, side: tuple[int, ...], elements: torch.Tensor, pinned: set[int]) -> torch.Tensor:
        """The node on the one free dim of `side` of each flat element."""
        stride, node = 1, elements
        for var in reversed(side):
            size = self.structure.sizes[var]
            if var not in pinned:
                node = self.start[var] + elements // stride % size
            stride *= size
        return node

    def groups(self, roles: list[tuple[str, int, int, str]]) -> list[tuple[UnitGroup, dict[int, torch.Tensor]]]:
        """(group, {variable: int64 [num_units, k] positions of each unit}) in tape order of the first producer.

        roles: (param fqn, dim, variable, role), in tape order; an "added" parameter makes no group by itself.
        """
        s, label = self.structure, self._label()
        why = self._pin_reasons(label)
        shapes: dict[int, list[tuple[int, int]]] = {}
        wanted = {var for _, _, var, _ in roles} | {var for c in s.contractions for var in c.factors}
        for var in (v for v in self.roots if v in wanted and s.sizes[v] > 1):
            own = label[self.start[var] : self.start[var] + s.sizes[var]]
            for unit, count in zip(*(x.tolist() for x in own.unique(return_counts=True)), strict=True):
                shapes.setdefault(unit, []).append((var, count))
        classes: dict[tuple, list[int]] = {}
        for unit, shape in shapes.items():
            classes.setdefault((tuple(shape), why.get(unit, "")), []).append(unit)
        found = []
        for (shape, blocked), units in classes.items():
            where = {var: self._positions(var, units, label) for var, _ in shape}
            mine = [(i, *role) for i, role in enumerate(roles) if role[2] in where]
            first = next(((i, fqn) for i, fqn, _, _, role in mine if role == "producer"), None)
            if first is not None:
                members = tuple(
                    Member(fqn, dim, where[var], "producer" if role == "added" else role)
                    for _, fqn, dim, var, role in mine
                )
                name = first[1].rpartition(".")[0]
                found.append((first[0], min(units), UnitGroup(name, len(units), members, blocked), where))
        found.sort(key=lambda item: item[:2])
        return [(group, where) for _, _, group, where in found]

    def _positions(self, var: int, units: list[int], label: torch.Tensor) -> torch.Tensor:
        own = label[self.start[var] : self.start[var] + self.structure.sizes[var]]
        order = torch.argsort(own, stable=True)
        wanted = torch.isin(own[order], torch.tensor(units))
        return order[wanted].view(len(units), -1)

    def _pin_reasons(self, label: torch.Tensor) -> dict[int, str]:
        """Why the units of a pinned component stay."""
        why: dict[int, str] = {}
        for var, text in self.pinned.items():
            for unit in label[self.start[var] : self.start[var] + self.structure.sizes[var]].unique().tolist():
                why.setdefault(unit, text)
        return why


def _first(grid: torch.Tensor, dim: int) -> torch.Tensor:
    """The first slice along `dim`, in the place of every slice."""
    return grid.narrow(dim, 0, 1).expand_as(grid)


def _roles(s: Structure) -> list[tuple[str, int, int, str]]:
    """(param fqn, dim, variable, role) in tape order; tied parameters by their first name."""
    made_by = makers(s.trace)
    found: dict[tuple[str, int], tuple[str, int, int, str]] = {}
    for (key, dim), role in s.roles.items():
        ref, dims = behind(s.trace, made_by, Ref(key))
        own = dims[dim] if ref is not None else None
        if ref is None or own is None:
            continue
        info, var = s.trace.info(ref), s.dims(ref)[own]
        known = found.get((info.fqn, own))
        if known is None or role == "producer":
            found[(info.fqn, own)] = (info.fqn, own, var, role)
    return list(found.values())


def _check(
    given: Capture, groups: list[tuple[UnitGroup, dict[int, torch.Tensor]]]
) -> list[tuple[UnitGroup, dict[int, torch.Tensor]]]:
    """Mask 30 % of the units of each group, as data, and plan; groups of which one does not vanish become blocked."""
    generator = torch.Generator().manual_seed(0)
    removed: dict[int, torch.Tensor] = {}
    for i, (group, _) in enumerate(groups):
        if not group.blocked and group.num_units > 1:
            count = max(1, round(0.3 * group.num_units))
            removed[i] = torch.randperm(group.num_units, generator=generator)[:count]
    if not removed:
        return groups
    masks = _masks(given.model, [(groups[i][0], units) for i, units in removed.items()])
    facts = propagate(given.trace, masks, values=lambda: given.values_of(masked(given.model, masks)))
    made = solve(given, given.model, given.structure, facts)
    checked = list(groups)
    for i, units in removed.items():
        group, where = groups[i]
        failed = next((m for m in group.members if not _gone(m, units, made.keep)), None)
        if failed is not None:
            why = [b.reason for b in made.blocked if b.fqn == failed.fqn and b.dim == failed.dim]
            text = why[0] if why else f"{failed.fqn} keeps them along dim {failed.dim}"
            checked[i] = (UnitGroup(group.name, group.num_units, group.members, text), where)
    return checked


def _masks(model: nn.Module, chosen: list[tuple[UnitGroup, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """{parameter fqn: False at the producer and affine slices of the units}."""
    masks: dict[str, torch.Tensor] = {}
    for group, units in chosen:
        for member in group.members:
            if member.role != "consumer":
                shape = model.get_parameter(member.fqn).shape
                vector = torch.ones(shape[member.dim], dtype=torch.bool)
                vector[member.index[units].flatten()] = False
                vector = vector.view([-1 if d == member.dim else 1 for d in range(len(shape))])
                masks[member.fqn] = masks[member.fqn] & vector if member.fqn in masks else vector
    return masks


def mask_units(model: nn.Module, group: UnitGroup, units: torch.Tensor) -> None:
    """Zero the producer and affine slices of `units` of a group, in place. Local."""
    with torch.no_grad():
        for member in group.members:
            if member.role != "consumer":
                parameter = model.get_parameter(member.fqn)
                parameter.index_fill_(member.dim, member.index[units].flatten().to(parameter.device), 0.0)


def _gone(member: Member, units: torch.Tensor, keep: dict[str, dict[int, torch.Tensor]]) -> bool:
    kept = keep.get(member.fqn, {}).get(member.dim)
    return kept is not None and not bool(torch.isin(member.index[units], kept).any())


def _costs(s: Structure, groups: list[tuple[UnitGroup, dict[int, torch.Tensor]]]) -> list[LayerCost]:
    """MACs per sample of every contraction, in tape order."""
    made_by = makers(s.trace)
    batch = s.trace.info(s.trace.inputs[0]).shape[0]
    costs = []
    for c in s.contractions:
        weight, _ = behind(s.trace, made_by, c.b)
        owner = s.trace.info(weight).fqn.rpartition(".")[0] if weight is not None else c.op.module
        out = s.trace.info(c.op.out).shape
        if c.macs is not None:
            macs = c.macs
        elif c.op.name == "convolution":
            kernel = torch.Size(s.trace.info(c.b).shape[1:]).numel()
            positions = s.trace.info(c.a).shape if c.op.arg("transposed") else out
            macs = torch.Size(positions).numel() * kernel
        else:
            macs = torch.Size(out).numel() * s.sizes[c.contracted]
        factors = []
        for var in c.factors:
            parts = tuple(
                (i, torch.full((group.num_units,), where[var].size(1), dtype=torch.float64))
                for i, (group, where) in enumerate(groups)
                if var in where
            )
            if parts:
                fixed = s.sizes[var] - sum(float(weights.sum()) for _, weights in parts)
                factors.append((float(fixed), parts))
        costs.append(LayerCost(owner, macs // batch, tuple(factors)))
    return costs
