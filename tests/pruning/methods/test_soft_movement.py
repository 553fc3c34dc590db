"""Soft movement against scores that autograd trains on loss and penalty, straight through the mask."""

import pytest
import torch
from pruning_nets import attach, config
from straight_through import check_straight_through
from torch import nn

from dist_compress.errors import UserError
from dist_compress.pruning.metric import build_metric
from dist_compress.target import Coupling

EVERY_STEP = {"name": "linear", "start": "1steps", "end": "4steps", "num_decisions": 4}


def test_by_hand():
    metric = build_metric("soft_movement", {"lr": 2.0, "penalty": 0.4}, "pruning")
    score, weight, grad = (
        torch.zeros(2, dtype=torch.float64),
        torch.tensor([[1.0], [3.0]]),
        torch.tensor([[0.5], [-1.0]]),
    )
    score = metric.block_step(score, weight, grad)
    assert score.tolist() == pytest.approx([-2 * (0.5 + 0.1), -2 * (-3 + 0.1)], rel=1e-6)
    assert metric.block_scores(weight, score[:, None]).tolist() == pytest.approx(score.sigmoid().tolist())


@pytest.mark.parametrize("granularity", ["element", [2, 3]])
@pytest.mark.parametrize("penalty", [0.0, 0.002])
def test_scores_and_masks_are_those_that_autograd_trains(granularity, penalty):
    options = {"lr": 20.0, "penalty": penalty}
    kept = []

    def choose(scores, fraction):
        count = min(int((scores.sigmoid() < 0.5 * fraction).sum()), int(fraction * len(scores)))  # as NNI bounds it
        keep = torch.ones_like(scores, dtype=torch.bool)
        keep[scores.argsort()[:count]] = False
        kept.append(float(keep.double().mean()))
        return keep

    check_straight_through("soft_movement", options, granularity, 0.5, EVERY_STEP, choose)
    assert 0.05 < kept[-1] < 0.95


def test_the_penalty_makes_it_sparser():
    kept = []
    for penalty in (0.0, 0.02, 1.0):
        torch.manual_seed(0)
        layer = nn.Linear(8, 6)
        entry = {"op_names": ["lin"], "sparse_threshold": 0.5}
        options = {"lr": 1.0, "penalty": penalty}
        cfg = config([entry], method="soft_movement", schedule={"name": "one_shot", "end": "2steps"}, options=options)
        pruner, _, _ = attach(cfg, nn.ModuleDict({"lin": layer}), Coupling())
        for step in range(2):
            layer.weight.grad = 0.01 * torch.randn(6, 8, generator=torch.Generator().manual_seed(step))
            pruner.before_step(step)
            pruner.after_step(step)
        kept.append(int(pruner.masks()["lin.weight"].sum()))
    assert 48 > kept[0] > kept[1] >= kept[2] == 0


def test_channels_are_refused_with_what_is_missing():
    with pytest.raises(UserError, match="'out_channel' needs `unit_scores` of method 'soft_movement'"):
        attach(config([{"op_names": ["free"], "granularity": "out_channel"}], method="soft_movement"))
