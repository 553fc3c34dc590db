"""RigL: a step by hand, counts after every update, ERK, equal bits at any number of ranks and across a resume."""

import json
import math

import pytest
import torch
from pruning_nets import Net, attach, config, train
from torch import nn

from dist_compress.errors import UserError

WEIGHT = torch.tensor([[6.0, -1.0, 0.5, 12.0], [2.0, -9.0, 0.1, 3.0], [-0.2, 4.0, 0.3, -7.0]])
ENTRIES = [{"op_names": ["a", "free", "head"]}]
OPTIONS = {"every": 2, "until": "8steps", "fraction": 0.4}


def by_hand(options, grad):
    """Masks before and after the exchange at t = 2 of a layer with `WEIGHT`, its weights, and its gradient's mask."""
    layer = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(WEIGHT)
    options = {"every": 2, "until": "4steps", **options}
    cfg = config([{"op_types": ["Linear"]}], method="rigl", options=options, sparse_ratio=0.5)
    pruner, _, projection = attach(cfg, nn.Sequential(layer))
    pruner.after_step(-1)
    projection.project()
    before = layer.weight != 0
    layer.weight.grad = grad.clone()
    pruner.before_step(1)
    projection.edit_gradients()
    projection.restore()
    pruner.after_step(1)  # the optimizer moves nothing here
    projection.project()
    return before.int().tolist(), (layer.weight != 0), layer.weight.detach().clone(), layer.weight.grad, pruner


def test_a_step_by_hand():
    grad = torch.full((3, 4), 0.5)
    grad[0, 1], grad[1, 3], grad[0, 3] = 5.0, -4.0, 100.0
    before, after, weight, edited, pruner = by_hand({"fraction": 0.7}, grad)
    assert before == [[1, 0, 0, 1], [0, 1, 0, 1], [0, 1, 0, 1]]
    # f(2) = 0.7 / 2 * (1 + cos(pi / 2)) = 0.35, so floor(0.35 * 6) = 2 go: 3 at [1, 3] and 4 at [2, 1]. Of the others
    # [0, 1] and [1, 3] have the largest gradients; [0, 3] is kept anyway. [0, 1] starts at zero, [1, 3] never left.
    mask = ~pruner.elements.removed["0.weight"].view(3, 4)
    assert mask.int().tolist() == [[1, 1, 0, 1], [0, 1, 0, 1], [0, 0, 0, 1]]
    assert weight.tolist() == [[6.0, 0.0, 0.0, 12.0], [0.0, -9.0, 0.0, 3.0], [0.0, 0.0, 0.0, -7.0]]
    assert torch.equal(edited != 0, torch.tensor(before, dtype=torch.bool))  # masked weights are not trained
    assert not after[0, 1]


def test_nothing_is_exchanged_for_smaller_gradients_of_those_that_are_kept():
    """What goes has a smaller weight, not a smaller gradient: it returns if its own gradient is the largest."""
    grad = torch.zeros(3, 4)
    grad[1, 3], grad[2, 1] = 1.0, 1.0
    _, after, weight, _, _ = by_hand({"fraction": 0.7}, grad)
    assert after.int().tolist() == [[1, 0, 0, 1], [0, 1, 0, 1], [0, 1, 0, 1]]
    assert weight[1, 3] == 3.0 and weight[2, 1] == 4.0


def test_random_growth_does_not_look_at_the_size_of_gradients():
    grads = torch.randn(3, 4, generator=torch.Generator().manual_seed(3))
    options = {"fraction": 0.7, "growth": "random"}
    masks = [by_hand({**options, "seed": s}, grads)[4].elements.removed["0.weight"] for s in range(8)]
    assert len({str(m.tolist()) for m in masks}) > 2 and {int(m.sum()) for m in masks} == {6}


def test_counts_are_exact_and_the_share_falls_with_the_cosine():
    pruner, model, projection = attach(config(ENTRIES, method="rigl", options=OPTIONS), total_steps=10)
    assert pruner.change_steps() == [-1, 1, 3, 5]
    names = list(pruner.elements.removed)
    assert names == ["a.weight", "free.weight", "head.weight"]
    moved = []
    for step in range(10):
        before = {n: pruner.elements.removed[n].clone() for n in names} if step else None
        train(pruner, model, projection, range(step, step + 1))
        for name in names:
            gone = pruner.elements.removed[name]
            assert int(gone.sum()) == len(gone) // 2
            if before:
                moved.append((step + 1, name, int((before[name] & ~gone).sum())))
            if name == "a.weight":
                assert torch.equal(model.a.weight.flatten() == 0, gone) or step + 1 in (2, 4, 6)
    for t, name, num in moved:
        kept = len(pruner.elements.removed[name]) - len(pruner.elements.removed[name]) // 2
        most = math.floor(0.2 * (1 + math.cos(math.pi * t / 8)) * kept) if t in (2, 4, 6) else 0
        assert (num == 0) if most == 0 else (0 < num <= most), (t, name, num, most)


def test_with_a_growing_ratio_weights_still_move():
    """As GraNet does (Liu et al. 2021, arXiv:2106.10404)."""
    schedule = {"name": "agp", "start": 0.0, "end": "6steps", "num_decisions": 4}
    options = {**OPTIONS, "every": 1}
    cfg = config([{"op_names": ["a"]}], method="rigl", options=options, schedule=schedule, sparse_ratio=0.8)
    pruner, model, projection = attach(cfg, total_steps=10)
    back = 0
    for step in range(8):
        before = pruner.elements.removed["a.weight"].clone()
        train(pruner, model, projection, range(step, step + 1))
        gone = pruner.elements.removed["a.weight"]
        due = pruner.schedule[max(t for t in pruner.schedule if t <= step + 1)]
        assert int(gone.sum()) == math.floor(round(0.8 * due, 12) * gone.numel())
        back += int((before & ~gone).sum())
    assert back > 0


def test_erk_is_denser_where_layers_are_small():
    options = {**OPTIONS, "distribution": "erk"}
    entries = [{"op_types": ["Conv2d", "Linear"]}]
    pruner, model, _ = attach(config(entries, method="rigl", options=options))
    pruner.after_step(-1)
    removed = pruner.elements.removed
    total = sum(r.numel() for r in removed.values())
    assert sum(int(r.sum()) for r in removed.values()) == total // 2
    density = {n: 1 - int(r.sum()) / r.numel() for n, r in removed.items()}
    erk = {n: sum(s := model.get_parameter(n).shape) / math.prod(s) for n in density}
    free = [n for n in density if density[n] < 1]  # the others, 15 / 72, 20 / 80 and 45 / 200, would be above one
    assert free == ["stem.weight", "a.weight", "b.weight"]
    scale = density[free[0]] / erk[free[0]]
    for name in free:
        assert abs(density[name] - scale * erk[name]) <= 2 / removed[name].numel(), name


def run(at):
    options = {**OPTIONS, "distribution": "erk"}
    pruner, model, projection = attach(config(ENTRIES, method="rigl", options=options), total_steps=8)
    train(pruner, model, projection, range(at or 8))
    if at is not None:
        with projection.lifted():
            weights = {k: v.clone() for k, v in model.state_dict().items()}
        state = pruner.state_dict()
        pruner, model, projection = attach(config(ENTRIES, method="rigl", options=options), Net(seed=9), total_steps=8)
        model.load_state_dict(weights)
        pruner.load_state_dict(state)
        projection.project()
        train(pruner, model, projection, range(at, 8))
    return json.dumps(pruner.history), torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("at", [None, 3, 5])  # in one go; killed between two exchanges and going on without momentum
def test_equal_masks_and_weights_at_any_number_of_ranks(ranks, at):
    history, weights = ranks(1, run, at)[0]
    for size in (2, 3, 4):
        for other, found in ranks(size, run, at):
            assert other == history and torch.equal(found, weights)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"granularity": "out_channel"}, "granularity='out_channel' needs `unit_scores` of method 'rigl'"),
        ({"granularity": "2:4", "sparse_ratio": None}, "rigl exchanges weights anywhere.* method: sr_ste for N:M"),
        ({"global_group_id": "all"}, "rigl'.* and .*global_group_id='all' exclude each other"),
        ({"sparse_threshold": 0.1, "sparse_ratio": None}, "and .*sparse_threshold=0.1 exclude each other"),
        ({"options": {"fraction": 1.0}}, "options.fraction=1.0 must be at least 0 and below 1"),
        ({"options": {"every": 0}}, "options.every=0 must be at least 1"),
        ({"options": {"every": 3}}, "every=3 and options.until=0.75 \\(step 3\\) leave no exchange"),
        ({"options": {"growth": "weight"}}, "growth='weight': choose gradient or random"),
        ({"options": {"distribution": "er"}}, "distribution='er': choose uniform or erk"),
        (
            {"options": {"every": 1, "distribution": "erk"}, "min_sparse_ratio": 0.3, "max_sparse_ratio": 0.3,
             "sparse_ratio": 0.3},
            "sparse_ratio=0.3 keeps 303 of 432, but min_sparse_ratio and max_sparse_ratio .* allow 303 to 302",
        ),
    ],
)  # fmt: skip
def test_refused(keys, said):
    entry = {"op_names": ["a"], "method": "rigl", "options": {"every": 1}, **keys}
    with pytest.raises(UserError, match=said):
        attach(config([entry]))
