"""The length of a run and the learning rate at a step."""

from __future__ import annotations

import math

import pytest

from dist_compress.config import Config, OptimConfig
from dist_compress.errors import UserError
from dist_compress.training.schedule import LearningRate, RunLength, run_length

LENGTH = RunLength(num_micro=4, total_steps=100, steps_per_epoch=10.0)


def rates(**options: object) -> list[float]:
    rate = LearningRate(OptimConfig(lr=1.0, **options), LENGTH)  # type: ignore[arg-type]
    return [rate(step) for step in range(100)]


def test_warm_up_is_linear_and_cosine_ends_at_the_final_rate():
    values = rates(schedule="cosine", warmup=0.1, final_lr=0.2)
    assert values[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert values[10] == 1.0 and values[55] == pytest.approx(0.6)
    assert values[99] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 89 / 90)))


def test_constant_and_steps_down():
    assert set(rates(schedule="constant")) == {1.0}
    values = rates(schedule="step", milestones=[0.5, "8epochs"], gamma=0.5)
    assert values[49] == 1.0 and values[50] == 0.5 and values[79] == 0.5 and values[80] == 0.25


def test_a_restart_begins_the_schedule_anew():
    values = rates(schedule="cosine", warmup="10steps", restarts=[0.5])
    assert values[50] == pytest.approx(0.1) and values[60] == 1.0 and values[49] < 0.01
    assert values[:50] == pytest.approx(values[50:])


@pytest.mark.parametrize(
    ("options", "key"),
    [({"schedule": "linear"}, "optim.schedule='linear'"), ({"warmup": 500}, "optim.warmup=500"),
     ({"milestones": [0.1, 7.0]}, r"optim.milestones\[1\]=7.0"), ({"restarts": [0.5, 0.2]}, "optim.restarts")],
)  # fmt: skip
def test_bad_schedules_name_their_key(options, key):
    with pytest.raises(UserError, match=key):
        rates(**options)


def length(num_samples: int = 1000, **train: object) -> RunLength:
    config = Config()
    for name, value in train.items():
        setattr(config.train, name, value)
    return run_length(config, num_samples)


def test_epochs_become_steps_and_max_steps_win():
    assert length(epochs=2.0) == RunLength(2, math.ceil(2 * 1000 / 64), 1000 / 64)
    assert length(epochs=0.01).total_steps == 1
    assert length(max_steps=4).total_steps == 4 and length(max_steps=0).total_steps == 0


def test_a_remainder_names_both_keys():
    with pytest.raises(UserError, match=r"global_batch_size=50, train\.micro_batch_size=32.*whole number"):
        length(global_batch_size=50)


def complain(train: dict[str, object], num_samples: int) -> str:
    try:
        length(num_samples, **train)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("train", "num_samples", "words"),
    [
        ({}, 1000, ["train.global_batch_size=64", "train.micro_batch_size=32", "world size 3", "to 21 or less"]),
        ({"micro_batch_size": 16}, 2, ["2 training samples for world size 3"]),
        ({"micro_batch_size": 16, "sync_batchnorm": True}, 1000, ["train.sync_batchnorm=true", "world size 3"]),
    ],
)
def test_what_does_not_fit_the_ranks_is_refused_on_every_one(ranks, train, num_samples, words):
    for text in ranks(3, complain, train, num_samples):
        assert all(word in text for word in words), text
