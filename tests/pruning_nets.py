"""A small convolutional net with its coupling written by hand, and a bare training loop for pruners."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dist_compress import comm, pruning
from dist_compress.config import Config, load
from dist_compress.method import Context
from dist_compress.projection import Projection
from dist_compress.pruning.listener import Listener
from dist_compress.pruning.pruner import Pruner
from dist_compress.pruning.unit_scores import by_set, own_scores
from dist_compress.statistic import totals
from dist_compress.target import Coupling, GroupLatency, Latencies, LayerCost, Member, UnitGroup

NUM_MICRO = 6


def member(fqn: str, num: int, role: str = "producer", dim: int = 0, each: int = 1) -> Member:
    return Member(fqn, dim, torch.arange(num * each).view(num, each), role)


def affine(norm: str, num: int) -> tuple[Member, Member]:
    return member(f"{norm}.weight", num, "affine"), member(f"{norm}.bias", num, "affine")


class Net(nn.Module):
    """stem-bn, then a residual branch (a-bn_a, b-bn_b, added to the stem), a depthwise conv, a free conv, a head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.bn_a = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b, self.bn_b = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.free = nn.Conv2d(8, 10, 1)  # no norm follows
        self.head = nn.Linear(10 * 4, 5)
        for norm in (self.bn, self.bn_a, self.bn_b):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, 3, 4, 4] -> [B, 5]
        x = self.bn(self.stem(x)).relu()
        x = (x + self.bn_b(self.b(self.bn_a(self.a(x)).relu()))).relu()
        return self.head(self.free(self.depthwise(x)).relu().flatten(1))


STREAM = UnitGroup(
    "stem",
    8,
    (
        member("stem.weight", 8),
        *affine("bn", 8),
        member("a.weight", 8, "consumer", 1),
        member("b.weight", 8),
        member("b.bias", 8),
        *affine("bn_b", 8),
        member("depthwise.weight", 8),
        member("depthwise.bias", 8),
        member("free.weight", 8, "consumer", 1),
    ),
)
INNER = UnitGroup(
    "a",
    6,
    (member("a.weight", 6), member("a.bias", 6), *affine("bn_a", 6), member("b.weight", 6, "consumer", 1)),
)
FREE = UnitGroup(
    "free",
    10,
    (member("free.weight", 10), member("free.bias", 10), member("head.weight", 10, "consumer", 1, each=4)),
)
HEAD = UnitGroup("head", 5, (member("head.weight", 5), member("head.bias", 5)), blocked="is an output of the model")


def ones(num: int) -> torch.Tensor:
    return torch.ones(num, dtype=torch.float64)


COUPLING = Coupling(
    (STREAM, INNER, FREE, HEAD),
    (
        LayerCost("stem", 16 * 27 * 8, ((0.0, ((0, ones(8)),)),)),
        LayerCost("a", 16 * 9 * 48, ((0.0, ((0, ones(8)),)), (0.0, ((1, ones(6)),)))),
        LayerCost("b", 16 * 9 * 48, ((0.0, ((1, ones(6)),)), (0.0, ((0, ones(8)),)))),
        LayerCost("depthwise", 4 * 9 * 8, ((0.0, ((0, ones(8)),)),)),
        LayerCost("free", 4 * 80, ((0.0, ((0, ones(8)),)), (0.0, ((2, ones(10)),)))),
        LayerCost("head", 200, ((0.0, ((2, 4 * ones(10)),)),)),
    ),
)


def latency_row(name: str, num: int, *points: tuple[int, float]) -> GroupLatency:
    kept, ms = zip(*points, strict=True)
    return GroupLatency(name, num, kept, ms)


TABLE = Latencies(
    (
        latency_row("stem", 8, (1, 6.0), (4, 8.0), (8, 10.0)),
        latency_row("a", 6, (1, 7.0), (3, 9.0), (6, 10.0)),
        latency_row("free", 10, (1, 10.0), (5, 10.0), (10, 10.0)),  # saves nothing
    ),
    latency_row("(all groups)", 24, (3, 4.0), (12, 8.0), (24, 10.0)),
)


def config(entries: list[dict[str, Any]], **pruning_keys: Any) -> Config:
    keys = {"method": "l1_norm", "sparse_ratio": 0.5, "config_list": entries, **pruning_keys}
    return load({"pruning": keys})


def attach(
    cfg: Config,
    model: nn.Module | None = None,
    coupling: Coupling = COUPLING,
    total_steps: int = 4,
    example: torch.Tensor | None = None,
) -> tuple[Pruner, nn.Module, Projection]:
    model = Net() if model is None else model
    [pruner] = pruning.build(cfg)
    assert isinstance(pruner, Pruner)
    projection = Projection(model)
    example = torch.zeros(2, 3, 4, 4) if example is None else example
    pruner.attach(Context(cfg, model, projection, coupling, NUM_MICRO, total_steps, 2.0, ((example,), {})))
    return pruner, model, projection


def unit_scores(pruner: Pruner) -> list[torch.Tensor]:
    evidence = pruner._placed()
    heard = totals([listener.statistic for listener in pruner.unit_listeners.values()])
    found = evidence.gather(pruner.scorers)
    sums = dict(zip(pruner.unit_listeners, heard, strict=True))
    return by_set(comm.all_reduce(own_scores(evidence, found, pruner.unit_listeners, sums)), pruner.sets)


def means_of(listener: Listener) -> Any:
    """What it heard. Collective."""
    return listener.means(listener.statistic.total())


def micro_batch(step: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + micro)
    return torch.randn(4, 3, 4, 4, generator=generator), torch.randint(0, 5, (4,), generator=generator)


def train(pruner: Pruner, model: nn.Module, projection: Projection, steps: range, dummy_rounds: bool = True) -> None:
    """Micro-batch j goes to rank j mod N; gradients are summed in the order of micro-batches."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    size, rank = comm.world_size(), comm.rank()
    rounds = -(-NUM_MICRO // size)
    parameters = list(model.parameters())
    if steps.start == 0:
        pruner.after_step(-1)
        projection.project()
    for step in steps:
        rows = []
        for r in range(rounds):
            micro = r * size + rank
            live = micro < NUM_MICRO
            x, y = micro_batch(step, micro if live else 0)
            optimizer.zero_grad()
            (nn.functional.cross_entropy(model(x), y, reduction="sum") / (4 * NUM_MICRO)).backward()
            rows.append(torch.cat([p.grad.flatten() for p in parameters]))
            if live:
                pruner.after_backward(step, micro)
        total = comm.ordered_sum(torch.stack(rows), NUM_MICRO).float()
        for p, grad in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
            p.grad = grad.view_as(p).clone()
        pruner.before_step(step)
        projection.edit_gradients()
        projection.restore()
        optimizer.step()
        pruner.after_step(step)
        projection.project()


def check_heard(method: str, formula: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """The means that `method` hears of sets with one place each, against a float64 run that keeps all it needs: to
    1e-6 (relative) where the model itself is in float64, else as close as float32 gets through the network.

    `formula`: what a micro-batch adds, [C], from the output [B, C, H, W] behind the norm and its gradient.
    """
    schedule = {"name": "one_shot", "start": "1steps", "end": "1steps"}
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-6)):
        entries = [{"op_names": ["a", "free"]}]
        pruner, model, _ = attach(config(entries, method=method, schedule=schedule), Net().to(dtype))
        expected = {s.name: torch.zeros(s.num_units, dtype=torch.float64) for s in pruner.sets}
        reference = Net().double()
        for micro in range(NUM_MICRO):
            x, y = micro_batch(0, micro)
            with torch.no_grad():
                model.eval()(2 * x.to(dtype))  # an evaluation in between is not heard
            nn.functional.cross_entropy(model.train()(x.to(dtype)), y, reduction="sum").backward()
            pruner.after_backward(0, micro)
            a = reference.bn_a(reference.a(stem := reference.bn(reference.stem(x.double())).relu()))
            free = reference.free(reference.depthwise((stem + reference.bn_b(reference.b(a.relu()))).relu()))
            loss = nn.functional.cross_entropy(reference.head(free.relu().flatten(1)), y, reduction="sum")
            grads = torch.autograd.grad(loss, [a, free])
            for name, output, grad in zip(("a", "free"), (a, free), grads, strict=True):
                expected[name] += formula(output.detach(), grad)
        [listener] = pruner.listeners.values()
        for unit_set, mean in zip(pruner.sets, means_of(listener), strict=True):
            close = {"rtol": tolerance, "atol": 1e-7 if dtype == torch.float32 else 0.0}
            torch.testing.assert_close(mean, expected[unit_set.name] / NUM_MICRO, **close)
