"""Channel Taylor is the gradient of the unit's gate, by autograd and by hand; never a sum that is noise."""

import gc
import weakref

import pytest
import torch
from pruning_nets import NUM_MICRO, Net, attach, config, micro_batch, train
from torch import nn

from dist_compress.errors import UserError
from dist_compress.pruning.metric import build_metric


def test_taylor_by_hand():
    taylor = build_metric("taylor", {}, "pruning")
    assert taylor.data_driven
    assert taylor.gate_statistic(torch.tensor([-2.0, 3.0])).tolist() == [4.0, 9.0]
    weight, grad = torch.tensor([2.0, -1.0]), torch.tensor([-3.0, 0.5])
    assert taylor.block_scores(weight[:, None], grad[:, None]).tolist() == [6.0, 0.5]
    assert taylor.block_scores(weight[None], grad[None]).tolist() == [6.5]  # signs count inside of a block


def taylor_net(entries, **keys):
    schedule = {"name": "one_shot", "end": "2steps"}
    return attach(config(entries, method="taylor", schedule=schedule, **keys))


def test_gates_equal_the_gradient_of_a_real_gate():
    """dL/dz at z = 1 of a factor on the unit's output, measured by autograd, micro-batch by micro-batch."""
    pruner, model, _ = taylor_net([{"op_types": ["Conv2d"]}])
    expected = {"stem": torch.zeros(8), "a": torch.zeros(6), "free": torch.zeros(10)}
    for micro in range(NUM_MICRO):
        x, y = micro_batch(0, micro)
        gates = {
            name: torch.ones(norm.num_features, requires_grad=True)
            for name, norm in (("bn", model.bn), ("bn_a", model.bn_a), ("bn_b", model.bn_b))
        }
        gates |= {"depthwise": torch.ones(8, requires_grad=True), "free": torch.ones(10, requires_grad=True)}
        hooks = [
            model.get_submodule(name).register_forward_hook(lambda m, i, o, g=gate: o * g[:, None, None])
            for name, gate in gates.items()
        ]
        nn.functional.cross_entropy(model(x), y).backward()
        pruner.after_backward(0, micro)
        for hook in hooks:
            hook.remove()
        g = {name: gate.grad for name, gate in gates.items()}
        expected["stem"] += (g["bn"] + g["bn_b"] + g["depthwise"]).square()
        expected["a"] += g["bn_a"].square()
        expected["free"] += g["free"].square()
    means = pruner.listeners["gates"].means()
    for s, mean in zip(pruner.sets, means, strict=True):
        torch.testing.assert_close(mean.float(), expected[s.name] / NUM_MICRO, rtol=1e-4, atol=1e-9)


def test_sum_of_g_times_w_is_noise_behind_a_batch_norm_but_the_gate_is_not():
    model = Net()
    pruner, _, _ = attach(
        config([{"op_names": ["a"]}], method="taylor", schedule={"name": "one_shot", "end": "1steps"}), model
    )
    x, y = micro_batch(0, 0)
    nn.functional.cross_entropy(model(x), y).backward()
    product = (model.a.weight.grad * model.a.weight).flatten(1)
    gate = model.bn_a.weight * model.bn_a.weight.grad + model.bn_a.bias * model.bn_a.bias.grad
    assert (product.sum(1).abs() / product.abs().sum(1)).max() < 1e-3
    assert product.sum().abs() / product.abs().sum() < 1e-5
    assert (gate.abs() / product.abs().sum(1)).median() > 1e-2
    free = (model.free.weight.grad * model.free.weight).flatten(1)  # no norm follows: this one is a signal
    assert (free.sum(1).abs() / free.abs().sum(1).clamp_min(1e-12)).median() > 1e-2


def test_dummy_rounds_touch_nothing_and_hooks_keep_nothing():
    pruner, model, _ = taylor_net([{"op_types": ["Conv2d"]}])
    x, y = micro_batch(0, 0)
    for _ in range(2):  # only the last backward before after_backward counts
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
    alive = weakref.ref(loss)
    pruner.after_backward(0, 0)
    once = pruner.listeners["gates"].statistic.total().clone()
    nn.functional.cross_entropy(model(x), y).backward()  # a dummy round: no after_backward
    assert torch.equal(pruner.listeners["gates"].statistic.total(), once) and once.any()
    del loss
    gc.collect()
    assert alive() is None
    grads = [weakref.ref(p.grad) for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    gc.collect()
    assert all(grad() is None for grad in grads)
    held = sum(t.numel() for t in pruner.listeners["gates"].latest.values())
    assert held == 6 * 8 + 2 * 6 + 2 * 10  # three gates of the stream, one of a, weight and bias of free
    model(x)  # the next round
    assert not pruner.listeners["gates"].latest


def test_hooks_go_after_the_last_decision_and_the_statistic_restarts():
    entries = [{"op_types": ["Conv2d"]}]
    schedule = {"name": "linear", "start": "1steps", "end": "3steps", "num_decisions": 2}
    pruner, model, projection = attach(config(entries, method="taylor", schedule=schedule))
    train(pruner, model, projection, range(2))
    assert pruner.listeners["gates"].statistic.count() == 1  # step 1 only: step 0 went into the first decision
    train(pruner, model, projection, range(2, 4))
    assert not pruner.listeners["gates"].active and [t for t, *_ in pruner.history] == [1, 3]


def test_untrained_gates_are_refused():
    model = Net()
    for p in (model.bn_a.weight, model.bn_a.bias, model.a.weight):
        p.requires_grad_(False)
    keys = {"method": "taylor", "schedule": {"name": "one_shot", "end": "1steps"}}
    with pytest.raises(UserError, match="a: pruning.method='taylor' scores by gradients, but none of bn_a.weight"):
        attach(config([{"op_names": ["a"]}], **keys), model)
