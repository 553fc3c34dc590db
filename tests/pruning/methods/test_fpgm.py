"""FPGM against distances taken one by one."""

import torch

from dist_compress.pruning.metric import View, build_metric
from dist_compress.target import Member


def test_scores_are_sums_of_distances():
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    member = Member("layer.weight", 0, torch.arange(6)[:, None], "producer")
    scores = build_metric("fpgm", {}, "pruning").unit_scores(View(6, (member,), {"layer.weight": weight}.get))
    rows = weight.flatten(1).double()
    torch.testing.assert_close(scores, (rows[:, None] - rows).square().sum(2).sqrt().sum(1))


def test_the_unit_in_the_middle_goes_first_although_it_is_not_the_smallest():
    weight = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0], [2.0, 3.0]])
    member = Member("layer.weight", 0, torch.arange(4)[:, None], "producer")
    scores = build_metric("fpgm", {}, "pruning").unit_scores(View(4, (member,), {"layer.weight": weight}.get))
    assert int(scores.argmin()) == 2 and int(weight.norm(dim=1).argmin()) == 0
