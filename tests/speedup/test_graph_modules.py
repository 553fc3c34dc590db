"""A user's own torch.fx.GraphModule, and what torch wraps models in, wherever a model is taken."""

import copy

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from dist_compress import speedup
from dist_compress.errors import UserError
from dist_compress.speedup import Plan, apply, verify
from dist_compress.tracing import concrete_trace
from dist_compress.tracing.unwrap import unwrapped


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


class Net(nn.Module):
    """A residual net whose head is flattened by `view` at a fixed size."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.blocks = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(Block(), Block())
        self.last, self.fc = nn.Conv2d(8, 6, 3), nn.Linear(6 * 4, 5)

    def forward(self, x):
        x = torch.max_pool2d(self.last(self.blocks(self.stem(x))).relu(), 2)
        return self.fc(x.view(-1, 6 * 4))


X, Y = torch.randn(2, 3, 6, 6), torch.randn(5, 3, 6, 6)


def masked():
    model = Net().eval()
    with torch.no_grad():
        for block in model.blocks:
            for tensor in (block.conv1.weight, block.bn1.weight, block.bn1.bias):
                tensor[::3] = 0
        model.last.weight[2:4] = 0
        model.last.bias[2:4] = 0
    return model


def indices(plan):
    return {fqn: {dim: index.tolist() for dim, index in dims.items()} for fqn, dims in plan.keep.items()}


@pytest.mark.parametrize(
    "graph_of",
    [
        torch.fx.symbolic_trace,
        lambda model: concrete_trace(model, (X,)),
        lambda model: export(model, (X,), dynamic_shapes=({0: Dim("batch", min=1, max=64)},)).module(),
        lambda model: export(model, (X,)).module(),
    ],
    ids=["symbolic_trace", "concrete_trace", "export", "static_export"],
)
def test_a_graph_module_has_the_plan_of_its_model(graph_of, tmp_path):
    model = masked()
    plan = speedup.plan(model, (X,))
    graph = graph_of(model)
    code = graph.code
    same = speedup.plan(graph, (X,))
    assert indices(same) == indices(plan) and same.keep["fc.weight"][1].tolist() == [*range(8), *range(16, 24)]
    assert graph.code == code and graph.get_parameter("last.weight").shape[0] == 6
    small = apply(copy.deepcopy(graph), same)
    assert verify(model(X), small(X)) < 1e-6 and small.get_parameter("last.weight").shape[0] == 4
    same.save(tmp_path)
    again = apply(copy.deepcopy(graph), Plan.load(tmp_path))
    assert torch.equal(again(X), small(X))


def test_a_traced_graph_module_follows_the_batch():
    for graph in (torch.fx.symbolic_trace(masked()), concrete_trace(masked(), (X,))):
        plan = speedup.plan(graph, (X,))
        assert verify(masked()(Y), apply(graph, plan)(Y)) < 1e-6


class Holder(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x) * 2


def test_a_graph_module_inside_a_model():
    model = Holder(torch.fx.symbolic_trace(masked()))
    plan = speedup.plan(model, (X,))
    small = apply(copy.deepcopy(model), plan)
    assert set(plan.graphs) == {"body"} and small.body.fc.weight.shape == (5, 16)
    assert verify(model(Y), small(Y)) < 1e-6


def test_wrappers_of_torch_are_looked_through():
    model = masked()
    compiled = torch.compile(model, backend="eager")
    plan = speedup.plan(compiled, (X,))
    assert indices(plan) == indices(speedup.plan(model, (X,)))
    expected = masked()(Y)
    small = apply(compiled, plan)
    assert small is model and verify(expected, small(Y)) < 1e-6
    assert unwrapped(nn.DataParallel(model)) is model


def test_a_compiled_submodule_runs_eagerly_while_it_is_looked_at():
    model = masked()
    model.blocks[0].compile(backend="eager")
    assert indices(speedup.plan(model, (X,))) == indices(speedup.plan(masked(), (X,)))


def test_what_holds_no_whole_parameters_is_refused():
    class FSDPModule:
        """As torch's fully_shard mixes into the class of a module."""

    model = masked()
    model.blocks.__class__ = type("FSDPSequential", (FSDPModule, nn.Sequential), {})
    with pytest.raises(UserError, match="'blocks' of the model is wrapped by FSDP.*full state dict"):
        speedup.plan(model, (X,))
    with pytest.raises(UserError, match="wrapped by FSDP"):
        apply(model, Plan())
    with pytest.raises(UserError, match="'0.weight' of a lazy layer"):
        speedup.coupling(nn.Sequential(nn.LazyLinear(3)), (X,))
