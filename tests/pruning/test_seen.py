"""Score histograms: against numpy on the scores themselves, and the same at any number of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pruning_nets import attach, config

from dist_compress import comm
from dist_compress.pruning import seen

SCORES = {
    "spread": torch.rand(500, generator=torch.Generator().manual_seed(0)) ** 3 + 1e-3,
    "signed": torch.randn(400, generator=torch.Generator().manual_seed(1)),
    "equal": torch.full((7,), 2.5),
    "zeros": torch.tensor([0.0, -0.0, 0.0, 1.0]),
    "tiny beside large": torch.tensor([1e-30, 1e-20, 1.0, 2.0, 3.0]),
    "infinite beside finite": torch.tensor([torch.inf, -torch.inf, 1.0, 4.0]),
}


@pytest.mark.parametrize("name", SCORES)
def test_bars_hold_the_scores_between_their_edges(name: str) -> None:
    scores = SCORES[name]
    gone = scores < scores.median()
    row = seen.histogram(seen.count(seen.bins(scores), gone).numpy())
    edges = np.array(row["edges"])
    assert len(row["kept"]) == len(row["removed"]) == len(edges) - 1 <= 2 * seen.BARS
    assert (np.diff(edges) > 0).all()
    for bars, mine in ((row["kept"], ~gone), (row["removed"], gone)):
        own = scores[mine & scores.isfinite()].numpy().astype(np.float64)
        floor = np.abs(edges[np.nonzero(edges)]).min()
        own = np.where(np.abs(own) < floor, 0.0, own)  # taken for zero
        expected = np.histogram(own, np.append(edges[:-1], np.inf))[0]
        if name != "signed":  # there an edge belongs to the bar above it on one side, below it on the other
            assert bars == expected.tolist()
        assert sum(bars) == len(own)


def test_nothing_finite_is_nothing_to_show() -> None:
    scores = torch.tensor([torch.inf, torch.inf])
    row = seen.histogram(seen.count(seen.bins(scores), scores < 0).numpy())
    assert row == {"edges": [], "kept": [], "removed": []}


def decided(entries: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """What a gradual run tells of its scores, and the collectives of the last decision."""
    schedule = {"name": "linear", "start": 0, "end": "2steps", "num_decisions": 3}
    pruner, model, projection = attach(config(entries, schedule=schedule))
    for step in pruner.schedule:
        comm.calls.clear()
        pruner.decide(step)
    rows = pruner.results()["scores"]
    other, *_ = attach(config(entries, schedule=schedule))
    other.load_state_dict(pruner.state_dict())
    assert other.results()["scores"] == rows
    return rows, sum(comm.calls.values())


BOTH = [
    {"op_types": ["Conv2d"], "global_group_id": "all"},
    {"op_names": ["head"], "granularity": "element"},
]


def test_rows_of_a_run(ranks: Any) -> None:
    rows, _ = ranks(1, decided, BOTH)[0]
    assert [(row["step"], row["name"]) for row in rows] == [
        (step, name) for step in (0, 1, 2) for name in ("global_group_id=all", "head")
    ]
    for step in (0, 1, 2):
        units, weights = (row for row in rows if row["step"] == step)
        assert sum(units["kept"] + units["removed"]) == 24 - 4 * step and sum(units["removed"]) == 4  # not what is gone
        assert sum(weights["kept"]) == 200 - 200 * (step + 1) // 6
        assert sum(weights["removed"]) == 200 * (step + 1) // 6 - 200 * step // 6
    for size in (2, 3):
        for other, collectives in ranks(size, decided, BOTH):
            assert other == rows and collectives <= 12


def test_more_groups_than_are_told() -> None:
    told = seen.Seen()
    for i in range(seen.MOST_GROUPS + 3):
        told.add(f"g{i}", [torch.rand(5)], [torch.zeros(5, dtype=torch.bool)])
    told.close(7, between=False)
    assert len(told.rows) == seen.MOST_GROUPS and not told.now
    told.add("g0", [torch.rand(5)], [torch.zeros(5, dtype=torch.bool)])
    told.close(9, between=True)  # replaces the one before, as the history does
    assert [(row["step"], row["name"]) for row in told.rows] == [(9, "g0")]
