"""What a recorded graph knows beyond its ops: integers of modules, the training mode; and what a failure tells."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dist_compress.errors import UserError
from dist_compress.speedup import verify
from dist_compress.tracing import TraceError, concrete_trace, trace


class Heads(nn.Module):
    def __init__(self, num_heads=4, head_dim=2):
        super().__init__()
        self.num_heads, self.head_dim, self.calls, self.causal = num_heads, head_dim, 0, True
        self.proj = nn.Linear(8, num_heads * head_dim)

    def forward(self, x):
        self.calls += 1
        x = self.proj(x).view(x.shape[0], -1, self.num_heads, self.head_dim)
        return F.dropout(x.transpose(1, 2), 0.5 if self.causal else 0.1, training=self.training)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Heads(), Heads(2, 4)

    def forward(self, x):
        return self.a(x), self.b(x)


X = torch.randn(2, 3, 8)


def test_integers_of_modules_are_attributes_of_the_graph():
    model = Two().eval()
    graph = concrete_trace(model, (X,))
    targets = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    assert {"a.num_heads", "a.head_dim", "b.num_heads", "b.head_dim"} <= targets and "a.causal" not in targets
    assert [out.shape for out in graph(X)] == [out.shape for out in model(X)] == [(2, 4, 3, 2), (2, 2, 3, 4)]
    graph.a.num_heads, graph.a.head_dim = 2, 4
    assert graph(X)[0].shape == (2, 2, 3, 4)
    assert model.a.num_heads == 4, "the graph has its own"


def test_integers_come_back_as_they_were():
    model = Two()
    concrete_trace(model, (X,))
    assert type(model.a.num_heads) is int and model.a.num_heads == 4 and type(model.a.calls) is int
    with pytest.raises(UserError):
        concrete_trace(model, (X[..., :3],))
    assert type(model.b.head_dim) is int and model.a.calls == 0
    twin = copy.deepcopy(model)
    assert type(twin.a.num_heads) is int


def test_functional_dropout_follows_the_mode_of_the_graph():
    torch.manual_seed(0)
    graph = concrete_trace(Two().train(), (X,))
    assert not torch.equal(graph(X)[0], graph(X)[0])
    graph.eval()
    assert torch.equal(graph(X)[0], graph(X)[0])
    assert not concrete_trace(Two().eval(), (X,)).training


class Literal(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 6)

    def forward(self, x):
        return self.fc(x).view(-1, 5, 7)  # the guilty line


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class InPython(nn.Module):
    def forward(self, x):
        return x[{}["missing"]]


@pytest.mark.parametrize("how", [concrete_trace, trace])
@pytest.mark.parametrize(
    "inner, told",
    [
        (Literal, (r"module 'inner' \(op view, ", "test_recorder_details.py:", "view(-1, 5, 7)  # the guilty line")),
        (InPython, (r"module 'inner' \(", "test_recorder_details.py:", '{}["missing"]')),
        (lambda: nn.Linear(5, 5), (r"module 'inner' \(op (linear|addmm|mm|t)", "return self.inner(x)")),
    ],
)
def test_a_failure_names_the_op_the_line_and_what_to_do(how, inner, told):
    with pytest.raises(UserError, match=told[0]) as caught:
        how(Outer(inner()), (X,))
    assert all(text in str(caught.value) for text in told[1:])
    assert "Check the example inputs" in str(caught.value)
    assert how is concrete_trace or (isinstance(caught.value, TraceError) and caught.value.module == "inner")


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.kept = nn.Linear(8, 8), None
        self.fc.register_forward_pre_hook(lambda module, args: setattr(self, "kept", args[0] * 2))

    def forward(self, x):
        x = self.fc(x)
        return x + self.kept  # made by a hook


def test_a_value_that_escapes_is_told_with_its_line():
    with pytest.raises(UserError, match="self.kept  # made by a hook"):
        concrete_trace(Hooked(), (X,))


def test_a_device_that_is_read_off_a_tensor_is_asked_again():
    class Factory(nn.Module):
        def forward(self, x):
            return x + torch.arange(x.size(1), device=x.device)

    graph = concrete_trace(Factory(), (torch.randn(2, 3),))
    assert graph(torch.empty(4, 5, device="meta")).device.type == "meta"


@dataclass
class Outputs:
    logits: torch.Tensor
    extra: dict = field(default_factory=dict)


class Headed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return Outputs(self.fc(x), {"inner": Outputs(x * 2), "size": x.size(0)})


def test_dataclasses_come_out_as_they_are():
    model = Headed()
    out, wanted = concrete_trace(model, (X,))(X[:1]), model(X[:1])
    assert torch.equal(out.logits, wanted.logits)
    assert torch.equal(out.extra["inner"].logits, wanted.extra["inner"].logits)
    assert out.extra["size"] == 1
    assert len(trace(model, (X,)).outputs) == 2
    wanted.extra["inner"].logits[0] += 1
    assert verify(out, wanted) > 0.01


@torch.library.custom_op("recorder_tests::scale_", mutates_args={"x"})
def scale_(x: torch.Tensor, factor: float) -> None:
    x.mul_(factor)


@torch.library.custom_op("recorder_tests::rows", mutates_args=())
def rows(x: torch.Tensor, count: int) -> torch.Tensor:
    return x.repeat(count, 1)


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.count = 3
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.shared = self.a

    def forward(self, x):
        y = self.shared(self.b(self.a(x)))
        scale_(y, 3.0)
        return torch.ops.recorder_tests.rows(y, self.count)


def test_custom_ops_shared_modules_and_tied_weights():
    model, x = Custom(), torch.randn(2, 8)
    graph = concrete_trace(model, (x,))
    assert torch.equal(graph(x[:1]), model(x[:1])) and graph(x).shape == (6, 8)
    assert graph.a.weight is graph.b.weight is model.a.weight
    graph.count = 2
    assert graph(x).shape == (4, 8)
