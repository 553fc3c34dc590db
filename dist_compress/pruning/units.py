"""From targets to sets of units: what is decided together, what scores it, what is zeroed with it.

With `dependency_group_id: auto` the sets are those of the trace: a set of coupled channels can go only
when everything that makes them is a target, and it then goes everywhere, from the producers' rows and
biases and from the norm's affine (a pruned unit is zero behind its norm). Depthwise convolutions pass
channels on, so they follow. With an id of the user's own the members share one mask by index; with none a
module stands alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dist_compress.blocks import channel_dim
from dist_compress.errors import UserError
from dist_compress.pruning.setting import Setting, check_agree
from dist_compress.target import Coupling, Member, UnitGroup

_AGREE = (
    "sparse_threshold",
    "sparse_ratio",
    "min_sparse_ratio",
    "max_sparse_ratio",
    "global_group_id",
    "granularity",
    "method",
    "options",
)


@dataclass(frozen=True)
class UnitSet:
    """Units that one decision removes one by one, in model order; the same on every rank."""

    name: str
    num_units: int
    members: tuple[Member, ...]  # everything that is smaller without a unit
    scored: tuple[Member, ...]  # weights of the targets
    masked: tuple[Member, ...]  # all that is zero once a unit is gone
    gates: tuple[Member, ...]  # parameters whose gradient times value, summed, is dL/dgate
    targets: tuple[str, ...]
    setting: Setting
    coupled: int | None  # index of the coupling's group; None: a set of the user's, not removable as a whole
    num_parts: int = 1  # equal contiguous parts of the units, such as heads, in each of which the ratio holds
    activations: tuple[Member, ...] = ()  # targets; such a set has no parameters


@dataclass(frozen=True)
class Kept:
    """A target that was asked for, but of which no or not all channels can be considered."""

    name: str  # of the target
    reason: str
    num_channels: int  # of the target, in all


def scales(units: UnitSet) -> tuple[Member, ...]:
    """The weights of the norms behind the units."""
    return tuple(m for m in units.masked if m.role == "affine" and m.fqn.endswith("weight"))


def collect(
    settings: list[Setting], coupling: Coupling, model: nn.Module, activations: Mapping[str, Member]
) -> tuple[list[UnitSet], list[Kept]]:
    """The unit sets of all targets by units, and the targets that cannot be pruned. `activations`: the units of those
    that are targets, by path. Raises UserError."""
    alone = {s.parameter: s for s in settings if not s.align}  # these follow nobody
    targets = {name: s for name, s in alone.items() if s.by_units}
    sets, kept = [], []
    for role, granularity in (("producer", "out_channel"), ("consumer", "in_channel")):
        coupled = {
            name: s for name, s in targets.items() if s.granularity == granularity and s.dependency_group_id == "auto"
        }
        for index, group in enumerate(coupling.groups):
            found = _coupled_set(index, group, role, coupled, model)
            if isinstance(found, UnitSet):
                _check_followers(found, alone, model)
                sets.append(found)
            else:
                kept.extend(found)
        seen = {name for s in sets for name in s.targets} | {k.name for k in kept}
        unseen = "the trace shows no channels of it that could be removed"
        kept += [Kept(s.name, unseen, num_channels(model, s)) for s in coupled.values() if s.name not in seen]
    _check_ends(sets)
    own: dict[str, list[Setting]] = {}
    for name, setting in targets.items():
        if setting.dependency_group_id != "auto":
            own.setdefault(setting.dependency_group_id or f"\0{name}", []).append(setting)
    sets += [_own_set(members, coupling, model, alone, activations) for members in own.values()]
    order = {setting.name: i for i, setting in enumerate(settings)}
    sets.sort(key=lambda s: min(order[name] for name in s.targets))
    kept.sort(key=lambda k: order[k.name])
    return sets, kept


def _check_ends(sets: Sequence[UnitSet]) -> None:
    """Coupled channels that are asked for where they are made and where they are read would lose both shares."""
    first: dict[int | None, UnitSet] = {}
    for s in sets:
        other = first.setdefault(s.coupled, s)
        if other is not s:
            raise UserError(
                f"{other.targets[0]} ({other.setting.said_by('granularity')}) and {s.targets[0]} "
                f"({s.setting.said_by('granularity')}) are the two ends of the same channels, which are decided once. "
                "Leave one of them out, or set dependency_group_id: null for the one that reads them."
            )


def _coupled_set(
    index: int, group: UnitGroup, role: str, targets: dict[str, Setting], model: nn.Module
) -> UnitSet | list[Kept]:
    """The set of a group of the trace, or why its targets are kept (nothing when it has none)."""
    own = [m for m in group.members if m.role == role or (role == "consumer" and m.role == "reader")]
    makers = list(dict.fromkeys(m.fqn for m in own))
    chosen = [targets[name] for name in makers if name in targets]
    if not chosen:
        return []
    for setting in chosen[1:]:
        check_agree(chosen[0], setting, _AGREE, "dependency_group_id")
    modules = {setting.module for setting in chosen}
    missing = [
        name if name.rpartition(".")[0] in modules else name.rpartition(".")[0]
        for name in makers
        if name not in targets and not _follows(model, group, role, name, modules)
    ]
    if group.blocked or missing:
        reason = group.blocked or f"coupled with {', '.join(dict.fromkeys(missing))}, which is not a target"
        return [Kept(setting.name, reason, num_channels(model, setting)) for setting in chosen]
    scored = tuple(m for m in own if m.fqn in targets)
    masked = tuple(m for m in group.members if m.role in ("producer", "affine", "reader", role))
    names = tuple(setting.name for setting in chosen)
    parts = _num_parts(chosen, group.num_units)
    gates = _gates(group)
    return UnitSet(group.name, group.num_units, group.members, scored, masked, gates, names, chosen[0], index, parts)


def _check_followers(unit_set: UnitSet, alone: dict[str, Setting], model: nn.Module) -> None:
    """A vector that goes with the units of the trace, such as a bias, cannot have a mask of its own."""
    for member in unit_set.masked:
        own = alone.get(member.fqn)
        if own is not None and model.get_parameter(member.fqn).dim() == 1:
            said = own.said_by("sparse_ratio" if own.sparse_threshold is None else "sparse_threshold")
            raise UserError(
                f"{own.name}: {said} asks for a mask of its own, but it goes along with the channels of "
                f"{unit_set.targets[0]} ({unit_set.setting.said_by('dependency_group_id')}). Set dependency_group_id: "
                f"null for {unit_set.targets[0]}, or leave {own.name} out."
            )


def _own_set(
    members: list[Setting],
    coupling: Coupling,
    model: nn.Module,
    alone: dict[str, Setting],
    activations: Mapping[str, Member],
) -> UnitSet:
    """Targets that share a mask because the user says so, or one that stands alone."""
    head = members[0]
    scored: list[Member] = []
    masked: list[Member] = []
    gates: list[Member] = []
    for setting in members:
        check_agree(head, setting, _AGREE, "dependency_group_id")
        weight = activations.get(setting.path) or _own_member(model, setting)
        if len(weight.index) != len((scored or [weight])[0].index):
            raise UserError(
                f"dependency_group_id={head.dependency_group_id!r}: {head.name} has {len(scored[0].index)} units and "
                f"{setting.name} has {len(weight.index)} ({setting.said_by('dependency_group_id')}). Members share one "
                "mask, so their sizes must be equal."
            )
        scored.append(weight)
        if setting.activation:
            continue
        masked.append(weight)
        if setting.granularity == "in_channel" or setting.target != "weight":
            gates.append(weight)
            continue
        bias = [Member(f"{setting.module}.bias", 0, weight.index, "producer")]
        bias = bias if getattr(model.get_submodule(setting.module), "bias", None) is not None else []
        norm = following_norm(setting.module, weight.index, coupling)
        masked += [m for m in bias + norm if m.fqn not in alone]
        gates += norm or [weight, *bias]
    names = tuple(s.name for s in members)
    name = head.name if len(members) == 1 else str(head.dependency_group_id)
    num = len(scored[0].index)
    shared = tuple(masked)
    if head.activation:
        parts = _num_parts(members, num)
        return UnitSet(name, num, (), (), (), (), names, head, None, parts, tuple(scored))
    return UnitSet(
        name, num, shared, tuple(scored), shared, tuple(gates), names, head, None, _num_parts(members, num)
    )  # fmt: skip


def _num_parts(members: list[Setting], num_units: int) -> int:
    """Least common multiple of what the members ask for. Raises UserError unless the units can be cut so, with
    something left to choose in each part."""
    parts = math.lcm(*(s.internal_metric_block for s in members))
    asked = [s.said_by("internal_metric_block") for s in members if s.internal_metric_block > 1]
    said = " and ".join(dict.fromkeys(asked))
    if num_units % parts:
        raise UserError(
            f"{', '.join(s.name for s in members)}: {said}: {num_units} units cannot be cut into {parts} equal parts."
        )
    if 1 < parts == num_units:
        raise UserError(
            f"{', '.join(s.name for s in members)}: {said}: there are {num_units} units, so that each part is a single "
            "one and nothing could go. If these are heads that go as a whole, leave it out."
        )
    return parts


def _dim(model: nn.Module, setting: Setting) -> int:
    """The dimension of the parameter that `granularity` is about."""
    kind = type(model.get_submodule(setting.module)).__name__
    return channel_dim(kind, model.get_parameter(setting.parameter).dim(), str(setting.granularity))


def num_channels(model: nn.Module, setting: Setting) -> int:
    return model.get_parameter(setting.parameter).shape[_dim(model, setting)]


def _own_member(model: nn.Module, setting: Setting) -> Member:
    """A parameter on its own, a unit for each index of its channel dimension."""
    module = model.get_submodule(setting.module)
    kind = type(module).__name__
    if kind.startswith("ConvTranspose") and getattr(module, "groups", 1) > 1 and setting.target == "weight":
        raise UserError(
            f"{setting.name}: {setting.said_by('granularity')} with "
            f"{setting.said_by('dependency_group_id')} "
            f"is not defined for a {kind} with groups. Use dependency_group_id: auto."
        )
    role = "consumer" if setting.granularity == "in_channel" else "producer"
    index = torch.arange(num_channels(model, setting))[:, None]
    return Member(setting.parameter, _dim(model, setting), index, role)


def following_norm(module: str, rows: torch.Tensor, coupling: Coupling) -> list[Member]:
    """The affine of the norm behind a module, by its output rows int64 [n, 1]; none unless it covers each
    row once."""
    found: dict[tuple[str, int], dict[int, int]] = {}
    for group in coupling.groups:
        after = affine_after(group).get(module, [])
        weight = next((m for m in group.members if m.module == module and m.role == "producer"), None)
        for affine in after:
            if weight is not None and weight.index.shape == affine.index.shape:
                pairs = zip(weight.index.flatten().tolist(), affine.index.flatten().tolist(), strict=True)
                found.setdefault((affine.fqn, affine.dim), {}).update(pairs)
    wanted = rows.flatten().tolist()
    return [
        Member(fqn, dim, torch.tensor([[index[row]] for row in wanted]), "affine")
        for (fqn, dim), index in found.items()
        if all(row in index for row in wanted)
    ]


def affine_after(group: UnitGroup) -> dict[str, list[Member]]:
    """Affine members by the producer they follow: members come in the order in which the model runs them."""
    after: dict[str, list[Member]] = {}
    producer = ""
    for member in group.members:
        if member.role == "producer":
            producer = member.module
        elif member.role == "affine":
            after.setdefault(producer, []).append(member)
    return after


def _gates(group: UnitGroup) -> tuple[Member, ...]:
    """Every affine, and weight and bias of the producers that no norm follows directly.

    (Were such a producer followed by a norm after all, its sum(w * dL/dw) would be zero and do no harm.)
    """
    followed = affine_after(group)
    return tuple(m for m in group.members if m.role == "affine" or (m.role == "producer" and m.module not in followed))


def _follows(model: nn.Module, group: UnitGroup, role: str, name: str, targeted: set[str]) -> bool:
    """Whether a parameter goes with the units, one by one: that of a depthwise convolution, a vector that is added to
    them, the bias of a target, or one of the model itself (a table of positions), which no entry can name."""
    if "." not in name:
        return True
    if model.get_parameter(name).dim() == 1 and name.rpartition(".")[0] in targeted:
        return True
    module: Any = model.get_submodule(name.rpartition(".")[0])
    if getattr(module, "groups", 1) > 1 and module.groups == getattr(module, "in_channels", 0):
        return True
    return all(
        model.get_parameter(m.fqn).numel() == m.index.numel() for m in group.members if m.fqn == name and m.role == role
    )
