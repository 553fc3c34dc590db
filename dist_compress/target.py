"""What compression acts on, as plain data that any rank can hold: units, their members, and the cost of layers.

A `UnitGroup` is a set of removable units (channels, heads) that several parameters share. It is found once, by
`speedup.coupling` on rank 0, broadcast, and used by the pruner; nothing here touches a model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


def module_of(fqn: str) -> str:
    """The fqn of the module that owns a parameter; for what a parametrization holds, of the layer that has it."""
    owner = fqn.rpartition(".")[0]
    return f".{owner}".partition(".parametrizations.")[0][1:]


@dataclass(frozen=True)
class Member:
    """The slices of one parameter that belong to each unit of a group.

    `index` is int64 [num_units, k]: unit u owns `index[u]` along `dim` of the parameter `fqn`.
    A batch-norm weight has k = 1; a linear layer behind flatten(C, H, W) has k = H * W.
    """

    fqn: str
    dim: int
    index: torch.Tensor
    # "producer": makes the unit; "affine": norm weight and bias on it; "consumer": reads it; "reader": reads it and is
    # masked along, since the unit is not zero for its producers alone (a query head, where heads share one value)
    role: str

    @property
    def module(self) -> str:
        """The fqn of the module that owns the parameter."""
        return module_of(self.fqn)


@dataclass(frozen=True)
class UnitGroup:
    """Units that are kept or removed together everywhere they appear. Same order on every rank."""

    name: str  # fqn of the first producer's module
    num_units: int
    members: tuple[Member, ...]
    blocked: str = ""  # why no unit of this group can be removed; "" when they can

    def producers(self) -> list[str]:
        """fqns of the modules that make the units, in model order."""
        return list(dict.fromkeys(m.module for m in self.members if m.role == "producer"))


@dataclass(frozen=True)
class LayerCost:
    """MACs of one layer as a product of factors, each linear in the units kept.

    macs(kept) = macs * prod_f (fixed_f + sum of weight over kept units of f's groups) / total_f.
    A convolution has one factor for its input and one for its output; a depthwise one has a single factor.
    `factors`: one per dim, each (fixed, [(group index, float64 [num_units] weight per unit), ...]).
    """

    fqn: str
    macs: int
    factors: tuple[tuple[float, tuple[tuple[int, torch.Tensor], ...]], ...] = ()


@dataclass(frozen=True)
class Coupling:
    """All groups of a model with the cost of its layers (per sample). Identical on every rank."""

    groups: tuple[UnitGroup, ...] = ()
    layers: tuple[LayerCost, ...] = field(default=())


@dataclass(frozen=True)
class GroupLatency:
    """Milliseconds of a call of the whole model with `kept[i]` units of one group and all of the others. Measured."""

    name: str  # of the group
    num_units: int
    kept: tuple[int, ...]  # ascending; the last is num_units
    ms: tuple[float, ...]  # never falls


@dataclass(frozen=True)
class Latencies:
    """What was measured, on one device and at one batch size. Identical on every rank."""

    groups: tuple[GroupLatency, ...]  # of each group of which units can go, in the order of the coupling
    together: GroupLatency  # all groups at once, each at the same fraction; `kept` counts the units of all
