"""Movement against scores that autograd trains straight through the mask, by hand, and gates of channels."""

import pytest
import torch
from pruning_nets import NUM_MICRO, Net, attach, config, means_of, micro_batch, train
from straight_through import check_straight_through
from torch import nn

from dist_compress.errors import UserError
from dist_compress.target import Coupling

EVERY_STEP = {"name": "linear", "start": "1steps", "end": "4steps", "num_decisions": 4}


def lone(weight, **keys):
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
    cfg = config([{"op_names": ["lin"], **keys}], method="movement", schedule=EVERY_STEP)
    return *attach(cfg, nn.ModuleDict({"lin": layer}), Coupling()), layer


def after(pruner, projection, layer, step, grad):
    """The mask after a step with this gradient, at a learning rate of zero."""
    projection.project()
    layer.weight.grad = torch.tensor([grad])
    pruner.before_step(step)
    projection.edit_gradients()
    projection.restore()
    pruner.after_step(step)
    return pruner.masks()["lin.weight"][0].int().tolist()


def test_by_hand_and_what_was_removed_comes_back():
    pruner, _, projection, layer = lone(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), sparse_ratio=0.75)
    pruner.schedule = {1: 1 / 3 + 1e-9, 2: 2 / 3 + 1e-9, 3: 1.0, 4: 1.0}
    assert after(pruner, projection, layer, 0, [1.0, 1.0, -1.0, -1.0]) == [1, 0, 1, 1]  # S = -1, -2, 3, 4: one goes
    assert after(pruner, projection, layer, 1, [1.0, -3.0, 2.0, 0.0]) == [0, 1, 0, 1]  # S = -2, 4, -3, 4
    assert layer.weight.grad.tolist() == [[1.0, 0.0, 2.0, 0.0]]  # what the mask of before lets through
    assert after(pruner, projection, layer, 2, [-9.0, 0.0, 0.0, 3.0]) == [1, 0, 0, 0]  # S = 7, 4, -3, -8
    assert layer.weight.tolist() == [[1.0, 2.0, 3.0, 4.0]]  # beneath the mask, also of what comes back
    projection.project()
    assert layer.weight.tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_a_step_without_a_gradient_leaves_the_scores():
    pruner, _, projection, layer = lone(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), sparse_ratio=0.75)
    after(pruner, projection, layer, 0, [1.0, 1.0, -1.0, -1.0])
    layer.weight.grad = None
    pruner.before_step(1)
    assert pruner.running.scores()["lin.weight"][0].tolist() == [-1.0, -2.0, 3.0, 4.0]


@pytest.mark.parametrize("granularity", ["element", [2, 3], [1, 6], "2:4"])
def test_scores_are_those_that_autograd_trains(granularity):
    def choose(scores, fraction):  # [n] -> which stay
        if granularity == "2:4":
            order = scores.view(-1, 4).argsort(1)
            return torch.ones_like(order, dtype=torch.bool).scatter_(1, order[:, : int(fraction * 2)], False).flatten()
        keep = torch.ones_like(scores, dtype=torch.bool)
        keep[scores.argsort()[: int(0.5 * fraction * len(scores))]] = False
        return keep

    came_back = check_straight_through("movement", {}, granularity, None, EVERY_STEP, choose)
    assert came_back or granularity != "element"


def test_channels_add_up_their_gates_over_all_steps():
    pruner, model, projection = attach(
        config([{"op_names": ["a", "free"], "granularity": "out_channel"}], method="movement", schedule=EVERY_STEP),
        Net().double(),
    )
    total = {"a": torch.zeros(6, dtype=torch.float64), "free": torch.zeros(10, dtype=torch.float64)}
    for step in range(2):  # the decision in between forgets nothing
        for micro in range(NUM_MICRO):
            x, y = micro_batch(step, micro)
            projection.project()
            model.zero_grad()
            nn.functional.cross_entropy(model(x.double()), y).backward()
            pruner.after_backward(step, micro)
            norm, free = model.bn_a, model.free
            total["a"] -= (norm.weight * norm.weight.grad + norm.bias * norm.bias.grad).detach()
            total["free"] -= ((free.weight * free.weight.grad).flatten(1).sum(1) + free.bias * free.bias.grad).detach()
        pruner.before_step(step)
        projection.restore()
        pruner.after_step(step)
        means = dict(zip((s.name for s in pruner.sets), means_of(pruner.listeners["gates_from_start"]), strict=True))
        for name, mean in means.items():
            torch.testing.assert_close(mean, total[name] / (NUM_MICRO * (step + 1)), rtol=1e-6, atol=1e-15)


def test_beside_a_method_that_forgets():
    entries = [
        {"op_names": ["a"], "method": "taylor"},
        {"op_names": ["free"], "granularity": "out_channel"},
        {"op_names": ["head"]},
    ]
    pruner, model, projection = attach(config(entries, method="movement", schedule=EVERY_STEP))
    train(pruner, model, projection, range(3))
    counts = {heard: listener.statistic.count() for heard, listener in pruner.listeners.items()}
    assert counts == {"gates": 0, "gates_from_start": 3} and pruner.running.scores().keys() == {"head.weight"}
    assert set(pruner.state_dict()["running"]) == {"head.weight"}


def test_negative_control_abs_before_the_sum_changes_the_mask():
    generator = torch.Generator().manual_seed(0)
    products = torch.randn(8, 20_000, generator=generator)  # g * w of 8 steps
    right, wrong = ((s.argsort()[:10_000]).tolist() for s in (-products.sum(0), -products.abs().sum(0)))
    assert len(set(right) - set(wrong)) > 1_000


def test_it_needs_a_step():
    with pytest.raises(UserError, match="movement"):
        attach(config([{"op_names": ["free"]}], method="movement"))
