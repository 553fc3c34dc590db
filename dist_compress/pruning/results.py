"""What was asked, what was given, and why they differ: plain rows for the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dist_compress.blocks import channel_dim
from dist_compress.config_list import overrides
from dist_compress.layout import Layout
from dist_compress.pruning.budget import Budget
from dist_compress.pruning.elements import Elements
from dist_compress.pruning.setting import AT_MOST, Setting
from dist_compress.pruning.sparsity import share
from dist_compress.pruning.units import Kept, UnitSet

Row = dict[str, Any]


def rows(
    settings: Sequence[Setting], sets: Sequence[UnitSet], removed: Sequence[torch.Tensor], kept: Sequence[Kept],
    budgets: Mapping[str, Budget], elements: Elements, layout: Layout,
) -> dict[str, list[Any]]:  # fmt: skip
    """`groups` [{name, asked, given, reason}] in the currency of each group; `limits` [{unit, asked, before, predicted,
    binding}], what `pruning.at_most` asks of the whole model; `targets` and `kept_channels`, which the report shows;
    `asked_but_kept` [{name, asked, given, reason}], targets left whole; `overrides`, a line for each value of the
    config list that a later one took the place of."""
    units = (settings, sets, removed)
    return {
        "groups": groups(sets, removed, budgets, elements),
        "limits": limits(removed, budgets.get(AT_MOST)),
        "overrides": overrides(list(settings)),
        "targets": targets(*units, kept, elements, layout),
        "kept_channels": kept_channels(*units, layout),
        "asked_but_kept": asked_but_kept(kept, settings, sets, removed),
    }


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
    """A row {unit, asked, before, predicted, binding} for each limit of the whole model, in MACs, parameters or
    milliseconds. `binding`: it would not hold with one unit more; others are met by what this one asks."""
    if budget is None:
        return []
    rows, gone = [], [r.numpy() for r in removed]
    for c, binding in zip(budget.currencies, budget.binding(gone), strict=True):
        assert c.at_most is not None
        show = float if c.unit == "latency_ms" else math.ceil
        before, left = show(c.cost.left([r & False for r in gone])), show(c.cost.left(gone))
        row = {"unit": c.unit, "asked": float(c.at_most), "before": before, "predicted": left}
        rows.append({**row, "binding": binding})
    return rows


def targets(
    settings: Sequence[Setting], sets: Sequence[UnitSet], removed: Sequence[torch.Tensor], kept: Sequence[Kept],
    elements: Elements, layout: Layout,
) -> list[Row]:  # fmt: skip
    """A row {name, unit, num, removed, asked, group, reason} for each target. `asked`: the ratio of its group, or of
    itself; None: a threshold or a limit of the whole model. `reason`: why what is gone is not what was asked."""
    channels = {row["name"]: row["kept"] for row in kept_channels(settings, sets, removed, layout)}
    why = {k.name: k.reason for k in kept}
    coupled = {t: len(s.targets) for s in sets for t in s.targets}
    blocks = {t.setting.name: t for t in elements.tensors()}
    rows = []
    for s in settings:
        if s.align is not None:
            continue
        if s.activation:
            own = [(x, int(gone.sum())) for x, gone in zip(sets, removed, strict=True) if s.name in x.targets]
            unit, num, gone = "units", sum(x.num_units for x, _ in own), sum(gone for _, gone in own)
        elif s.by_units:
            unit, num, gone = "channels", len(channels[s.name]), channels[s.name].count("0")
        elif s.name in blocks:
            tensor = blocks[s.name]
            unit = "weights" if tensor.blocks.size == 1 else "blocks"
            num, gone = tensor.num, elements.num_removed(tensor)
        else:
            continue
        group = "" if s.global_group_id is None else AT_MOST if s.limited else f"global_group_id={s.global_group_id}"
        reason = why.get(s.name, "")
        if not reason and group:
            reason = f"its share of {group}"
        elif not reason and s.sparse_threshold is not None:
            reason = f"scores below {s.sparse_threshold:g}"
        elif not reason and gone != share(s.sparse_ratio) * num:
            reason = f"whole {unit} only"
        if coupled.get(s.name, 1) > 1 and s.name not in why:
            reason = f"{reason}{', ' if reason else ''}coupled with {coupled[s.name] - 1} more"
        row = {"name": s.name, "unit": unit, "num": num, "removed": gone, "asked": _asked(s)}
        rows.append({**row, "group": group, "reason": reason})
    return rows


def kept_channels(
    settings: Sequence[Setting], sets: Sequence[UnitSet], removed: Sequence[torch.Tensor], layout: Layout
) -> list[Row]:
    """A row {name, kept} for each target of channels: a text with 1 for each channel that is kept and 0 else."""
    kept = {}
    for s in settings:
        if s.align is None and s.by_units and not s.activation:
            shape, kind = layout.shape(s.parameter), type(layout.model.get_submodule(s.module)).__name__
            num = shape[channel_dim(kind, len(shape), str(s.granularity))]
            kept[s.parameter] = torch.ones(num, dtype=torch.bool)
    for s, gone in zip(sets, removed, strict=True):
        for member in s.scored:
            if member.fqn in kept:
                kept[member.fqn][member.index[gone].flatten()] = False
    return [
        {"name": s.name, "kept": "".join("01"[int(k)] for k in kept[s.parameter])}
        for s in settings
        if s.align is None and s.by_units and not s.activation
    ]


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
