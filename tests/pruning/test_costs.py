"""What is left of a model: MACs and parameters against a real shrink, latency against a table worked out by hand."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from pruning_nets import COUPLING, TABLE, Net, attach, config, latency_row
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

import dist_compress
from dist_compress.errors import UserError
from dist_compress.models.resnet_cifar import resnet20
from dist_compress.pruning.costs import Measured, all_macs, all_params, latency_of
from dist_compress.speedup.cost import macs, num_params
from dist_compress.target import Coupling, Latencies


class Mixed(nn.Module):
    """A concatenation, a depthwise convolution, groups and a residual sum: no two of them cost the same way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.depth, self.bn = nn.Conv2d(20, 20, 3, groups=20), nn.BatchNorm2d(20)
        self.grouped = nn.Conv2d(20, 16, 1, groups=4)
        self.side, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.depth(torch.cat([self.a(x), self.b(x)], 1))).relu()
        x = self.grouped(x)
        return self.head((x + self.side(x).relu()).mean((2, 3)))


X = (torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3)),)


@pytest.mark.parametrize("make", [resnet20, Mixed])
@pytest.mark.parametrize(("unit", "part"), [("macs", 0.37), ("params", 0.37), ("macs", 0.8), ("params", 0.62)])
def test_what_is_predicted_is_what_the_shrunk_model_has(make: Any, unit: str, part: float) -> None:
    torch.manual_seed(0)
    model = make().eval()
    count = {"macs": lambda m: macs(m, (X[0][:1],)), "params": num_params}[unit]
    wanted = int(part * count(model))
    small, report = dist_compress.prune(model, X, {}, [{"op_types": ["Conv2d"]}], at_most={unit: wanted})
    [row] = report.limits
    assert (row["unit"], row["asked"], row["before"]) == (unit, wanted, count(model))
    assert row["predicted"] == count(small) <= wanted
    assert row["predicted"] > 0.8 * wanted  # and it stops in time: one unit of `grouped` is 4 channels


def test_several_limits_all_hold_and_rounding_is_foreseen() -> None:
    torch.manual_seed(0)
    model = resnet20().eval()
    limits = {"macs": 3e6, "params": 130e3}
    small, report = dist_compress.prune(model, X, {}, [{"op_types": ["Conv2d"]}], at_most=limits)
    assert [row["unit"] for row in report.limits] == ["macs", "params"]
    assert 2.7e6 < macs(small, (X[0][:1],)) <= 3e6 and 110e3 < num_params(small) <= 130e3
    small, report = dist_compress.prune(model, X, {}, [{"op_types": ["Conv2d"]}], at_most={"macs": 3e6}, round_to=8)
    assert all(m.out_channels % 8 == 0 for m in small.modules() if isinstance(m, nn.Conv2d))
    assert report.limits[0]["predicted"] == macs(small, (X[0][:1],)) <= 3e6


class Heads(nn.Module):
    """Attention over four heads of four channels, and a layer behind: [B, 5, 8] -> [B, 5, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(8, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).view(len(x), 5, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).reshape(len(x), 5, -1)
        return self.down(self.up(y).relu())


@pytest.mark.parametrize("round_to", [2, 4, 8])
def test_rounding_of_heads_is_that_of_their_channels(round_to: int) -> None:
    """One of four heads is a multiple of four in the weights; the products of the attention count heads."""
    torch.manual_seed(0)
    model, x = Heads().eval(), torch.randn(1, 5, 8)
    keys = {"at_most": {"macs": 0.4 * macs(model, (x,))}, "round_to": round_to}
    small, report = dist_compress.prune(model, (x,), {}, [{"op_types": ["Linear"]}], **keys)
    assert report.limits[0]["predicted"] == macs(small, (x,)) <= keys["at_most"]["macs"]
    assert small.q.out_features % round_to == small.up.out_features % round_to == 0 and small.q.out_features < 16


@pytest.mark.parametrize("round_to", [1, 4, 8])
def test_attention_heads_and_the_stream_of_a_transformer_are_foreseen(round_to: int) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, num_layers=2, num_heads=4, hidden_dim=48, mlp_dim=96, num_classes=10).eval()
    nn.init.normal_(model.heads.head.weight)  # zeros at first, of which nothing before them would be needed
    x = torch.randn(2, 3, 32, 32)
    entries = [
        {"op_types": ["Linear", "Conv2d"], "exclude_op_names": ["heads.head"]},
        {"op_names_re": [r".*self_attention"], "target_names": ["in_proj_weight"]},
    ]
    limits = {"macs": 0.6 * macs(model, (x[:1],)), "params": 0.9 * num_params(model)}
    small, report = dist_compress.prune(model, (x,), {}, entries, at_most=limits, round_to=round_to)
    assert [row["predicted"] for row in report.limits] == [macs(small, (x[:1],)), num_params(small)]
    assert [row["binding"] for row in report.limits] == [True, False]
    assert any(block.self_attention.num_heads < 4 for block in small.encoder.layers)


def test_whole_model_by_hand() -> None:
    """Half of the stream (8), 2 of 6 inner and 4 of 10 free channels gone."""
    pruner, model, _ = attach(config([{"op_types": ["Conv2d"]}]))
    gone = [np.arange(8) < 4, np.arange(6) < 2, np.arange(10) < 4]
    assert [s.name for s in pruner.sets] == ["stem", "a", "free"]
    cost = all_macs(pruner.sets, COUPLING, model, 1)
    assert cost.left([g & False for g in gone]) == sum(layer.macs for layer in COUPLING.layers)
    assert cost.left(gone) == 16 * 27 * 4 + 2 * 16 * 9 * 16 + 4 * 9 * 4 + 4 * 4 * 6 + 5 * 4 * 6
    cost = all_params(pruner.sets, model, 1)
    assert cost.left([g & False for g in gone]) == num_params(model)
    convolutions = 27 * 4 + (9 * 4 * 4 + 4) + (9 * 4 * 4 + 4) + (9 * 4 + 4) + (4 * 6 + 6)
    assert cost.left(gone) == convolutions + 2 * (4 + 4 + 4) + 24 * 5 + 5


def test_latency_by_hand() -> None:
    """At half of all units the groups save 2 + 1 + 0 ms one by one, but 2 ms together, so 3 count as 2."""
    pruner, _, _ = attach(config([{"op_types": ["Conv2d"]}]))
    cost = latency_of(pruner.sets, COUPLING, TABLE)
    none = [np.zeros(n, bool) for n in (8, 6, 10)]

    def left(stem: int, a: int, free: int) -> Fraction:
        return cost.left([np.arange(n) < n - kept for n, kept in ((8, stem), (6, a), (10, free))])

    assert cost.left(none) == 10 and left(8, 6, 1) == 10
    assert left(4, 3, 5) == 8
    assert left(4, 6, 10) == 10 - Fraction(2) * Fraction(2, 3)
    assert left(6, 6, 10) == 10 - Fraction(1) * Fraction(2, 3)
    # at an eighth: 4 + 3 ms (a has 0.75 of 6 kept, at least the one that was measured), really 6
    assert left(1, 1, 1) == 4 and left(4, 1, 10) == 10 - (2 + Fraction(4, 4) * (5 - 3))
    costs = [left(s, a, 10) for s in range(8, 0, -1) for a in (6,)]
    assert costs == sorted(costs, reverse=True)  # fewer units never cost more
    assert [p.tolist() for p in cost.prices()] == [[4 / 7] * 8, [3 / 5] * 6, [0.0] * 10]


def test_points_that_save_nothing_alone_are_passed_over() -> None:
    """Where no group alone was measured to save, what all saved together says nothing about one of them."""
    alone = latency_row("a", 4, (1, 8.0), (3, 10.0), (4, 10.0))
    table = Latencies((alone,), latency_row("(all groups)", 4, (1, 8.0), (3, 9.5), (4, 10.0)))
    pruner, _, _ = attach(config([{"op_names": ["a"]}]))
    cost = Measured(pruner.sets, [table.groups[0]], table)
    assert [cost.left([np.arange(4) < 4 - kept]) for kept in (4, 3, 2, 1)] == [10, 10, 9, 8]


def test_a_table_of_another_model_is_refused() -> None:
    pruner, _, _ = attach(config([{"op_types": ["Conv2d"]}]))
    other = Latencies((latency_row("stem", 4, (1, 1.0), (4, 2.0)),), TABLE.together)
    with pytest.raises(UserError, match="8 units of the group 'stem', the table has 4 units there. It was measured on"):
        latency_of(pruner.sets, COUPLING, other)
    with pytest.raises(UserError, match="6 units of the group 'a', the table has no such row"):
        latency_of(pruner.sets, COUPLING, Latencies(TABLE.groups[:1], TABLE.together))
    twice = Coupling((COUPLING.groups[0], COUPLING.groups[0]))  # names may repeat: rows go in order
    cost = latency_of([], twice, Latencies((TABLE.groups[0], TABLE.groups[0]), TABLE.together))
    assert cost.groups == []


def test_macs_of_the_model_that_the_trace_has() -> None:
    model = Net()
    assert sum(layer.macs for layer in COUPLING.layers) == macs(model.eval(), (torch.zeros(1, 3, 4, 4),))
