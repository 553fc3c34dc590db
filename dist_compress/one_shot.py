"""Prune any model in memory with one call, for notebooks and benchmarks: no configuration, no data, no training.

The decision is that of a run (`pruning.config_list`, units of the trace, selection); the loop around it is missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from dist_compress import comm, cost_file
from dist_compress.config import Config, PruningConfig, ScheduleConfig, SpeedupConfig, merge
from dist_compress.errors import UserError
from dist_compress.method import Context
from dist_compress.projection import Projection
from dist_compress.pruning import Pruner
from dist_compress.pruning.config_list import resolve
from dist_compress.pruning.metric import metric_class
from dist_compress.sites import Sites
from dist_compress.speedup import Report, capture, coupling, speedup
from dist_compress.speedup.whole import timed
from dist_compress.target import Coupling


@dataclass(repr=False)
class PruneReport(Report):
    """What `prune` did. `targets` and `kept_targets` hold a row {name, asked, given, reason} each, ratios removed."""

    targets: list[dict[str, Any]] = field(default_factory=list)  # each group of units or weights that was decided on
    kept_targets: list[dict[str, Any]] = field(default_factory=list)  # of which not all could be considered
    limits: list[dict[str, Any]] = field(default_factory=list)  # what each at_most led to: see results.limits
    masks: dict[str, torch.Tensor] = field(default_factory=dict)  # {parameter: bool, True = keep, broadcastable}

    def lines(self) -> Iterator[tuple[str, str]]:
        yield from super().lines()
        for row in self.targets:
            yield "pruned", f"{row['name']}: {_ratios(row)}"
        for row in self.limits:
            binding = " (binding)" if row["binding"] else ""
            change = f"{row['before']:.10g} -> {row['predicted']:.10g}"
            yield "at most", f"{row['asked']:.10g} {row['unit']}: {change}{binding}"
        for row in self.kept_targets:
            yield "not pruned", f"{row['name']}: {row['reason']}"


def prune(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    config_list: Sequence[Mapping[str, Any]] = (),
    method: str = "l1_norm",
    *,
    options: Mapping[str, Any] | None = None,
    compute: str = "channels",
    at_most: Mapping[str, float] | None = None,
    latency: Mapping[str, Any] | None = None,
    round_to: int = 1,
    norm: str = "keep",
    keep: Iterable[str] = (),
    barrier: Iterable[str] = (),
    tolerance: float = 1e-5,
) -> tuple[nn.Module, PruneReport]:
    """(a smaller copy of `model`, a report): trace, couple, score, mask, plan, apply and verify, in one process.

    `config_list`: entries as in `pruning.config_list` of a run (docs/pruning.md), such as
    [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]. `method`, `options`, `compute`, `at_most` ({"macs": 20e6}),
    `latency` as in `pruning`; the method has to score weights as they are. `round_to`, `norm`, `keep`, `barrier`,
    `tolerance` as in `speedup.speedup`. `model` stays as it was, whatever happens. Raises UserError, also where masked
    and shrunk model differ.
    """
    if comm.world_size() > 1:
        raise UserError("prune works in one process; prune on rank 0 and hand on report.plan, or start a run.")
    config = Config(
        pruning=_pruning(config_list, method, options or {}, compute, at_most or {}, latency or {}),
        speedup=SpeedupConfig(norm=norm, round_to=round_to, keep=list(keep), barrier=list(barrier)),
    )
    seconds: dict[str, float] = {}
    with timed(seconds, "capture"):
        own = config.speedup
        given = capture(model, args, dict(kwargs or {}), norm=norm, keep=own.keep, barrier=own.barrier)
        given.structure  # noqa: B018 - made at first use
    with timed(seconds, "couple"):
        groups = coupling(given)
    with timed(seconds, "score"):
        pruner = _decided(config, given.model, groups, (args, dict(kwargs or {})))
        masks = {name: mask for name, mask in pruner.masks().items() if not bool(mask.all())}
    small, report = speedup(given, masks=masks, round_to=round_to, tolerance=tolerance)
    results = pruner.results()
    report.seconds = seconds | report.seconds
    found = {f.name: getattr(report, f.name) for f in fields(report)}
    told = {"targets": results["groups"], "kept_targets": results["asked_but_kept"], "limits": results["limits"]}
    return small, PruneReport(**found, **told, masks=masks)


def _pruning(
    config_list: Sequence[Mapping[str, Any]], method: str, options: Mapping[str, Any], compute: str,
    at_most: Mapping[str, float], latency: Mapping[str, Any],
) -> PruningConfig:  # fmt: skip
    entries = [dict(entry) if isinstance(entry, Mapping) else entry for entry in config_list]
    values = {"config_list": entries, "method": method, "options": dict(options), "compute": compute,
              "at_most": dict(at_most), "latency": dict(latency)}  # fmt: skip
    if compute not in ("channels", "params", "macs", "latency"):
        raise UserError(f"prune: compute={compute!r} is not known; allowed are channels, params, macs, latency.")
    config = merge(PruningConfig, values, "pruning")
    config.schedule = ScheduleConfig(name="one_shot", start=0, end=0, num_decisions=1)
    return config


def _decided(config: Config, model: nn.Module, groups: Coupling, example: tuple[Any, dict[str, Any]]) -> Pruner:
    """The pruner of a run that takes its only decision before the first step."""
    for setting in resolve(config.pruning, model, Sites(model, *example)):
        if setting.activation:
            raise UserError(
                f"prune: {setting.name} is an activation, whose mask needs data and acts in the model. Start a run."
            )
        if not setting.align and metric_class(setting.method, "pruning").data_driven:
            raise UserError(
                f"prune: {setting.said_by('method')} of {setting.name} scores by gradients or outputs of data. "
                "Use a method that scores weights, such as l1_norm or l2_norm, or start a run."
            )
    pruner = Pruner(config)
    table = cost_file.latencies(config, lambda measure: measure(model, example))
    context = Context(config, model, Projection(model), groups, 1, total_steps=0, steps_per_epoch=1.0, latencies=table)
    pruner.attach(context)
    pruner.decide(0)
    return pruner


def _ratios(row: Mapping[str, Any]) -> str:
    asked = "no ratio" if row["asked"] is None else f"{row['asked']:.1%}"
    why = f" ({row['reason']})" if row["reason"] and not math.isclose(row["given"], row["asked"] or 0) else ""
    return f"asked {asked}, given {row['given']:.1%} of the {row['unit']}{why}"
