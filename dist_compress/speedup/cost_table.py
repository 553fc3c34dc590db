"""What the model costs as a function of the units a group keeps, by really shrinking it: data that pruning can spend.

MACs and parameters follow from the sizes; latency does not (a kernel takes 60 channels in the time of 64), so it is
measured. All variants of all groups take turns, call by call, so that what else the machine does falls on all alike.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
from dist_compress.target import UnitGroup
from dist_compress.tracing import trace

COSTS = ("macs", "params", "activation_bytes", "latency_ms")


@dataclass(frozen=True)
class GroupCost:
    """The cost of the whole model with `kept[i]` units of one group and all of the others. Plain data."""

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


def cost_table(
    model: nn.Module | Capture,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    fractions: Sequence[float] = (0.25, 0.5, 0.75),
    time_s: float = 30.0,
    num_threads: int = 1,
    norm: str = "keep",
) -> list[GroupCost]:
    """A `GroupCost` for each group of which units can go, in the order of `coupling`. Rank 0 only.

    Each group is shrunk by itself to these fractions of its units (at least one). Latency is measured on the device and
    with the batch of the example, `time_s` seconds in all. The model is left as it was.
    """
    if not fractions or not all(0 < fraction < 1 for fraction in fractions):
        raise UserError(f"fractions={fractions!r} must be numbers in (0, 1), such as (0.25, 0.5, 0.75).")
    given = captured(model, args, kwargs, {"norm": norm})
    counts: dict[str, tuple[int, int, int]] = {}
    variants: dict[str, nn.Module] = {}

    def add(label: str, variant: nn.Module) -> None:
        variants[label] = variant
        inputs = (given.args, given.kwargs)
        counts[label] = (macs(variant, *inputs), num_params(variant), _activation_bytes(variant, *inputs))

    add("dense", duplicate(given.model))
    groups = [group for group in coupling(given).groups if not group.blocked and group.num_units > 1]
    tried = {group.name: sorted({max(1, round(f * group.num_units)) for f in fractions}) for group in groups}
    for group in groups:
        for kept in tried[group.name]:
            add(f"{group.name} {kept}", _with(given, group, kept))
    times = latencies(variants, given.args, given.kwargs, (_batch(given),), time_s, num_threads)
    return [_row(group, tried[group.name], counts, times) for group in groups]


def save(table: Sequence[GroupCost], path: str | Path) -> None:
    """Write a table as JSON. Rank 0 only."""
    Path(path).write_text(json.dumps([asdict(row) for row in table], indent=1) + "\n", encoding="utf-8")


def load(path: str | Path) -> list[GroupCost]:
    """Read what `save` wrote."""
    return [GroupCost(**row) for row in json.loads(Path(path).read_text(encoding="utf-8"))]


def _with(given: Capture, group: UnitGroup, kept: int) -> nn.Module:
    masks = masks_of(given.model, [(group, torch.arange(kept, group.num_units))])
    return apply(duplicate(given.model), plan(given, masks=masks))


def _batch(given: Capture) -> int:
    return given.trace.info(given.trace.inputs[0]).shape[0]


def _activation_bytes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    infos = [info for info in trace(model, args, kwargs).tensors.values() if info.kind == "value" and info.dependent]
    return sum(torch.Size(info.shape).numel() * info.dtype.itemsize for info in infos)


def _row(group: UnitGroup, tried: list[int], counts: dict[str, tuple[int, int, int]], times: Any) -> GroupCost:
    labels = [*(f"{group.name} {kept}" for kept in tried), "dense"]
    macs, params, activations = (list(column) for column in zip(*(counts[label] for label in labels), strict=True))
    milliseconds = [times[label][batch]["p50"] for label in labels for batch in times[label]]
    latency = list(accumulate(milliseconds, max))
    return GroupCost(group.name, group.num_units, [*tried, group.num_units], macs, params, activations, latency)
