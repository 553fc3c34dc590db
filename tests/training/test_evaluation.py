"""Evaluation: each sample once, and the model as it was."""

from __future__ import annotations

import pytest
import torch
from loop_jobs import config, trainer, weights

SIZES = (1, 2, 3, 4)


def score(batch_size: int) -> tuple[dict[str, float], float, bool]:
    t = trainer(config(eval_batch_size=batch_size))
    t.model.train()
    scores = t.evaluate()
    batch = t.data.eval.batch(torch.arange(360), None)
    t.model.eval()
    with torch.no_grad():
        right = (t.model(batch["inputs"]).argmax(1) == batch["targets"]).double().mean()
    t.model.train()
    return scores, float(right), "bn1.num_batches_tracked" in weights(t) and not weights(t)["bn1.running_mean"].any()


@pytest.mark.parametrize("batch_size", [7, 100, 360])
def test_evaluation_counts_each_sample_once_at_any_number_of_ranks(ranks, batch_size):
    single = ranks(1, score, batch_size)[0]
    assert single[0]["accuracy"] == pytest.approx(single[1], abs=1e-12) and single[2]
    for n in SIZES[1:]:
        assert ranks(n, score, batch_size) == [single] * n
