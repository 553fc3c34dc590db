"""The user's own ops and modules: rules, one-liners, resize, replacement; and that a wrong rule is told."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dist_compress import speedup
from dist_compress.errors import UserError
from dist_compress.speedup import Barrier, Bilinear, Movement, PassThrough, Pointwise, Rule, registered
from dist_compress.speedup.custom import register_op, unregister_op
from dist_compress.speedup.probe import probe
from dist_compress.tracing import trace


@torch.library.custom_op("test_rules::project", mutates_args=())
def project(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.einsum("...i,io->...o", x, w)
    return out if b is None else out + b


@torch.library.custom_op("test_rules::swish", mutates_args=())
def swish(x: torch.Tensor, slope: float) -> torch.Tensor:
    return x * torch.sigmoid(slope * x)


@torch.library.custom_op("test_rules::centre", mutates_args=())
def centre(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(-1, keepdim=True)


@torch.library.custom_op("test_rules::turn", mutates_args=())
def turn(x: torch.Tensor) -> torch.Tensor:
    return -x.flip(1).transpose(1, 2).contiguous()


@torch.library.custom_op("test_rules::width", mutates_args=())
def width(x: torch.Tensor) -> torch.Tensor:
    return x / x.shape[-1]


@torch.library.custom_op("test_rules::noise", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def noise(x: torch.Tensor) -> torch.Tensor:
    return x + 0 * torch.rand_like(x)


class Net(nn.Module):
    def __init__(self, fn, width=8, **modules):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8, bias=False), nn.Linear(width, 3)
        for name, module in modules.items():
            setattr(self, name, module)
        self.fn = fn

    def forward(self, x):
        return self.last(self.fn(self, self.first(x)))


class Projection(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 10)), nn.Parameter(torch.randn(10))

    def forward(self, x):
        return project(x, self.weight, self.bias)


def make(batch):
    return torch.randn(batch, 5, 6)


MASKS = {"first.weight": [1, 6], "p.weight": (1, [0, 3, 4]), "p.bias": [0, 3, 4]}


@pytest.mark.parametrize(
    "rule", [Bilinear("x", "w", "b"), Bilinear(0, 1, 2, equation="...i,io->...o")], ids=["found", "equation"]
)
def test_a_bilinear_op_in_one_line(shrink, rule):
    with registered(project, rule):
        small, _ = shrink(Net(lambda m, x: m.p(x).relu(), width=10, p=Projection()), make, MASKS)
    assert small.first.weight.shape == (6, 6) and small.p.weight.shape == (6, 7) and small.last.weight.shape == (3, 7)


def test_macs_of_a_bilinear_op_are_counted():
    model = Net(lambda m, x: m.p(x), width=10, p=Projection())
    with registered(project, Bilinear("x", "w", "b")):
        costs = {cost.fqn: cost for cost in speedup.coupling(model, (make(1),)).layers}
    assert costs["p"].macs == 5 * 8 * 10 and len(costs["p"].factors) == 2
    assert "p" not in {cost.fqn for cost in speedup.coupling(model, (make(1),)).layers}


CUT, WHOLE = (6, 6), (8, 6)


@pytest.mark.parametrize(
    ("op", "rule", "shape"),
    [
        (swish, Pointwise(), CUT),
        (turn, Movement(), CUT),
        (centre, Barrier(), WHOLE),
        (centre, Barrier(dims=-1), WHOLE),
        (swish, PassThrough(dims=-1), CUT),
        (swish, PassThrough(dims=1), WHOLE),
        (swish, None, CUT),  # by the probe, as are the rest
        (turn, None, CUT),
        (centre, None, WHOLE),
        (width, None, WHOLE),
        (noise, None, WHOLE),
    ],
    ids=lambda value: getattr(value, "_qualname", type(value).__name__ if isinstance(value, Rule) else str(value)),
)
def test_one_liners_and_the_probe(shrink, op, rule, shape):
    arguments = (0.7,) if op is swish else ()
    model = Net(lambda m, x: op(x, *arguments).transpose(1, 2) if op is turn else op(x, *arguments))
    if rule is None:
        small, plan = shrink(model, make, {"first.weight": [1, 6]})
    else:
        with registered(op, rule):
            small, plan = shrink(model, make, {"first.weight": [1, 6]})
    assert small.first.weight.shape == shape, plan.blocked


@pytest.mark.parametrize("wrong", [Pointwise(), Barrier(dims=1)], ids=["Pointwise", "Barrier"])
def test_a_wrong_rule_is_told_and_the_model_unchanged(wrong):
    torch.manual_seed(0)
    model = Net(lambda m, x: width(F.relu(x)) + 1)
    with torch.no_grad():
        model.first.weight[[1, 6]] = 0
    before = copy.deepcopy(model.state_dict())
    with registered(width, wrong), pytest.raises(UserError, match="registered for width is wrong.*first op"):
        speedup.plan(model, (make(2),))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert speedup.plan(model, (make(2),)).keep == {}, "without the rule the op is a barrier"


class Attention(nn.Module):
    """Holds its width in an integer that its forward reads."""

    def __init__(self, width):
        super().__init__()
        self.width, self.scale = width, nn.Parameter(torch.rand(width))

    def forward(self, x):
        return x * torch.sigmoid(self.scale).view(1, 1, self.width)


class AttentionRule:
    def link(self, op, s):
        x, scale = op.inputs
        for a, b in zip(s.dims(x), s.dims(op.out), strict=True):
            s.same(a, b)
        s.same(s.dims(x)[2], s.dims(scale)[0])

    def taint(self, op, f):
        return [f.tainted(op.inputs[0])]

    def live(self, op, f, seen):
        yield op.inputs[0], seen[0]

    def resize(self, module, keep):
        module.width = len(keep["output0"][2])


def test_a_module_that_holds_its_size_is_resized(shrink):
    with registered(Attention, AttentionRule):
        small, plan = shrink(Net(lambda m, x: m.a(x), a=Attention(8)), make, {"first.weight": [1, 6]})
        assert small.a.width == 6 and small.a.scale.shape == (6,) and small.first.weight.shape == (6, 6)
        assert {name: list(dims) for name, dims in plan.resized["a"].items()} == {
            "input0": [2], "output0": [2], "scale": [0]
        }  # fmt: skip
    with pytest.raises(UserError, match="register_op.Attention"):
        speedup.apply(Net(None, a=Attention(8)), plan)


class Narrower(Attention):
    pass


def test_a_module_is_replaced_and_subclasses_follow_the_rule(shrink):
    class Replacing(AttentionRule):
        resize = None

        def replace(self, module, keep):
            made = Attention(len(keep["scale"][0]))
            made.scale = module.scale
            return made

    with registered(Attention, Replacing):
        small, _ = shrink(Net(lambda m, x: m.a(x), a=Narrower(8)), make, {"first.weight": [1, 6]})
    assert type(small.a) is Attention and small.a.width == 6 and not small.a.training


def test_a_resize_that_fails_leaves_the_model_as_it_was():
    class Broken(AttentionRule):
        def resize(self, module, keep):
            module.width = 1
            raise RuntimeError("no")

    model = Net(lambda m, x: m.a(x), a=Attention(8))
    with registered(Attention, AttentionRule):
        with torch.no_grad():
            model.first.weight[[1, 6]] = 0
        plan = speedup.plan(model, (make(2),))
    with registered(Attention, Broken), pytest.raises(RuntimeError, match="no"):
        speedup.apply(model, plan)
    assert model.a.width == 8 and model.first.weight.shape == (8, 6)


def test_what_is_no_target_or_no_rule_is_refused():
    class Function(torch.autograd.Function):
        pass

    for target, rule, match in (
        (torch.relu, Pointwise(), "neither an op"),
        (nn.Module, Pointwise(), "neither an op"),
        (Function, Pointwise(), "autograd.Function"),
        (swish, object, "no rule"),
        (swish, 3, "no rule"),
    ):
        with pytest.raises(UserError, match=match):
            register_op(target, rule)
    with registered(swish, Pointwise()), pytest.raises(UserError, match="has a rule already"):
        register_op(torch.ops.test_rules.swish.default, Pointwise())
    with pytest.raises(UserError, match="no rule of yours"):
        unregister_op(torch.ops.test_rules.swish)


def test_the_probe_runs_once_per_op_and_shape():
    recorded = trace(Net(lambda m, x: centre(x)), (make(2),), values=True)
    op = next(op for op in recorded.tape if op.name == "centre")
    assert probe(op, recorded) is probe(op, recorded) and probe(op, recorded).found.outputs == (("o0d0", "o0d1", None),)


PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture(scope="module")
def examples():
    """The names that the three files of docs/extending.md define."""
    names = {}
    for file in ("ops", "gate", "pairs"):
        (code,) = re.findall(rf"^`mine/{file}\.py`:\n\n```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
        exec(compile(code, f"mine/{file}.py", "exec"), names)
    yield names
    for name in ("project", "ChannelGate", "gate_pairs"):
        unregister_op(names[name])


def test_the_documented_projection(examples, shrink):
    model = Net(lambda m, x: m.p(x).relu(), width=10, p=examples["Projection"](8, 10))
    small, _ = shrink(model, make, {"first.weight": [1, 6], "p.weight": (1, [0, 3, 4])})
    assert small.p.weight.shape == (6, 7)
    layers = {layer.fqn: layer.macs for layer in speedup.coupling(model, (make(1),)).layers}
    with FlopCounterMode(display=False) as counter:
        model(make(1))
    assert counter.get_total_flops() == 2 * sum(layers.values()) and layers["p"] == 5 * 8 * 10


def test_the_documented_module(examples, shrink):
    model = Net(lambda m, x: m.g(x.transpose(1, 2)).transpose(1, 2), g=examples["ChannelGate"](8))
    small, _ = shrink(model, make, {"first.weight": [1, 6]})
    assert small.g.width == 6 and small.g.scale.shape == (6,)


def test_the_documented_rule(examples, shrink):
    model = Net(lambda m, x: examples["gate_pairs"](x), width=4)
    small, plan = shrink(model, make, {"first.weight": [0, 3, 4, 5]})  # 3 alone is the gate of a value that stays
    assert small.first.weight.shape == (4, 6) and small.last.weight.shape == (3, 2), plan.blocked


@pytest.mark.parametrize(
    ("fn", "mixed"),
    [
        (lambda x: x.softmax(-1), {2}),
        (lambda x: F.layer_norm(x, (8,)), {2}),
        (lambda x: x.cumsum(1), {1}),
        (lambda x: x.sort(-1).values, {2}),
        (lambda x: F.batch_norm(x, None, None, training=True), {0, 2}),
        (lambda x: F.avg_pool1d(x, 3, 1, 1), {2}),
        (lambda x: x.renorm(2, 0, 1.0), {1, 2}),
        (lambda x: torch.erfinv(x), set()),
    ],
)
def test_the_probe_finds_what_an_op_mixes(fn, mixed):
    recorded = trace(Net(lambda m, x: fn(x)), (make(3),), values=True)
    op = next(op for op in recorded.tape if op.module == "" and recorded.info(op.out).shape == (3, 5, 8))
    rule = probe(op, recorded)
    found = rule.found.outputs[0] if hasattr(rule, "found") else (None,) * 3
    assert {d for d, name in enumerate(found) if name is None} >= mixed
    assert hasattr(rule, "found") or mixed, "a pointwise op is found to pass"


def test_an_autograd_function_needs_no_rule(shrink):
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * x

        @staticmethod
        def backward(ctx, grad):
            return grad

    small, _ = shrink(Net(lambda m, x: Square.apply(x)), make, {"first.weight": [1, 6]})
    assert small.first.weight.shape == (6, 6)


@torch.jit.script
def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def test_a_scripted_function_that_a_module_holds():
    torch.manual_seed(0)
    model = Net(lambda m, x: m.act(x), act=quick_gelu)
    with torch.no_grad():
        model.first.weight[2] = 0
    small, report = speedup.speedup(model, (torch.randn(2, 6),))
    assert small.first.out_features == 7 and small.act is quick_gelu and report.difference < 1e-5
