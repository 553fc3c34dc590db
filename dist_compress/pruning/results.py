"""What was asked, what was given, and why they differ: plain rows for the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dist_compress.pruning.budget import Budget
from dist_compress.pruning.elements import Elements
from dist_compress.pruning.setting import AT_MOST, Setting
from dist_compress.pruning.units import Kept, UnitSet

Row = dict[str, Any]


def groups(
    sets: Sequence[UnitSet],
    removed: Sequence[torch.Tensor],
    budgets: Mapping[str, Budget],
    elements: Elements,
) -> list[Row]:
    """A row {name, unit, asked, given, reason} for each global group, each set of its own, each group of
    elements or blocks."""
    rows = []
    for gid, group in budgets.items():
        if gid == AT_MOST:  # in `limits`
            continue
        mine = [gone.numpy() for s, gone in zip(sets, removed, strict=True) if s.setting.global_group_id == gid]
        total = group.cost([gone & False for gone in mine])
        given = float((total - group.cost(mine)) / total)
        rows.append(_row(f"global_group_id={gid}", group.unit, group.sets[0].setting, given))
    for s, gone in zip(sets, removed, strict=True):
        if s.setting.global_group_id is None:
            given = int(gone.sum()) / s.num_units
            rows.append(_row(" + ".join(s.targets), "channels", s.setting, given))
    for name, tensors in elements.groups.items():
        unit = "elements" if tensors[0].blocks.size == 1 else "blocks"
        rows.append(_row(name, unit, tensors[0].setting, elements.given(tensors)))
    return rows


def _row(name: str, unit: str, setting: Setting, given: float) -> Row:
    asked = _asked(setting)
    reason = "" if asked == given else f"whole {'channels' if unit in ('params', 'macs', 'latency') else unit} only"
    if asked is None:
        reason = f"scores below {setting.sparse_threshold:g}"
    return {"name": name, "unit": unit, "asked": asked, "given": given, "reason": reason}


def _asked(setting: Setting) -> float | None:
    """The ratio asked for; a threshold or a limit of the whole model asks for none."""
    return None if setting.sparse_threshold is not None or setting.limited else float(setting.sparse_ratio)


def limits(removed: Sequence[torch.Tensor], budget: Budget | None) -> list[Row]:
    """A row {unit, asked, before, predicted} for each limit of the whole model, in MACs, parameters or milliseconds."""
    rows = []
    for c in budget.currencies if budget is not None else []:
        before = c.cost.left([gone.numpy() & False for gone in removed])
        left = c.cost.left([gone.numpy() for gone in removed])
        assert c.at_most is not None
        show = float if c.unit == "latency_ms" else math.ceil
        rows.append({"unit": c.unit, "asked": float(c.at_most), "before": show(before), "predicted": show(left)})
    return rows


def asked_but_kept(
    kept: Sequence[Kept],
    settings: Sequence[Setting],
    sets: Sequence[UnitSet],
    removed: Sequence[torch.Tensor],
) -> list[Row]:
    """A row {name, asked, given, reason} for each target of which some channels could not be considered."""
    asked = {setting.name: setting for setting in settings}
    gone: dict[str, int] = {}
    for s, units in zip(sets, removed, strict=True):
        for member in s.scored:
            gone[member.fqn] = gone.get(member.fqn, 0) + member.index[units].numel()
    rows: dict[str, Row] = {}
    for k in kept:
        setting = asked[k.name]
        given = gone.get(setting.parameter, 0) / k.num_channels
        rows.setdefault(k.name, {"name": k.name, "asked": _asked(setting), "given": given, "reason": k.reason})
    return list(rows.values())
