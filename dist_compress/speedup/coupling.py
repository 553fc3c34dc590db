"""Which slices of which parameters make one removable unit, by the same constraints as the plan.

The groups of units come from the constraints alone. Then random units of every group count as masked and are planned
for: what does not vanish is blocked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dist_compress.speedup.capture import Capture, captured
from dist_compress.speedup.masking import Masks, masked
from dist_compress.speedup.origin import behind, makers
from dist_compress.speedup.plan import Plan
from dist_compress.speedup.planning import outline, solve
from dist_compress.speedup.propagation import propagate
from dist_compress.speedup.structure import Structure
from dist_compress.speedup.units import groups_of
from dist_compress.target import Coupling, LayerCost, Member, UnitGroup, module_of
from dist_compress.tracing import ModuleCall, Ref, Trace
from dist_compress.tracing.walk import modules_of, parameters_of

Groups = list[tuple[UnitGroup, dict[int, torch.Tensor]]]

_NOT_ZERO = ("merges or splits dims", "is not zero after")  # reasons that masking more may take away
_HOLDS_SIZE = "holds this size"  # or read it from values


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

    Zeroing the slices of any units of a group that is not blocked, all but those of consumers, makes `plan` remove
    exactly these units. `args`, `kwargs`: an example input whose first tensor has the batch in dim 0. A `Capture` holds
    model, input and settings, and serves `plan` after it. `norm`, `keep`, `barrier` as in `capture`.
    """
    given = captured(model, args, kwargs, {"norm": norm, "keep": tuple(keep), "barrier": tuple(barrier)})
    s = given.structure
    groups = _check(given, groups_of(s, _roles(s)))
    return Coupling(tuple(group for group, _ in groups), tuple(_costs(s, groups)))


def _roles(s: Structure) -> list[tuple[str, int, int, str]]:
    """(param fqn, dim, variable, role) in tape order; tied parameters by their first name."""
    made_by = makers(s.trace)
    found: dict[tuple[str, int], tuple[str, int, int, str]] = {}
    for (key, dim), role in s.roles.items():
        ref, dims = behind(s.trace, made_by, Ref(key), repeated=True)
        own = dims[dim] if ref is not None else None
        if ref is None or own is None:
            continue
        info, var = s.trace.info(ref), s.dims(ref)[own]
        known = found.get((info.fqn, own))
        if known is None or role == "producer" and known[3] != "normalised":
            found[(info.fqn, own)] = (info.fqn, own, var, role)
    return [(fqn, dim, var, "consumer" if role == "normalised" else role) for fqn, dim, var, role in found.values()]


def _check(given: Capture, groups: Groups) -> Groups:
    """Groups of which units stay when they are masked are blocked, or masked at what reads them too.

    A query head whose value other heads share is not silent while the output projection reads it.
    """
    checked = _tried(given, groups, range(len(groups)))
    loud = [
        i
        for i, ((before, _), (after, _)) in enumerate(zip(groups, checked, strict=True))
        if not before.blocked and any(why in after.blocked for why in _NOT_ZERO)
    ]
    if loud:
        silenced = list(checked)
        for i in loud:
            group, where = groups[i]
            members = tuple(replace(m, role="reader") if m.role == "consumer" else m for m in group.members)
            silenced[i] = (replace(group, members=members), where)
        for i, found in enumerate(_tried(given, silenced, loud)):
            if not found[0].blocked:
                checked[i] = found
    return checked


def _tried(given: Capture, groups: Groups, which: Iterable[int]) -> Groups:
    """Mask 30 % of the units of some groups, as data, and plan; groups of which one does not vanish become blocked."""
    generator = torch.Generator().manual_seed(0)
    removed: dict[int, torch.Tensor] = {}
    for i in which:
        group, where = groups[i]
        step = max(_step(given, var, positions) for var, positions in where.items())
        if not group.blocked and group.num_units > step:
            count = max(1, round(0.3 * group.num_units))
            count = max(step, count // step * step) if step > 1 else count
            removed[i] = torch.randperm(group.num_units, generator=generator)[:count]
    if not removed:
        return groups
    masks = masks_of(given.model, [(groups[i][0], units) for i, units in removed.items()])
    made = None if _sizes_depend_on_values(given.trace) else _planned(given, masks)
    if made is None or any(_HOLDS_SIZE in b.reason for b in made.blocked):
        pruned = masked(given.model, masks)
        structure = given.structure_of(pruned)
        if made is None or _sizes(structure.trace) != _sizes(given.trace):  # python read the sizes from values
            made = solve(given, pruned, structure, propagate(structure.trace))
    checked, kept = list(groups), _kept(made)
    for i, units in removed.items():
        group, where = groups[i]
        failed = _first_left(group, units, kept)
        if failed is not None:
            why = [b.reason for b in made.blocked if b.fqn == failed.fqn and b.dim == failed.dim]
            text = why[0] if why else f"{failed.fqn} keeps them along dim {failed.dim}"
            checked[i] = (replace(group, blocked=text), where)
    return checked


def _planned(given: Capture, masks: Masks) -> Plan:
    """The plan for masks, without a run of the masked model, nor of a shrunk one, where that is not needed."""
    s = given.structure
    facts = propagate(given.trace, masks, lambda: given.values_of(masked(given.model, masks)), stays=s.stays)
    if given.holds_no_size:
        return outline(s, facts, given.model)
    return solve(given, given.model, s, facts)


def _sizes(trace: Trace) -> list[tuple[int, ...]]:
    """What the ops of a run made, by shape: another run that differs has run another program."""
    return [trace.info(ref).shape for op in trace.tape for ref in op.outputs if ref is not None]


def _step(given: Capture, var: int, positions: torch.Tensor) -> int:
    """How many units go together for the sake of a kernel that wants a multiple, if the full size is one."""
    multiple = given.structure.multiples.get(given.structure.find(var), 1)
    return multiple // math.gcd(multiple, positions.size(1))


def _sizes_depend_on_values(trace: Trace) -> bool:
    """Whether an op made as much as it found in its inputs: detections, tokens of an expert."""
    for op in trace.tape:
        if op.name == "nms":
            return True
        if not isinstance(op.target, ModuleCall) and torch.Tag.dynamic_output_shape in op.target.tags:
            indices = op.inputs[1:] if op.name == "index" else op.inputs
            if op.name != "index" or any(trace.info(ref).dtype in (torch.bool, torch.uint8) for ref in indices):
                return True
    return False


def masks_of(model: nn.Module, chosen: list[tuple[UnitGroup, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """{parameter fqn: False at the slices of the units that are not only consumers}."""
    masks: dict[str, torch.Tensor] = {}
    parameters = parameters_of(modules_of(model))
    for group, units in chosen:
        vectors: dict[tuple[int, int], torch.Tensor] = {}  # members on one variable share their index
        for member in group.members:
            if member.role != "consumer":
                shape = parameters[member.fqn].shape
                key = id(member.index), shape[member.dim]
                if key not in vectors:
                    gone = member.index[units].flatten()
                    vectors[key] = torch.ones(key[1], dtype=torch.bool).index_fill_(0, gone, False)
                vector = vectors[key].view([-1 if d == member.dim else 1 for d in range(len(shape))])
                masks[member.fqn] = masks[member.fqn] & vector if member.fqn in masks else vector
    return masks


def mask_units(model: nn.Module, group: UnitGroup, units: torch.Tensor) -> None:
    """Zero the producer, affine and reader slices of `units` of a group, in place. Local."""
    with torch.no_grad():
        for member in group.members:
            if member.role != "consumer":
                parameter = model.get_parameter(member.fqn)
                parameter.index_fill_(member.dim, member.index[units].flatten().to(parameter.device), 0.0)


def _kept(made: Plan) -> dict[tuple[str, int], torch.Tensor]:
    """{(parameter fqn, dim that shrinks): bool, whether a position is kept}."""
    found: dict[tuple[str, int], torch.Tensor] = {}
    known: dict[int, torch.Tensor] = {}  # the dims of one variable share their index
    for fqn, dims in made.keep.items():
        for dim, index in dims.items():
            if id(index) not in known:
                known[id(index)] = torch.zeros(made.shapes[fqn][dim], dtype=torch.bool).index_fill_(0, index, True)
            found[fqn, dim] = known[id(index)]
    return found


def _first_left(group: UnitGroup, units: torch.Tensor, kept: dict[tuple[str, int], torch.Tensor]) -> Member | None:
    """The first member that keeps a slice of `units`."""
    gone: set[tuple[int, int]] = set()  # pairs that were looked at: members on one variable share both
    for member in group.members:
        positions = kept.get((member.fqn, member.dim))
        pair = id(positions), id(member.index)
        if positions is None or (pair not in gone and bool(positions[member.index[units]].any())):
            return member
        gone.add(pair)
    return None


def _costs(s: Structure, groups: list[tuple[UnitGroup, dict[int, torch.Tensor]]]) -> list[LayerCost]:
    """MACs per sample of every contraction, in tape order."""
    made_by = makers(s.trace)
    batch = s.trace.info(s.trace.inputs[0]).shape[0]
    costs = []
    for c in s.contractions:
        weight, _ = behind(s.trace, made_by, c.b)
        owner = module_of(s.trace.info(weight).fqn if weight is not None else f"{c.op.module}.")
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
