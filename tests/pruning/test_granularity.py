"""Blocks, patterns, thresholds and parts: exact counts by hand, schedules, and the same bits at 1 to 4 ranks."""

import json

import pytest
import torch
from pruning_nets import Net, attach, config, train, unit_scores
from torch import nn

from dist_compress import comm
from dist_compress.errors import UserError
from dist_compress.target import Coupling

ALONE = {"dependency_group_id": None}
LINEAR = {"name": "linear", "start": 0.0, "end": 0.75, "num_decisions": 4}


def lone(entry, weight, **keys):
    """A pruner of one linear layer with these weights."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
    cfg = config([{"op_names": ["lin"], **entry}], **keys)
    pruner, model, _ = attach(cfg, nn.ModuleDict({"lin": layer}), Coupling())
    return pruner, model


def kept(entry, weight, **keys):
    """Masks of weight and bias of one linear layer after the only decision."""
    pruner, model = lone(entry, weight, **keys)
    pruner.after_step(-1)
    return {n.removeprefix("lin."): m.expand(model.get_parameter(n).shape) for n, m in pruner.masks().items()}


def test_blocks_go_as_a_whole_by_the_sum_of_their_weights():
    weight = torch.ones(4, 4)
    weight[0, 0] = 9.0  # the block's other weights are small, but it is the best of all
    weight[0, 1:] = weight[1] = 0.1
    weight[2:, 2:] = 2.0
    mask = kept({"granularity": [2, 2]}, weight)["weight"]
    assert mask.tolist() == [[True, True, False, False]] * 2 + [[False, False, True, True]] * 2


def test_rows_take_their_bias_along_but_other_blocks_do_not():
    weight = torch.arange(1.0, 5.0)[:, None] * torch.ones(4, 6)
    for rows in ([1, -1], [[1], "back", -1], [2, 6]):
        masks = kept({"granularity": rows}, weight)
        assert masks["bias"].tolist() == masks["weight"].all(1).tolist() == [False, False, True, True]
    assert "bias" not in kept({"granularity": [1, 3]}, weight)
    own = {"granularity": [1, -1], "target_settings": {"bias": {"sparse_ratio": 0.25, "granularity": "element"}}}
    assert int((~kept(own, weight)["bias"]).sum()) == 1  # a target of its own follows nobody


def test_a_pattern_keeps_the_best_of_each_run_of_weights():
    weight = torch.tensor([[4.0, -3.0, 2.0, 1.0, 1.0, 2.0, -3.0, 4.0]])
    assert kept({"granularity": "2:4"}, weight)["weight"].tolist() == [
        [True, True, False, False, False, False, True, True]
    ]
    assert kept({"granularity": "1:2"}, weight)["weight"].tolist() == [
        [True, False, True, False, False, True, False, True]
    ]
    assert int(kept({"granularity": "3:8"}, weight)["weight"].sum()) == 3
    conv = nn.ModuleDict({"conv": nn.Conv2d(8, 3, 3)})
    pruner, _, _ = attach(config([{"op_names": ["conv"], "granularity": "1:4"}]), conv, Coupling())
    pruner.after_step(-1)
    mask = pruner.masks()["conv.weight"]
    assert (mask.view(3, 2, 4, 3, 3).sum(2) == 1).all()
    [row] = pruner.results()["groups"]
    assert (row["asked"], row["given"], row["reason"]) == (0.75, 0.75, "")


def test_a_pattern_grows_with_the_schedule():
    pruner, model = lone({"granularity": "1:4"}, torch.randn(4, 8), schedule=LINEAR)
    zeros = []
    for t, fraction in pruner.schedule.items():
        pruner.decide(t)
        zeros.append(int((~pruner.masks()["lin.weight"]).sum()))
        assert zeros[-1] == 8 * int(fraction * 3)
    assert zeros == [0, 8, 16, 24]
    pruner, model = lone({"granularity": "1:4"}, torch.randn(4, 8), schedule={**LINEAR, "num_decisions": 3})
    zeros = []
    for t in pruner.schedule:
        pruner.decide(t)
        zeros.append(int((~pruner.masks()["lin.weight"]).sum()))
    assert zeros == [8, 16, 24]  # a third is one, which floats are not


def test_a_pattern_of_equal_weights_is_still_exact():
    assert (kept({"granularity": "2:4"}, torch.zeros(8, 16))["weight"].view(8, 4, 4).sum(2) == 2).all()


@pytest.mark.parametrize(
    ("bounds", "gone"),
    [
        ({}, 3),
        ({"max_sparse_ratio": 0.2}, 2),
        ({"max_sparse_ratio": 0.3}, 3),
        ({"min_sparse_ratio": 0.6}, 6),
        ({"min_sparse_ratio": 0.55}, 6),  # at least
        ({"max_sparse_ratio": 0.29}, 2),  # at most
    ],
)
@pytest.mark.parametrize("granularity", ["element", "out_channel", [1, -1]])
def test_what_scores_below_the_threshold_goes_within_the_bounds(granularity, bounds, gone):
    weight = torch.arange(1.0, 11.0)[:, None]
    entry = {"granularity": granularity, "sparse_threshold": 4.0, **ALONE, **bounds}
    mask = kept(entry, weight)["weight"].flatten()
    assert mask.tolist() == [False] * gone + [True] * (10 - gone)


def test_a_score_equal_to_the_threshold_stays_also_in_float32():
    weight = torch.tensor([[0.7], [0.3], [0.1]])
    assert kept({"granularity": "element", "sparse_threshold": 0.7}, weight)["weight"].flatten().tolist() == [
        True,
        False,
        False,
    ]
    assert kept({"granularity": "element", "sparse_threshold": -1.0}, weight)["weight"].all()
    assert not kept({"granularity": "element", "sparse_threshold": 8.0}, weight)["weight"].any()


def test_a_threshold_leaves_one_channel_of_a_set():
    masks = kept({"sparse_threshold": 99.0, **ALONE}, torch.arange(1.0, 5.0)[:, None])
    assert masks["weight"].flatten().tolist() == [False, False, False, True]


def test_threshold_and_bounds_grow_with_the_schedule_and_what_is_gone_stays():
    weight = torch.arange(1.0, 11.0)[:, None]
    for granularity in ("element", "out_channel"):
        entry = {"granularity": granularity, "sparse_threshold": 8.0, "max_sparse_ratio": 0.6, **ALONE}
        pruner, model = lone(entry, weight, schedule=LINEAR)
        gone = []
        for t in pruner.schedule:
            pruner.decide(t)
            gone.append(int((~pruner.masks()["lin.weight"]).sum()))
        assert gone == [1, 3, 4, 6]  # below 2, 4, 6, 8 are 1, 3, 5, 7; at most 1.5, 3, 4.5, 6
        [row] = pruner.results()["groups"]
        assert row["asked"] is None and row["given"] == 0.6 and row["reason"] == "scores below 8"
        assert json.loads(json.dumps(pruner.results()))


def test_the_ratio_holds_in_each_part():
    pruner, model, _ = attach(
        config(
            [{"op_names": ["stem", "b"], "internal_metric_block": 2}, {"op_names": ["b"], "internal_metric_block": 4}]
        )
    )
    pruner.after_step(-1)
    assert pruner.sets[0].num_parts == 4  # the least common multiple
    assert (pruner.removed[0].view(4, 2).sum(1) == 1).all()
    score = unit_scores(pruner)[0].view(4, 2)
    assert torch.equal(pruner.removed[0].view(4, 2).float().argmax(1), score.argmin(1))
    entry = {"op_names": ["a"], "internal_metric_block": 4}
    with pytest.raises(UserError, match=r"a: pruning.config_list\[0\].internal_metric_block=4: 6 units cannot be cut"):
        attach(config([entry]))
    entry = {"op_names": ["a"], "internal_metric_block": 6}
    with pytest.raises(UserError, match=r"internal_metric_block=6: there are 6 units, so that each part is a single"):
        attach(config([entry]))


def test_nan_scores_of_patterns_and_thresholds_are_refused():
    weight = torch.ones(4, 4)
    weight[1, 1] = torch.nan
    for entry in ({"granularity": "2:4"}, {"granularity": "element", "sparse_threshold": 0.5}):
        with pytest.raises(UserError, match=r"lin: 1 pruning scores \(pruning.method='l1_norm'\) are NaN"):
            kept(entry, weight)


RANKS = [
    {"op_names": ["stem"], "granularity": [2, 3, 1, 1], "sparse_ratio": 0.4, "global_group_id": 0, "method": "taylor"},
    {"op_names": ["a"], "granularity": "2:4", "method": "taylor", "sparse_ratio": None},
    {
        "op_names": ["b"],
        "granularity": [1, 2, 3, 3],
        "sparse_threshold": 1.0,
        "max_sparse_ratio": 0.7,
        "method": "l2_norm",
    },
    {"op_names": ["depthwise"], "granularity": "element", "sparse_threshold": 0.1, "method": "l1_norm"},
    {"op_names": ["free"], "internal_metric_block": 5, "method": "l1_norm", **ALONE},
    {"op_names": ["head"], "granularity": [5, 1], "method": "taylor"},
    {"op_names": ["bn"], "target_names": ["weight"], "sparse_threshold": 0.9, "max_sparse_ratio": 0.5},
]


def trained(entries, steps):
    schedule = {"name": "agp", "start": "1steps", "end": f"{steps - 1}steps", "num_decisions": 3}
    pruner, model, projection = attach(config(entries, schedule=schedule), total_steps=steps)
    train(pruner, model, projection, range(steps))
    return pruner.history, torch.cat([p.detach().flatten() for p in model.parameters()])


def test_every_granularity_decides_the_same_at_any_number_of_ranks(ranks):
    history, weights = ranks(1, trained, RANKS, 4)[0]
    assert len({mark for *_, mark in history}) == 3
    for size in (2, 3, 4):
        for other, final in ranks(size, trained, RANKS, 4):
            assert other == history and torch.equal(final, weights)


def drifted(entries):
    """Rank 1's replica is off by an ulp, and still has the mask that the owners decided."""
    pruner, model, _ = attach(config(entries))
    if comm.rank() == 1:
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.nextafter(p, torch.full_like(p, torch.inf)))
    pruner.after_step(-1)
    return pruner.history


def test_drifted_replicas_agree_on_blocks_and_patterns(ranks):
    entries = [
        {"op_names": ["a"], "granularity": "1:2"},
        {"op_names": ["b"], "granularity": [4, 3, 1, 1]},
        {"op_names": ["head"], "granularity": "element", "sparse_threshold": 0.05},
    ]
    a, b = ranks(2, drifted, entries)
    assert a == b


def resumed(entries, steps, at):
    pruner, model, projection = attach(config(entries, schedule=SCHEDULE), total_steps=steps)
    train(pruner, model, projection, range(at))
    with projection.lifted():
        weights = {k: v.clone() for k, v in model.state_dict().items()}
    again, model, projection = attach(config(entries, schedule=SCHEDULE), Net(seed=9), total_steps=steps)
    model.load_state_dict(weights)
    again.load_state_dict(pruner.state_dict())
    return again.history, torch.cat([mask.flatten() for mask in again.masks().values()]), pruner.masks()


SCHEDULE = {"name": "agp", "start": "1steps", "end": "3steps", "num_decisions": 2}


def test_a_resumed_pruner_has_the_same_masks():
    history, masks, before = resumed(RANKS, 4, 3)
    assert len(history) == 2 and torch.equal(masks, torch.cat([mask.flatten() for mask in before.values()]))


def collectives(entries):
    pruner, *_ = attach(config(entries, method="l1_norm"))
    comm.calls.clear()
    pruner.after_step(-1)
    return dict(comm.calls)


def test_collectives_do_not_grow_with_the_targets(ranks):
    entry = {"granularity": "element", "sparse_threshold": 0.1}
    one = ranks(2, collectives, [{"op_names": ["a"], **entry}])[0]
    all_of_them = ranks(
        2, collectives, [{"op_types": ["Conv2d"], **entry}, {"op_names": ["head"], "granularity": "2:4"}]
    )[0]
    assert all_of_them["all_reduce"] <= one["all_reduce"] + 4 <= 12  # passes until the last group is settled
    pattern = ranks(2, collectives, [{"op_names": ["a"], "granularity": "2:4"}])[0]
    # NaN check; the bits; the fingerprint and counts of the histogram
    assert pattern == {"all_reduce": 2, "all_to_all": 1}
