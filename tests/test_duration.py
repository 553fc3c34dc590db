"""Durations as recipes write them."""

from __future__ import annotations

import pytest

from dist_compress.duration import duration
from dist_compress.errors import UserError


@pytest.mark.parametrize(
    ("value", "steps"),
    [(0, 0), (0.0, 0), (0.25, 25), (1, 100), (1.0, 100), ("120steps", 120), ("1step", 1), ("3epochs", 29),
     ("0.25 epochs", 2), ("1epoch", 10)],
)  # fmt: skip
def test_fractions_steps_and_epochs(value, steps):
    assert duration(value, "optim.warmup", total_steps=100, steps_per_epoch=9.8) == steps


@pytest.mark.parametrize("value", [-0.1, 1.5, 20, True, "20", "1.5steps", "many steps", "3 eons", float("nan")])
def test_anything_else_names_the_key(value):
    with pytest.raises(UserError, match=r"pruning\.schedule\.end=.*'120steps'"):
        duration(value, "pruning.schedule.end", total_steps=100, steps_per_epoch=9.8)


def test_a_number_of_steps_gets_the_spelling_it_wants():
    with pytest.raises(UserError, match="'20steps'"):
        duration(20, "speedup.at", total_steps=100, steps_per_epoch=9.8)
