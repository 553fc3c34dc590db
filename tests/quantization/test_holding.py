"""What a rank holds of blocks, by hand and against the whole tensor: rows, runs that straddle rows, and nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).parents[1])]  # also in the workers of the pool
from sharded_nets import shard  # noqa: E402

from dist_compress import comm  # noqa: E402
from dist_compress.layout import Layout  # noqa: E402
from dist_compress.quantization.granularity import (  # noqa: E402
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    extent,
    rows,
    spread,
)
from dist_compress.quantization.holding import Holding  # noqa: E402

CASES: list[tuple[tuple[int, ...], Granularity]] = [
    ((6, 48), PerTensor()), ((6, 48), PerChannel(0)), ((6, 48), PerChannel(1)), ((6, 48), PerGroup(16)),
    ((6, 48), PerBlock((2, 48))), ((6, 48), PerBlock((3, 4))), ((6, 48), PerBlock((-1, 8))),
    ((7, 2, 3, 3), PerChannel(0)), ((7, 2, 3, 3), PerChannel(1)), ((7, 2, 3, 3), PerBlock((1, 1, -1, -1))),
    ((3, 8), PerChannel(0)), ((5,), PerChannel(0)),
]  # fmt: skip


class TwoRuns(Layout):
    """A rank that holds elements 3 to 6 and 8 of [3, 4]."""

    def shape(self, name: str) -> torch.Size:
        return torch.Size((3, 4))

    def local(self, name: str) -> torch.Tensor:
        return torch.tensor([30.0, 40.0, 50.0, 60.0, 80.0])

    def runs(self, name: str, rank: int) -> list[tuple[int, int]]:
        return [(3, 4), (8, 1)]

    def holdings(self, name: str) -> list[list[tuple[int, int]]]:
        return [[(3, 4), (8, 1)], [(0, 4), (7, 1), (9, 3)]]  # both hold element 3; the first counts it

    def is_whole(self, name: str) -> bool:
        return False


def test_runs_that_straddle_rows_by_hand():
    held = TwoRuns(nn.Linear(4, 3)).local("weight")
    holding = Holding(TwoRuns(nn.Linear(4, 3)), "weight", PerChannel(0))
    scale = torch.tensor([[1.0], [2.0], [3.0]])
    assert holding.spread(scale).tolist() == [1, 2, 2, 2, 3] == holding.cut(scale).tolist()
    assert holding.cut(torch.arange(4.0)[None]).tolist() == [3, 0, 1, 2, 0]
    low, high = holding.extent(held)
    assert low.tolist() == [30, 40, 80] and high.tolist() == [30, 60, 80]
    assert holding.sums(held).tolist() == [30, 150, 80]
    pairs = Holding(TwoRuns(nn.Linear(4, 3)), "weight", PerGroup(2))
    assert pairs.spread(torch.arange(6.0).view(3, 2)).tolist() == [1, 2, 2, 3, 4]
    assert pairs.sums(held).tolist() == [0, 30, 90, 60, 80, 0]


def numbers(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))


def held(kind: str) -> list[tuple[bool, ...]]:
    """For each case whether a tensor, a scale, extents and sums are those of the whole."""
    found = []
    for shape, granularity in CASES:
        model: Any = nn.Module()
        model.a, model.weight = nn.Linear(2, 2), nn.Parameter(numbers(shape))
        layout = shard(model, kind)
        x, holding = numbers(shape), Holding(layout, "weight", granularity)
        local = layout.local("weight")
        rank_sums, scale = holding.sums(local), torch.rand(granularity.scale_shape(shape))
        column = torch.rand([n if d == len(shape) - 1 else 1 for d, n in enumerate(shape)])
        low, high = holding.extent(local)
        total, wanted = comm.ordered_sum(rank_sums[None], comm.world_size()), rows(x.double(), granularity).sum(1)
        found.append(
            (
                torch.equal(
                    holding.spread(scale) * local, layout.part("weight", x * spread(scale, shape, granularity))
                ),
                torch.equal(holding.cut(column) * local, layout.part("weight", x * column)),
                torch.equal(-comm.all_reduce(-low, "max"), extent(x, granularity)[0]),
                torch.equal(comm.all_reduce(high, "max"), extent(x, granularity)[1]),
                bool((total - wanted).abs().max() < 1e-14) and torch.equal(total.float(), wanted.float()),
            )
        )
    return found


@pytest.mark.parametrize(("kind", "sizes"), [("fsdp", (2, 3, 4)), ("hsdp", (4,)), ("flat", (1, 2, 3, 4))])
def test_parts_of_blocks_make_up_the_whole(ranks, kind, sizes):
    for size in sizes:
        for found in ranks(size, held, kind):
            assert all(map(all, found)), (size, found)


def row_sums(kind: str) -> bool:
    """Whether sums of rows have the bits of the whole, of numbers whose sum is not exact."""
    x, model = numbers((9, 501)) * numbers((9, 501)).mul(20).exp(), nn.Module()
    model.a, model.weight = nn.Linear(2, 2), nn.Parameter(x)
    holding = Holding(shard(model, kind), "weight", PerChannel(0))
    sums = comm.ordered_sum(holding.sums(holding.layout.local("weight"))[None], comm.world_size())
    return torch.equal(sums, x.double().sum(1))


def test_sums_of_whole_rows_have_equal_bits(ranks):
    assert all(ranks(4, row_sums, "fsdp"))
    assert not any(ranks(4, row_sums, "flat"))  # the control: rows that straddle ranks differ in the last bits
