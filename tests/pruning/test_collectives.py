"""A decision costs a few small collectives, whatever is pruned and however large the model is; a step without one costs
none beyond its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pruning_nets import NUM_MICRO, attach, config, member
from torch import nn

from dist_compress import comm
from dist_compress.target import Coupling, UnitGroup

WIDTH, MOST = 8, 12


class Layer(nn.Module):
    """A convolution of each kind of target."""

    def __init__(self) -> None:
        super().__init__()
        names = ("low", "high", "gate", "out", "act", "tiles", "single", "pattern", "under", "wanda", "wide", "moved")
        for name in names:
            self.add_module(name, nn.Conv2d(WIDTH, WIDTH, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in self.children():
            x = x + 0.01 * conv(x).relu()
        return x


class Deep(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        torch.manual_seed(depth)
        self.layers, self.head = nn.Sequential(*(Layer() for _ in range(depth))), nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, 8, 3, 3] -> [B, 5]
        return self.head(self.layers(x / 10).mean((2, 3)))


def names(kind: str, depth: int) -> list[str]:
    return [f"layers.{i}.{kind}" for i in range(depth)]


def entries(depth: int, exchange: bool) -> list[dict[str, Any]]:
    """Global groups of channels and of blocks with bounds, blocks and rows by themselves, N:M, thresholds, activations;
    methods that hear nothing, gates, outputs, inputs, gradients, the whole run and activations."""
    alone = {"dependency_group_id": None}
    found: list[dict[str, Any]] = [
        {"op_names": names("low", depth), "global_group_id": "a", "max_sparse_ratio": 0.7, **alone},
        {"op_names": names("high", depth), "global_group_id": "b", "method": "l2_norm", **alone},
        {"op_names": names("gate", depth), "method": "taylor", **alone},
        {"op_names": names("out", depth), "method": "mean_activation", **alone},
        {"op_names": names("act", depth), "target_names": ["_output_0"], "granularity": "per_channel"},
        {"op_names": names("tiles", depth), "granularity": [2, 2, 1, 1], "global_group_id": "c"},
        {"op_names": names("single", depth), "granularity": "element", "method": "taylor", "global_group_id": "d"},
        {"op_names": names("pattern", depth), "granularity": "2:4", "sparse_ratio": None},
        {"op_names": names("under", depth), "granularity": "element", "sparse_threshold": 0.1},
        {"op_names": names("wanda", depth), "granularity": "element", "method": "wanda"},
        {"op_names": names("wide", depth), "granularity": "element", "global_group_id": "e",
         "min_sparse_ratio": 0.3, "max_sparse_ratio": 0.6},
        {"op_names": names("moved", depth), "granularity": "element", "method": "movement"},
        {"op_names": ["head"], "granularity": "element", "global_group_id": "e", "max_sparse_ratio": 0.5},
    ]  # fmt: skip
    if exchange:
        found[11] |= {"method": "rigl", "options": {"every": 1, "until": 1.0}}
    return found


def counted(depth: int, exchange: bool) -> tuple[list[dict[str, int]], list[int], str]:
    """Collectives of the pruner in each step, those beyond in the steps of decisions, and the last fingerprint."""
    model = Deep(depth)
    units = tuple(UnitGroup(n, WIDTH, (member(f"{n}.weight", WIDTH), member(f"{n}.bias", WIDTH)))
                  for kind in ("low", "high", "gate", "out") for n in names(kind, depth))  # fmt: skip
    schedule = {"name": "linear", "start": "2steps", "end": "4steps", "num_decisions": 2}
    keys = {"method": "l1_norm", "schedule": schedule}
    example = torch.zeros(2, WIDTH, 3, 3)
    pruner, _, projection = attach(config(entries(depth, exchange), **keys), model, Coupling(units), 6, example)
    optimizer, calls = torch.optim.SGD(model.parameters(), 0.05), []
    for step in range(6):
        optimizer.zero_grad()
        rows = []
        for turn in range(-(-NUM_MICRO // comm.world_size())):
            micro = turn * comm.world_size() + comm.rank()
            generator = torch.Generator().manual_seed(100 * step + micro)
            x = torch.randn(2, WIDTH, 3, 3, generator=generator)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
            if micro < NUM_MICRO:
                pruner.after_backward(step, micro)
        total = comm.ordered_sum(torch.stack(rows), NUM_MICRO).float()
        for p, grad in zip(model.parameters(), total.split([p.numel() for p in model.parameters()]), strict=True):
            p.grad = grad.view_as(p).clone()
        comm.calls.clear()
        pruner.before_step(step)
        projection.edit_gradients()
        projection.restore()
        optimizer.step()
        pruner.after_step(step)
        projection.project()
        calls.append(dict(comm.calls))
    return calls, [t - 1 for t, *_ in pruner.history], pruner.history[-1][2]


@pytest.mark.parametrize("exchange", [False, True])
def test_at_most_twelve_at_a_decision_and_none_otherwise(ranks, exchange):
    found = {(depth, size): ranks(size, counted, depth, exchange) for depth, size in ((3, 1), (3, 2), (3, 3), (3, 4))}
    if not exchange:
        found |= {(30, size): ranks(size, counted, 30, exchange) for size in (1, 2)}
    last, most = set(), 0
    for (_, size), of_ranks in found.items():
        for calls, decided, mark in of_ranks:
            assert decided[0] == 1 and mark == of_ranks[0][2] != "0" * 16
            assert not any(calls[step] for step in range(6) if step not in decided and not exchange)
            assert (calls[3]["all_reduce"] > 4) == exchange  # it selects twice
            assert not calls[0] and (not exchange or calls[2] and calls[4])  # an exchange is a decision, too
            most = max(most, *(sum(c.values()) for c in calls))
            last |= {tuple(sorted(calls[3].items()))} if size > 1 else set()
    assert 7 <= most <= MOST, found
    assert len({mark for (depth, _), of_ranks in found.items() if depth == 3 for *_, mark in of_ranks}) == 1
    assert len(last) == 1, last  # neither layers nor ranks; what ties costs one more
