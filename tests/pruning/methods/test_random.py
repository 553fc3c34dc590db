"""Random scores: a function of seed and weights alone, and uniform."""

import torch

from dist_compress.pruning.metric import View, build_metric
from dist_compress.target import Member


def scores(seed, weight):
    member = Member("layer.weight", 0, torch.arange(len(weight))[:, None], "producer")
    return build_metric("random", {"seed": seed}, "pruning").unit_scores(
        View(len(weight), (member,), {"layer.weight": weight}.get)
    )


def test_units():
    weight = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(scores(0, weight), scores(0, weight)) and len(scores(0, weight).unique()) == 50
    assert not torch.equal(scores(0, weight).argsort(), scores(1, weight).argsort())


def test_elements_are_uniform_and_do_not_depend_on_the_sharding():
    metric = build_metric("random", {"seed": 3}, "pruning")
    weight = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    whole = metric.block_scores(weight[:, None], None)
    parts = [metric.block_scores(part[:, None], None) for part in weight.split(33_333)]
    assert torch.equal(whole, torch.cat(parts))
    assert 0 <= float(whole.min()) and float(whole.max()) < 1
    assert abs(float(whole.mean()) - 0.5) < 0.005 and abs(float(whole.std()) - 12**-0.5) < 0.005
