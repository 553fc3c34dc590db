"""Metrics by hand-computed values, Taylor's gates, and a user's own method file."""

import gc
import sys
import textwrap
import weakref

import pytest
import torch
from pruning_nets import NUM_MICRO, Net, attach, config, micro_batch, train
from torch import nn

from dist_compress.errors import UserError
from dist_compress.pruning.metric import View, build_metric
from dist_compress.target import Coupling, Member


def view_of(weights: dict[str, torch.Tensor], members: list[Member], statistic=None) -> View:
    return View(len(members[0].index), tuple(members), weights.__getitem__, statistic)


W = {"a": torch.tensor([[1.0, -2.0], [3.0, 4.0], [0.0, -1.0]]), "b": torch.tensor([[2.0, 0.0, -2.0]])}
ROWS = torch.arange(3)[:, None]


def test_norms_by_hand():
    one = view_of(W, [Member("a", 0, ROWS, "producer")])
    both = view_of(W, [Member("a", 0, ROWS, "producer"), Member("b", 1, ROWS, "producer")])
    wide = view_of(W, [Member("a", 0, torch.tensor([[0, 2]]), "producer")])
    l1, l2 = (build_metric(name, {}, "pruning") for name in ("l1_norm", "l2_norm"))
    assert l1.unit_scores(one).tolist() == [3.0, 7.0, 1.0]
    assert l1.unit_scores(both).tolist() == [2.5, 3.5, 1.5]  # the mean of the members
    assert l2.unit_scores(one).tolist() == pytest.approx([5**0.5, 5.0, 1.0])
    assert l1.unit_scores(wide).tolist() == [4.0]  # a unit of two rows
    assert l1.element_scores(W["b"], None).tolist() == [[2.0, 0.0, 2.0]]


def test_taylor_by_hand():
    taylor = build_metric("taylor", {}, "pruning")
    assert taylor.data_driven
    assert taylor.gate_statistic(torch.tensor([-2.0, 3.0])).tolist() == [4.0, 9.0]
    assert taylor.element_scores(torch.tensor([2.0, -1.0]), torch.tensor([-3.0, 0.5])).tolist() == [6.0, 0.5]


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
        pruner.loss(0, {}, None)
        nn.functional.cross_entropy(model(x), y).backward()
        pruner.after_backward(0, micro)
        for hook in hooks:
            hook.remove()
        g = {name: gate.grad for name, gate in gates.items()}
        expected["stem"] += (g["bn"] + g["bn_b"] + g["depthwise"]).square()
        expected["a"] += g["bn_a"].square()
        expected["free"] += g["free"].square()
    means = pruner.gates.means()
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
        pruner.loss(0, {}, None)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
    alive = weakref.ref(loss)
    pruner.after_backward(0, 0)
    once = pruner.gates.statistic.total().clone()
    pruner.loss(0, {}, None)
    nn.functional.cross_entropy(model(x), y).backward()  # a dummy round: no after_backward
    assert torch.equal(pruner.gates.statistic.total(), once) and once.any()
    del loss
    gc.collect()
    assert alive() is None
    grads = [weakref.ref(p.grad) for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    gc.collect()
    assert all(grad() is None for grad in grads)
    held = sum(t.numel() for t in pruner.gates._latest.values())
    assert held == 6 * 8 + 2 * 6 + 2 * 10  # three gates of the stream, one of a, weight and bias of free
    pruner.loss(0, {}, None)
    assert not pruner.gates._latest


def test_hooks_go_after_the_last_decision_and_the_statistic_restarts():
    entries = [{"op_types": ["Conv2d"]}]
    schedule = {"name": "linear", "start": "1steps", "end": "3steps", "num_decisions": 2}
    pruner, model, projection = attach(config(entries, method="taylor", schedule=schedule))
    train(pruner, model, projection, range(2))
    assert pruner.gates.statistic.count() == 1  # step 1 only: step 0 went into the first decision
    train(pruner, model, projection, range(2, 4))
    assert not pruner.gates.active and [t for t, *_ in pruner.history] == [1, 3]


def test_untrained_gates_are_refused():
    model = Net()
    for p in (model.bn_a.weight, model.bn_a.bias, model.a.weight):
        p.requires_grad_(False)
    keys = {"method": "taylor", "schedule": {"name": "one_shot", "end": "1steps"}}
    with pytest.raises(UserError, match="a: pruning.method='taylor' scores by gradients, but none of bn_a.weight"):
        attach(config([{"op_names": ["a"]}], **keys), model)


OWN = """
from dataclasses import dataclass
import torch
from dist_compress.pruning.metric import Metric, View

@dataclass
class Options:
    first: int = 0

class Mine(Metric):
    def unit_scores(self, view: View) -> torch.Tensor:
        order = torch.arange(view.num_units, dtype=torch.float64)
        return (order - self.options.first) % view.num_units

    def element_scores(self, weight, grad):
        return torch.arange(len(weight))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    folder = tmp_path / "my_pkg"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "mine.py").write_text(OWN)
    (folder / "two.py").write_text(OWN + textwrap.dedent("class Other(Metric): ..."))
    (folder / "bare.py").write_text(OWN.replace("class Options", "class Settings"))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [n for n in sys.modules if n.partition(".")[0] == "my_pkg"]:
        del sys.modules[name]


def test_a_users_own_method(own):
    pruner, _, _ = attach(config([{"op_names": ["a"]}], method="my_pkg.mine", options={"first": 2}))
    pruner.after_step(-1)
    assert pruner.removed[0].tolist() == [False, False, True, True, True, False]
    entry = {"op_names": ["free"], "granularity": "element", "method": "my_pkg.mine", "sparse_ratio": 0.25}
    pruner, _, _ = attach(config([entry, {"op_names": ["a"]}]))
    pruner.after_step(-1)
    assert pruner.elements.removed["free.weight"].tolist() == [True] * 20 + [False] * 60
    assert int(pruner.removed[0].sum()) == 3  # the other entry with the method of the section


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("l3_norm", {}, "pruning.method='l3_norm': no such method. Available: l1_norm, l2_norm, taylor"),
        ("my_pkg.none", {}, "pruning.method='my_pkg.none': cannot import"),
        ("my_pkg.two", {}, "must define one subclass of Metric, but has Mine, Other"),
        ("my_pkg.bare", {}, "has no dataclass `Options`"),
        ("my_pkg.mine", {"frist": 1}, "pruning.options.frist: no such key"),
        ("l1_norm", {"p": 1}, "pruning.options.p"),
    ],
)
def test_refused_methods(own, name, options, said):
    with pytest.raises(UserError) as error:
        attach(config([{"op_names": ["a"]}], method=name, options=options))
    assert said in str(error.value)


def test_nan_scores_are_refused_by_name():
    pruner, model, _ = attach(config([{"op_names": ["free"]}]))
    with torch.no_grad():
        model.free.weight[3, 0] = torch.nan
    with pytest.raises(UserError, match=r"free: 1 pruning scores \(pruning.method='l1_norm'\) are NaN"):
        pruner.after_step(-1)


def test_empty_coupling_is_no_obstacle_for_elements():
    pruner, _, _ = attach(config([{"op_names": ["a"], "granularity": "element"}]), coupling=Coupling())
    assert pruner.change_steps() == [-1]
