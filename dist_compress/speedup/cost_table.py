"""What the model costs as a function of the units a group keeps, by really shrinking it: data that pruning can spend.

MACs and parameters follow from the sizes; latency does not (a kernel takes 60 channels in the time of 64), so it is
measured. All variants of all groups take turns, call by call, so that what else the machine does falls on all alike.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_compress.errors import UserError
from dist_compress.speedup.apply import apply
from dist_compress.speedup.capture import Capture, captured
from dist_compress.speedup.cost import latencies, macs, num_params
from dist_compress.speedup.coupling import coupling, masks_of
from dist_compress.speedup.masking import duplicate
from dist_compress.speedup.planning import plan
from dist_compress.target import GroupLatency, Latencies, UnitGroup
from dist_compress.tracing import trace

TOGETHER = "(all groups)"  # the name of the last row of a table
COSTS = ("macs", "params", "activation_bytes", "latency_ms")


@dataclass(frozen=True)
class GroupCost:
    """The cost of the whole model with `kept[i]` units of one group and all of the others. Plain data.

    The last row of a table, `TOGETHER`, is about all groups at once, each at the same fraction; it counts the units of
    all.
    """

    name: str  # of the group
    num_units: int
    kept: list[int]  # ascending; the last is num_units
    macs: list[int]  # of the example as it is
    params: list[int]
    activation_bytes: list[int]  # of all intermediate results of one call, none reused
    latency_ms: list[float]  # median of a call; made monotone: fewer units never count as slower

    def at(self, kept: int, cost: str) -> float:
        """One of macs, params, activation_bytes, latency_ms with `kept` units, linear between the measured counts."""
        if cost not in COSTS:
            raise UserError(f"cost={cost!r} is not in the table; allowed are {', '.join(COSTS)}.")
        values, place = getattr(self, cost), min(max(bisect_left(self.kept, kept), 1), len(self.kept) - 1)
        (low, high), (a, b) = self.kept[place - 1 : place + 1], values[place - 1 : place + 1]
        return float(a + (b - a) * (kept - low) / (high - low))


@dataclass
class _Row:
    """Groups that shrink together, and the counts of kept units at which they were tried."""

    label: str
    name: str
    groups: list[UnitGroup]
    tried: dict[int, list[int]] = field(default_factory=dict)

    def measured(self, counts: dict[str, tuple[int, int, int]], times: Any) -> GroupCost:
        tried = sorted(self.tried)
        labels = [*(f"{self.label} {kept}" for kept in tried), "dense"]
        macs, params, activations = (list(column) for column in zip(*(counts[label] for label in labels), strict=True))
        milliseconds = [times[label][batch]["p50"] for label in labels for batch in times[label]]
        latency = [*accumulate(milliseconds[:-1], max), milliseconds[-1]]
        latency = [min(ms, latency[-1]) for ms in latency]  # the dense model is one and the same in all rows
        num_units = sum(group.num_units for group in self.groups)
        return GroupCost(self.name, num_units, [*tried, num_units], macs, params, activations, latency)


def cost_table(
    model: nn.Module | Capture,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    fractions: Sequence[float] = (0.25, 0.5, 0.75),
    time_s: float = 30.0,
    num_threads: int = 1,
    batch_size: int | None = None,
    norm: str = "keep",
    keep: Iterable[str] = (),
    barrier: Iterable[str] = (),
) -> list[GroupCost]:
    """A `GroupCost` for each group of which units can go, in the order of `coupling`, and one for all. Rank 0 only.

    Each group is shrunk by itself to these fractions of its units (at least one), then all of them together. Latency is
    measured on the device of the example, at `batch_size` (None: that of the example), `time_s` seconds in all. The
    model is left as it was. `norm`, `keep`, `barrier` as in `capture`.
    """
    if not fractions or not all(0 < fraction < 1 for fraction in fractions):
        raise UserError(f"fractions={fractions!r} must be numbers in (0, 1), such as (0.25, 0.5, 0.75).")
    given = captured(model, args, kwargs, {"norm": norm, "keep": tuple(keep), "barrier": tuple(barrier)})
    counts: dict[str, tuple[int, int, int]] = {}
    variants: dict[str, nn.Module] = {}

    def add(label: str, variant: nn.Module) -> None:
        variants[label] = variant
        inputs = (given.args, given.kwargs)
        counts[label] = (macs(variant, *inputs), num_params(variant), _activation_bytes(variant, *inputs))

    add("dense", duplicate(given.model))
    groups = [group for group in coupling(given).groups if not group.blocked and group.num_units > 1]
    if not groups:
        return []
    rows = [_Row(f"{i} {group.name}", group.name, [group]) for i, group in enumerate(groups)]  # names may repeat
    rows.append(_Row(TOGETHER, TOGETHER, groups))
    for row in rows:
        for fraction in fractions:
            kept = [min(max(1, round(fraction * g.num_units)), g.num_units - 1) for g in row.groups]
            if row.tried.setdefault(sum(kept), kept) is kept:
                add(f"{row.label} {sum(kept)}", _with(given, row.groups, kept))
    times = latencies(variants, given.args, given.kwargs, (batch_size or _batch(given),), time_s, num_threads)
    return [row.measured(counts, times) for row in rows]


def save(table: Sequence[GroupCost], path: str | Path) -> None:
    """Write a table as JSON. Rank 0 only."""
    Path(path).write_text(json.dumps([asdict(row) for row in table], indent=1) + "\n", encoding="utf-8")


def load(path: str | Path) -> list[GroupCost]:
    """Read what `save` wrote. Raises UserError."""
    try:
        return [GroupCost(**row) for row in json.loads(Path(path).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: is no cost table: {error}. Write one with cost_table and save.") from None


def as_latencies(table: Sequence[GroupCost], path: str | Path = "") -> Latencies:
    """The part of a table that pruning spends. Local. Raises UserError when it lacks the row of all groups."""
    rows = [GroupLatency(row.name, row.num_units, tuple(row.kept), tuple(row.latency_ms)) for row in table]
    if not rows or rows[-1].name != TOGETHER:
        raise UserError(
            f"{path or 'cost table'}: has no groups, or no last row {TOGETHER!r}. Nothing can be removed from that "
            "model, or the file was not written by cost_table of this version; measure it anew."
        )
    return Latencies(tuple(rows[:-1]), rows[-1])


def _with(given: Capture, groups: Sequence[UnitGroup], kept: Sequence[int]) -> nn.Module:
    gone = [(group, torch.arange(left, group.num_units)) for group, left in zip(groups, kept, strict=True)]
    return apply(duplicate(given.model), plan(given, masks=masks_of(given.model, gone)))


def _batch(given: Capture) -> int:
    return given.trace.info(given.trace.inputs[0]).shape[0]


def _activation_bytes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    infos = [info for info in trace(model, args, kwargs).tensors.values() if info.kind == "value" and info.dependent]
    return sum(torch.Size(info.shape).numel() * info.dtype.itemsize for info in infos)
