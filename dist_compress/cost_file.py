"""The measured costs that pruning spends: once per run, in its folder, so that a run that goes on decides the same.

Speedup measures, pruning spends, and neither knows the other: the table goes from one to the other as data.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from dist_compress import comm
from dist_compress.config import Config
from dist_compress.errors import UserError
from dist_compress.speedup.cost_table import GroupCost, as_latencies, cost_table, load, save
from dist_compress.target import Latencies

COSTS = "costs.json"  # in the folder of a run
Measure = Callable[[nn.Module, tuple[Any, dict[str, Any]]], list[GroupCost]]
FRACTIONS = (0.02, 0.25, 0.5, 0.75)  # of the units of a group that are kept when it is measured


def wanted(config: Config) -> bool:
    """Whether anything is asked in milliseconds."""
    pruning = config.pruning
    return pruning.compute == "latency" or pruning.at_most.latency_ms is not None


def latencies(
    config: Config, real: Callable[[Measure], list[GroupCost]], run_dir: Path | None = None, resumed: bool = False
) -> Latencies | None:
    """The latencies to spend, the same on every rank; None when nothing is asked in them. Collective.

    A run that goes on takes the table of its folder. Else `pruning.latency.table` is read, or rank 0 measures: `real`
    calls what it is given with the model and the example of a call, on its device. Both are kept in the folder.
    """
    if not wanted(config):
        return None

    def found() -> Latencies:
        asked = config.pruning.latency
        own = None if run_dir is None else run_dir / COSTS
        if resumed and own is not None:
            if not own.is_file():
                raise UserError(f"{own} is gone: the run has decided by it and cannot go on without. Put it back.")
            return as_latencies(load(own), own)
        if asked.table is not None:
            if not Path(asked.table).is_file():
                raise UserError(f"pruning.latency.table={asked.table!r}: no such file.")
            table = load(asked.table)
        else:
            settings = {"norm": config.speedup.norm, "keep": config.speedup.keep, "barrier": config.speedup.barrier}
            how: dict[str, Any] = {"time_s": asked.time_s, "batch_size": asked.batch_size, **settings}
            table = real(lambda model, example: cost_table(model, *example, fractions=FRACTIONS, **how))
        if own is not None:
            own.parent.mkdir(parents=True, exist_ok=True)
            save(table, own)
        return as_latencies(table, asked.table or "")

    return comm.on_rank0(found)
