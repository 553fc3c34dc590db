"""L2 norm by hand-computed values."""

import pytest
import torch

from dist_compress.pruning.metric import View, build_metric
from dist_compress.target import Member

WEIGHTS = {"a": torch.tensor([[1.0, -2.0], [3.0, 4.0], [0.0, -1.0]]), "b": torch.tensor([[2.0, 0.0, -2.0]])}
ROWS = torch.arange(3)[:, None]
A, B = Member("a", 0, ROWS, "producer"), Member("b", 1, ROWS, "producer")


@pytest.mark.parametrize(
    ("members", "scores"),
    [
        ((A,), [5**0.5, 5.0, 1.0]),
        ((A, B), [(5**0.5 + 2) / 2, 2.5, 1.5]),  # the mean of the members
        ((Member("a", 0, torch.tensor([[0, 2]]), "producer"),), [6**0.5]),  # one unit of two rows
    ],
)
def test_units(members, scores):
    view = View(len(members[0].index), members, WEIGHTS.__getitem__)
    got = build_metric("l2_norm", {}, "pruning").unit_scores(view)
    assert got.dtype == torch.float64 and got.tolist() == pytest.approx(scores)


def test_elements_are_ranked_by_magnitude():
    metric = build_metric("l2_norm", {}, "pruning")
    assert metric.block_scores(WEIGHTS["b"].view(-1, 1), None).tolist() == [2.0, 0.0, 2.0]
    assert not metric.data_driven
