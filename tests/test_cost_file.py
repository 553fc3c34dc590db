"""Budgets of whole runs: what is asked, predicted and reached; the measured table stays with its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_run import killed_run, whole_run

from dist_compress.errors import UserError
from dist_compress.speedup.cost_table import as_latencies, load, save

SHORT = ["train.max_steps=8", "pruning.schedule.end=6steps", "pruning.schedule.num_decisions=2", "export=[]"]
LATENCY = ["pruning.sparse_ratio=null", "pruning.latency.time_s=0.3", "pruning.method=l1_norm", *SHORT]


def limited(run_dir: str, *overrides: str) -> dict[str, Any]:
    summary = whole_run(run_dir, "pruning.sparse_ratio=null", *SHORT, *overrides)
    return {k: v for k, v in summary.items() if k.startswith("at_most/") or k in ("decisions", "macs/after")}


def test_a_limit_is_met_by_the_shrunk_model_on_any_number_of_ranks(ranks: Any, tmp_path: Path) -> None:
    limits = ["pruning.at_most.macs=1.5e6", "pruning.at_most.params=120e3"]
    one = ranks(1, limited, str(tmp_path / "one"), *limits)[0]
    assert one["at_most/macs/asked"] == 1.5e6 and one["at_most/params/asked"] == 120e3
    for unit in ("macs", "params"):
        assert one[f"at_most/{unit}/predicted"] == one[f"at_most/{unit}/reached"] <= one[f"at_most/{unit}/asked"]
    assert one["macs/after"] == one["at_most/macs/reached"]
    assert ranks(3, limited, str(tmp_path / "three"), *limits)[0] == one


def measured_run(run_dir: str, limit: str, *overrides: str) -> dict[str, Any]:
    return whole_run(run_dir, f"pruning.at_most.latency_ms={limit}", *LATENCY, *overrides)


def measured_table(run_dir: str) -> Any:
    """What every rank gets to know of the model of the smoke recipe; costs.json lies in `run_dir`."""
    from dist_compress import compose, cost_file, models

    words = ["+recipe=smoke", "pruning.at_most.latency_ms=1", f"run_dir={run_dir}", *LATENCY]
    config = compose.compose(compose.parse(words))
    example = ((torch.randn(2, 3, 12, 12),), {})
    model = models.build(config.model, 10, 0)
    return cost_file.latencies(config, lambda measure: measure(model, example), Path(run_dir))


def test_rank_0_measures_and_all_know(ranks: Any, tmp_path: Path) -> None:
    one, two = ranks(2, measured_table, str(tmp_path / "run"))
    assert one == two and as_latencies(load(tmp_path / "run" / "costs.json")) == one
    assert len(one.groups) > 5 and one.together.num_units == sum(g.num_units for g in one.groups)
    assert all(list(g.ms) == sorted(g.ms) and g.ms[-1] == one.together.ms[-1] > 0 for g in one.groups)


def test_a_run_that_goes_on_spends_the_same_table(ranks: Any, tmp_path: Path) -> None:
    """The file of before is gone bad meanwhile; a new run by the copy in the folder decides the same."""
    table = ranks(1, measured_table, str(tmp_path / "first")) and load(tmp_path / "first" / "costs.json")
    for row, saved in zip(table, [*range(1, len(table)), 20], strict=True):  # what no machine's load changes
        row.latency_ms[:] = [100 - saved * (1 - kept / row.num_units) * 4 for kept in row.kept]
    path = tmp_path / "first" / "costs.json"
    save(table, path)
    given, often = f"pruning.latency.table={path}", "checkpoint.every_steps=2"
    ranks(2, killed_run, str(tmp_path / "run"), 5, "pruning.at_most.latency_ms=60", *LATENCY, given, often)
    kept = tmp_path / "run" / "costs.json"
    assert kept.read_text() == path.read_text()
    path.write_text("[]")
    summary = ranks(1, measured_run, str(tmp_path / "run"), "60", given, often)[0]
    assert 55 < summary["at_most/latency_ms/predicted"] <= 60 == summary["at_most/latency_ms/asked"]
    assert summary["at_most/latency_ms/reached"] == summary["latency_ms/p50/after/b1"]
    other = f"pruning.latency.table={kept}"
    assert ranks(2, measured_run, str(tmp_path / "new"), "60", other)[0]["decisions"] == summary["decisions"]


def test_a_table_that_went_missing_stops_the_run(tmp_path: Path) -> None:
    from torch import nn

    from dist_compress import config as schema
    from dist_compress import cost_file

    config = schema.load({"pruning": {"compute": "latency", "latency": {"table": "nowhere.json"}}})

    def real(measure: Any) -> Any:
        return measure(nn.Linear(2, 2), ((), {}))

    with pytest.raises(UserError, match="costs.json is gone: the run has decided by it"):
        cost_file.latencies(config, real, tmp_path, resumed=True)
    with pytest.raises(UserError, match=r"pruning.latency.table='nowhere.json': no such file"):
        cost_file.latencies(config, real, tmp_path)
    assert cost_file.latencies(schema.load({}), real) is None
