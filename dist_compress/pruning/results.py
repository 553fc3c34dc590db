"""What was asked, what was given, and why they differ: plain rows for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dist_compress.pruning.config_list import Setting
from dist_compress.pruning.elements import Elements
from dist_compress.pruning.sparsity import Budget
from dist_compress.pruning.units import Kept, UnitSet

Row = dict[str, Any]


def groups(
    sets: Sequence[UnitSet],
    removed: Sequence[torch.Tensor],
    budgets: Mapping[str, Budget],
    elements: Elements,
) -> list[Row]:
    """A row {name, unit, asked, given, reason} for each global group, each set of its own, each group of
    elements."""
    rows = []
    for gid, group in budgets.items():
        mine = [gone.numpy() for s, gone in zip(sets, removed, strict=True) if s.setting.global_group_id == gid]
        total = group.cost([gone & False for gone in mine])
        given = float((total - group.cost(mine)) / total)
        rows.append(_row(f"global_group_id={gid}", group.unit, group.sets[0].setting.sparse_ratio, given))
    for s, gone in zip(sets, removed, strict=True):
        if s.setting.global_group_id is None:
            given = int(gone.sum()) / s.num_units
            rows.append(_row(" + ".join(s.targets), "channels", s.setting.sparse_ratio, given))
    for name, tensors in elements.groups.items():
        rows.append(_row(name, "elements", tensors[0].setting.sparse_ratio, elements.given(tensors)))
    return rows


def _row(name: str, unit: str, asked: float, given: float) -> Row:
    reason = "" if asked == given else f"whole {unit if unit in ('channels', 'elements') else 'channels'} only"
    return {"name": name, "unit": unit, "asked": asked, "given": given, "reason": reason}


def asked_but_kept(
    kept: Sequence[Kept],
    settings: Sequence[Setting],
    sets: Sequence[UnitSet],
    removed: Sequence[torch.Tensor],
) -> list[Row]:
    """A row {name, asked, given, reason} for each target of which some channels could not be considered."""
    asked = {setting.module: setting.sparse_ratio for setting in settings}
    gone: dict[str, int] = {}
    for s, units in zip(sets, removed, strict=True):
        for member in s.scored:
            gone[member.module] = gone.get(member.module, 0) + member.index[units].numel()
    rows: dict[str, Row] = {}
    for k in kept:
        row = {"name": k.module, "asked": asked[k.module], "given": gone.get(k.module, 0) / k.num_channels}
        rows.setdefault(k.module, {**row, "reason": k.reason})
    return list(rows.values())
