import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dist_compress.errors import UserError
from dist_compress.tracing import ModuleCall, trace


def replay(recorded):
    """Runs the tape on the recorded leaves; {ref id: value}."""
    values = {key: recorded.values[key] for key, info in recorded.tensors.items() if info.kind != "value"}

    def fill(item):
        if isinstance(item, (list, tuple)):
            return [fill(x) for x in item]
        return values[item.id].clone() if hasattr(item, "id") else item

    for op in recorded.tape:
        result = op.target(*map(fill, op.args), **{k: fill(v) for k, v in op.kwargs.items()})
        for ref, value in zip(op.outputs, result if isinstance(result, (tuple, list)) else [result], strict=True):
            if ref is not None:
                values[ref.id] = value
    return values


class Mixed(nn.Module):
    """Ties, buffers, constants, in-place ops, a module called twice and python control flow."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.b.weight = self.a.weight
        self.scale = torch.tensor(2.0)

    def forward(self, x, flip=False):
        y = F.relu_(self.norm(self.a(x)))
        if flip:
            y = y.flip(1)
        y = self.b(y) * self.scale
        y[:, 0] = 0
        return {"out": y, "again": self.a(y.t().t())}


def test_tape_is_a_functional_program_of_the_run():
    model = Mixed()
    x = torch.randn(3, 4)
    recorded = trace(model, (x,), {"flip": True}, values=True)
    values = replay(recorded)
    expected = model.eval()(x, flip=True)
    torch.testing.assert_close(recorded.result, expected)
    for ref, tensor in zip(recorded.outputs, expected.values(), strict=True):
        torch.testing.assert_close(values[ref.id], tensor)
    for key, value in values.items():
        torch.testing.assert_close(value, recorded.values[key])
    assert {op.name for op in recorded.tape} >= {"addmm", "relu", "flip", "mul", "native_batch_norm"}


def test_identity_ties_and_modules():
    recorded = trace(Mixed(), (torch.randn(3, 4),))
    infos = {info.fqn: info for info in recorded.tensors.values() if info.fqn}
    assert infos["a.weight"].all_fqns == ("a.weight", "b.weight") and "b.weight" not in infos
    assert infos["norm.running_mean"].kind == "buffer" and infos["a.weight"].kind == "param"
    (mul,) = [op for op in recorded.tape if op.name == "mul"]
    assert [recorded.info(ref).kind for ref in mul.inputs] == ["value", "const"]
    assert [op.module for op in recorded.tape if op.name == "addmm"] == ["a", "b", "a"]
    assert [name for name, _ in recorded.calls] == ["a", "norm", "b", "a", ""]
    assert all(recorded.info(ref).dependent for ref in recorded.outputs)
    assert not any(recorded.tensors[key].dependent for key in recorded.values)


def test_values_before_an_in_place_op_are_kept():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    recorded = trace(model, (torch.randn(5, 4),), values=True)
    before, after = (recorded.values[op.out.id] for op in recorded.tape if op.name in ("addmm", "relu"))
    assert bool((before < 0).any()) and torch.equal(before.relu(), after)


def test_write_through_a_view_makes_the_base_a_new_value():
    class Writes(nn.Module):
        def forward(self, x):
            y = x * 2
            y[:, 0] += 1
            return y + 0

    recorded = trace(Writes(), (torch.ones(2, 3),), values=True)
    scatter = next(op for op in recorded.tape if op.name == "overlay")
    old, source = scatter.inputs
    assert torch.equal(recorded.values[old.id], torch.full((2, 3), 2.0))
    assert recorded.values[scatter.out.id][:, 0].tolist() == [3, 3] and recorded.info(source).shape == (2,)


def test_nothing_of_the_model_changes():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[0].eval()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    call = nn.Module.__call__
    trace(model, (torch.randn(3, 4, generator=torch.Generator()),))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model] == [False, True, True] and model.training
    assert torch.equal(torch.get_rng_state(), random) and nn.Module.__call__ is call
    assert torch.backends.mha.get_fastpath_enabled()


def test_attention_runs_as_matmuls():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    names = [op.name for op in trace(layer, (torch.randn(1, 3, 8),)).tape]
    assert "bmm" in names and not any("attention" in name or "transformer" in name for name in names)


class Broken(nn.Module):
    def forward(self, x):
        raise KeyError("mask")


def test_the_models_own_error_names_the_module():
    model = nn.Sequential(nn.Linear(4, 2), nn.Sequential(nn.ReLU(), Broken()))
    with pytest.raises(UserError, match=r"module '1\.1'.*KeyError.*mask"):
        trace(model, (torch.randn(1, 4),))
    with pytest.raises(UserError, match="module '0'"):
        trace(model, (torch.randn(1, 5),))
    assert nn.Module.__call__.__name__ == "_wrapped_call_impl" and model.training


def test_an_output_without_tensors_is_refused():
    class Silent(nn.Module):
        def forward(self, x):
            return "done"

    with pytest.raises(UserError, match="returned str"):
        trace(Silent(), (torch.randn(1),))


class Gate(nn.Module):
    """A leaf: two inputs, a parameter, a child with a parameter, two outputs."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.inner = nn.Linear(4, 4)

    def forward(self, x, other):
        return self.inner(x) * self.scale, {"sum": x + other["y"]}


class Gated(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.first, self.gate = nn.Linear(4, 4), gate

    def forward(self, x):
        y = self.first(x)
        a, b = self.gate(y, other={"y": x})
        return (a + b["sum"]).relu_()


def test_a_leaf_module_is_one_op():
    model, x = Gated(Gate()), torch.randn(3, 4)
    recorded = trace(model, (x,), values=True, leaves=lambda module: isinstance(module, Gate))
    assert [op.name for op in recorded.tape] == ["t", "addmm", "module:Gate", "add", "relu"]
    leaf = recorded.tape[2]
    assert isinstance(leaf.target, ModuleCall) and leaf.target.module is model.gate and leaf.module == "gate"
    infos = [recorded.info(ref) for ref in leaf.inputs]
    assert [info.fqn for info in infos] == ["", "", "gate.scale", "gate.inner.weight", "gate.inner.bias"]
    assert leaf.inputs[1] == recorded.inputs[0] and leaf.kwargs == {"other": {"y": leaf.inputs[1]}}
    assert [recorded.info(ref).shape for ref in leaf.outputs] == [(3, 4), (3, 4)]
    assert [name for name, _ in recorded.calls] == ["first", "gate", ""]
    torch.testing.assert_close(recorded.result, model.eval()(x))
    assert torch.equal(recorded.values[leaf.outputs[1].id], recorded.values[leaf.inputs[0].id] + x)


class Stores(Gate):
    def forward(self, x, other):
        x.mul_(2)
        return super().forward(x, other)


class Peeks(Gate):
    def forward(self, x, other):
        return super().forward(x @ self.peer.weight, other)


def test_a_leaf_that_does_more_than_its_arguments_say_is_refused():
    with pytest.raises(UserError, match="'gate'.*writes in place"):
        trace(Gated(Stores()), (torch.randn(3, 4),), leaves=lambda module: isinstance(module, Gate))
    model = Gated(Peeks())
    object.__setattr__(model.gate, "peer", model.first)
    with pytest.raises(UserError, match="'gate'.*reads first.weight"):
        trace(model, (torch.randn(3, 4),), leaves=lambda module: isinstance(module, Gate))
