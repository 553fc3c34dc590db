"""Removable units as components of a graph: positions of variables that links and views tie are one unit.

Where a view leaves a choice (heads or head coordinates) whole outer blocks are units; in a grouped convolution the same
position of each group. Variables that no link and no view ties fall apart into clusters, each looked at alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from dist_compress.speedup.structure import Box, Link, Structure
from dist_compress.target import Member, UnitGroup, module_of

Group = tuple[UnitGroup, dict[int, torch.Tensor]]
Role = tuple[str, int, int, str]  # param fqn, dim, variable, role


class _Class(NamedTuple):
    first: int  # orders the classes of a cluster
    where: dict[int, torch.Tensor]  # variable -> int64 [num_units, k] positions of each unit
    blocked: str


def groups_of(s: Structure, roles: Sequence[Role]) -> list[Group]:
    """(group, {variable: int64 [num_units, k] positions of each unit}) in tape order of the first producer.

    roles: in tape order; an "added" parameter makes no group by itself.
    """
    by_var: dict[int, list[tuple[int, Role]]] = {}
    for i, role in enumerate(roles):
        by_var.setdefault(role[2], []).append((i, role))
    wanted = {v for v in by_var if s.sizes[v] > 1}
    wanted |= {v for c in s.contractions for v in c.factors if s.sizes[v] > 1}
    found = []
    for unit_class in _classes(s, set(by_var), wanted):
        mine = sorted(item for var in unit_class.where for item in by_var.get(var, ()))
        first = next(((i, fqn) for i, (fqn, _, _, role) in mine if role == "producer"), None)
        if first is not None:
            members = tuple(
                Member(fqn, dim, unit_class.where[var], "producer" if role == "added" else role)
                for _, (fqn, dim, var, role) in mine
            )
            name, num_units = module_of(first[1]), len(members[0].index)
            group = UnitGroup(name, num_units, members, unit_class.blocked)
            found.append((first[0], unit_class.first, group, unit_class.where))
    found.sort(key=lambda item: item[:2])
    return [(group, where) for _, _, group, where in found]


def _classes(s: Structure, with_roles: set[int], wanted: set[int]) -> list[_Class]:
    """Classes in which a variable with a role may be; they tell the positions on `wanted` variables."""
    pins = dict(s.pins)
    for c in s.contractions:  # grouped convolution: the same position of each group
        if c.groups is not None and max(s.sizes[v] for v in c.factors[1:]) > 1 and s.sizes[c.factors[1]] > 1:
            pins.setdefault(c.groups, "its groups stay, each becomes narrower")
    found = []
    for roots, links, boxes in _clusters(s):
        if with_roles.isdisjoint(roots):
            continue
        if not links and not boxes:  # a variable alone: every position is a unit
            (var,) = roots
            if var not in wanted:
                continue
            found.append(_Class(0, {var: torch.arange(s.sizes[var])[:, None]}, pins.get(var, "")))
        else:
            found += _Units(s, roots, links, boxes, pins).classes(wanted)
    return found


def _clusters(s: Structure) -> list[tuple[list[int], list[Link], list[Box]]]:
    """The variables that links and boxes connect, with these."""
    parent = {v: v for v in s.roots()}

    def find(v: int) -> int:
        while parent[v] != v:
            parent[v] = parent[parent[v]]
            v = parent[v]
        return v

    for link in s.links:
        parent[find(link.b)] = find(link.a)
    for box in s.boxes:
        for v in (*box.a, *box.b):
            parent[find(v)] = find(box.a[0])
    clusters: dict[int, tuple[list[int], list[Link], list[Box]]] = {}
    for v in parent:
        clusters.setdefault(find(v), ([], [], []))[0].append(v)
    for link in s.links:
        clusters[find(link.a)][1].append(link)
    for box in s.boxes:
        clusters[find(box.a[0])][2].append(box)
    return list(clusters.values())


def _joined(total: int, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The smallest node of the component of each of `total` nodes, with an edge between a[i] and b[i]."""
    label = torch.arange(total)
    if not len(a):
        return label
    a, b = torch.stack([a, b], 1).unique(dim=0).unbind(1)
    while True:
        least = torch.minimum(label[a], label[b])
        new = label.scatter_reduce(0, a, least, "amin").scatter_reduce(0, b, least, "amin")
        new = new.scatter_reduce(0, label[a], least, "amin").scatter_reduce(0, label[b], least, "amin")
        new = new[new]
        if torch.equal(new, label):
            return label
        label = new


class _Units:
    """Connected components of the (variable, position) nodes of some variables, with all links and boxes of these."""

    def __init__(self, s: Structure, roots: list[int], links: list[Link], boxes: list[Box], pins: dict[int, str]):
        self.structure, self.roots = s, roots
        sizes = torch.tensor([s.sizes[v] for v in self.roots])
        starts = (sizes.cumsum(0) - sizes).tolist()
        self.start = dict(zip(self.roots, starts, strict=True))
        self.total = int(sizes.sum())
        self.owner = torch.arange(len(roots)).repeat_interleave(sizes)  # the place in `roots` of each node
        self.pinned = {v: why for v, why in pins.items() if v in self.start}
        self.known = torch.arange(self.total)  # labels, without those edges:
        self.edges = [(self.start[k.a] + k.index_a, self.start[k.b] + k.index_b) for k in links]
        self._resolve_boxes(boxes)

    def _label(self) -> torch.Tensor:
        """The smallest node of the component of each node, int64 [nodes]."""
        if self.edges:
            a, b = (self.known[torch.cat(ends)] for ends in zip(*self.edges, strict=True))
            self.edges.clear()
            apart = a != b
            self.known = _joined(self.total, a[apart], b[apart])[self.known]
        return self.known

    def _pinned_vars(self) -> set[int]:
        """Variables of which every position is tied to a pinned one."""
        s, label = self.structure, self._label()
        held = torch.zeros(self.total, dtype=torch.bool)
        for var in self.pinned:
            held[label[self.start[var] : self.start[var] + s.sizes[var]]] = True
        free = torch.zeros(len(self.roots), dtype=torch.bool)
        free[self.owner[~held[label]]] = True
        return {v for v, is_free in zip(self.roots, free.tolist(), strict=True) if not is_free}

    def _resolve_boxes(self, boxes: list[Box]) -> None:
        """Boxes with one free dim on each side tie its positions; a side that is pinned pins the other.

        What is left is chosen in tape order, one at a time, since a choice clears the boxes behind it.
        """
        waiting = list(boxes)
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

    def classes(self, wanted: set[int]) -> list[_Class]:
        """The units of which `wanted` variables hold equally many positions each, as one class."""
        s, label = self.structure, self._label()
        why = self._pin_reasons(label)
        shapes: dict[int, list[tuple[int, int]]] = {}
        for var in (v for v in self.roots if v in wanted):
            own = label[self.start[var] : self.start[var] + s.sizes[var]]
            for unit, count in zip(*(x.tolist() for x in own.unique(return_counts=True)), strict=True):
                shapes.setdefault(unit, []).append((var, count))
        found: dict[tuple, list[int]] = {}
        for unit, shape in shapes.items():
            found.setdefault((tuple(shape), why.get(unit, "")), []).append(unit)
        return [
            _Class(min(units), {var: self._positions(var, units, label) for var, _ in shape}, blocked)
            for (shape, blocked), units in found.items()
        ]

    def _positions(self, var: int, units: list[int], label: torch.Tensor) -> torch.Tensor:
        own = label[self.start[var] : self.start[var] + self.structure.sizes[var]]
        order = torch.argsort(own, stable=True)
        wanted = torch.zeros(self.total, dtype=torch.bool)
        wanted[units] = True
        return order[wanted[own[order]]].view(len(units), -1)

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
