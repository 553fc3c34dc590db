"""Channel Taylor is the gradient of the unit's gate, by autograd and by hand; never a sum that is noise."""

import gc
import weakref

import pytest
import torch
from pruning_nets import NUM_MICRO, Net, attach, config, means_of, micro_batch, train
from torch import nn

from dist_compress.errors import UserError
from dist_compress.pruning.elements import GRAD
from dist_compress.pruning.metric import build_metric


def test_taylor_by_hand():
    taylor = build_metric("taylor", {}, "pruning")
    assert taylor.data_driven
    assert taylor.gate_statistic(torch.tensor([-2.0, 3.0])).tolist() == [4.0, 9.0]
    weight, grad = torch.tensor([2.0, -1.0]), torch.tensor([-3.0, 0.5])
    assert taylor.block_scores(weight[:, None], grad[:, None]).tolist() == [6.0, 0.5]
    assert taylor.block_scores(weight[None], grad[None]).tolist() == [6.5]  # signs count inside of a block


def taylor_net(entries, dtype=torch.float32, **keys):
    schedule = {"name": "one_shot", "end": "2steps"}
    return attach(config(entries, method="taylor", schedule=schedule, **keys), Net().to(dtype))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-6)])
def test_gates_equal_the_gradient_of_a_real_gate(dtype, tolerance):
    """dL/dz at z = 1 of a factor on the unit's output, measured by autograd, micro-batch by micro-batch."""
    pruner, model, _ = taylor_net([{"op_types": ["Conv2d"]}], dtype)
    expected = {name: torch.zeros(num, dtype=dtype) for name, num in (("stem", 8), ("a", 6), ("free", 10))}
    for micro in range(NUM_MICRO):
        x, y = micro_batch(0, micro)
        x = x.to(dtype)
        sizes = {"bn": 8, "bn_a": 6, "bn_b": 8, "depthwise": 8, "free": 10}
        gates = {name: torch.ones(num, dtype=dtype, requires_grad=True) for name, num in sizes.items()}
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
    means = means_of(pruner.listeners["gates"])
    for s, mean in zip(pruner.sets, means, strict=True):
        close = {"rtol": tolerance, "atol": 1e-9 if dtype == torch.float32 else 0.0}
        torch.testing.assert_close(mean.to(dtype), expected[s.name] / NUM_MICRO, **close)


def test_single_weights_and_blocks_equal_an_independent_computation_in_float64():
    """abs(sum of w dL/dw) over the whole batch, by autograd through copies of the weights, not through hooks."""
    entries = [{"op_names": ["a"], "granularity": "element"}, {"op_names": ["free"], "granularity": [2, 4, 1, 1]}]
    cfg = config(entries, method="taylor", schedule={"name": "one_shot", "end": "1steps"})
    pruner, model, _ = attach(cfg, Net().double())
    reference = Net().double()
    names = ("a.weight", "free.weight")
    total = [torch.zeros_like(reference.get_parameter(name)) for name in names]
    for micro in range(NUM_MICRO):
        x, y = micro_batch(0, micro)
        nn.functional.cross_entropy(model(x.double()), y).backward()
        pruner.after_backward(0, micro)
        loss = nn.functional.cross_entropy(reference(x.double()), y)
        grads = torch.autograd.grad(loss, [reference.get_parameter(name) for name in names])
        total = [t + g for t, g in zip(total, grads, strict=True)]
    pruner.before_step(0)
    wanted = [reference.get_parameter(n).detach() * t for n, t in zip(names, total, strict=True)]
    wanted[1] = wanted[1].view(5, 2, 2, 4).sum((1, 3))
    evidence = pruner._placed()
    heard = evidence.rows(evidence.gather(pruner.scorers), GRAD)
    for tensor, want in zip(pruner.elements.tensors(), wanted, strict=True):
        rows = tensor.blocks.rows(model.get_parameter(tensor.name).detach())
        scores = pruner.scorers[tensor.setting.name].block_scores(rows, heard[tensor.name][0])
        torch.testing.assert_close(scores, want.abs().flatten(), rtol=1e-6, atol=0.0)


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
