"""A statistic's total has equal bits at any number of ranks, over many steps and across a change of ranks."""

from __future__ import annotations

from typing import Any

import torch

from dist_compress import comm
from dist_compress.statistic import Statistic

NUM_MICRO, SIZE, STEPS = 7, 33, 5


def contribution(step: int, micro: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + micro)
    return torch.randn(SIZE, generator=generator) * 10.0 ** ((3 * micro + step) % 9 - 4)


def accumulate(state: dict[str, Any] | None, first: int, last: int) -> tuple[torch.Tensor, int, dict[str, Any]]:
    statistic = Statistic(NUM_MICRO, SIZE)
    if state is not None:
        statistic.load_state_dict(state)
    for step in range(first, last):
        for micro in range(comm.rank(), NUM_MICRO, comm.world_size()):
            statistic.add(micro, contribution(step, micro))
    return statistic.total(), statistic.count(), statistic.state_dict()


def test_total_has_equal_bits_at_any_number_of_ranks_and_after_a_resume_on_another(ranks):
    slots = torch.zeros(NUM_MICRO, SIZE, dtype=torch.float64)
    for step in range(STEPS):
        for micro in range(NUM_MICRO):
            slots[micro] += contribution(step, micro)
    expected = torch.zeros(SIZE, dtype=torch.float64)
    for slot in slots:
        expected += slot
    half = ranks(3, accumulate, None, 0, 2)[0][2]
    for n in (1, 2, 3, 4):
        for state, first in ((None, 0), (half, 2)):
            for total, count, saved in ranks(n, accumulate, state, first, STEPS):
                assert torch.equal(total, expected) and count == STEPS
                assert torch.equal(saved["slots"], slots)


def test_reset_forgets():
    statistic = Statistic(2, 3)
    statistic.add(0, torch.ones(3))
    statistic.reset()
    assert statistic.count() == 0 and not statistic.total().any()
