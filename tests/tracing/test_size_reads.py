"""Code that could know a size is found, however it asks; code that cannot is not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dist_compress.tracing import trace
from dist_compress.tracing.size_reads import names_a_size


class Code(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.a, self.b, self.run = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1), run

    def forward(self, x):
        return self.b(self.run(self, self.a(x)))


@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    return x * 2.0 if x.size(1) == 8 else x


class Halve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x / len(x[0])


READS = {
    "shape": lambda m, y: y / y.shape[1],
    "size": lambda m, y: y / y.size(1),
    "len": lambda m, y: y / len(y[0]),
    "numel": lambda m, y: y / y.numel(),
    "of a weight": lambda m, y: y / m.b.weight.shape[1],
    "stride": lambda m, y: y / y.stride(0),
    "view": lambda m, y: y.view(-1, 8, 6, 6),
    "split": lambda m, y: torch.cat(y.split(4, 1)[::-1], 1),
    "slice": lambda m, y: torch.cat([y[:, 4:], y[:, :4]], 1),
    "expand": lambda m, y: y.mean(1, keepdim=True).expand(-1, 8, -1, -1),
    "factory": lambda m, y: y + torch.ones(8, 1, 1),
    "iteration": lambda m, y: torch.stack(list(y.unbind(1))[::-1], 1),
    "values": lambda m, y: y * y.detach().numpy().shape[1],
    "scripted function": lambda m, y: scripted(y),
    "autograd function": lambda m, y: Halve.apply(y),
    "raw op": lambda m, y: torch.ops.aten.view.default(y, [-1, 8, 6, 6]),
    "interpolation": lambda m, y: F.interpolate(y, size=(6, 6)),
}


@pytest.mark.parametrize("name", READS)
def test_what_reads_or_gives_a_size_is_found(name):
    assert trace(Code(READS[name]), (torch.randn(2, 3, 8, 8),), sizes=True).reads_sizes


BLIND = {
    "functions": lambda m, y: F.relu(y) + torch.sigmoid(y) * 2 - y.mean((2, 3), keepdim=True),
    "in place": lambda m, y: F.relu_(y).mul_(2),
    "concatenation": lambda m, y: torch.cat([y, y], 0),
    "dims": lambda m, y: y.permute(0, 2, 3, 1).permute(0, 3, 1, 2) if y.ndim == 4 and y.dtype.is_floating_point else y,
}


@pytest.mark.parametrize("name", BLIND)
def test_what_asks_for_nothing_is_blind(name):
    assert not trace(Code(BLIND[name]), (torch.randn(2, 3, 8, 8),), sizes=True).reads_sizes


def test_nobody_knows_without_being_asked():
    assert trace(Code(BLIND["functions"]), (torch.randn(2, 3, 8, 8),)).reads_sizes


def test_a_hook_of_a_blind_layer_is_looked_at():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    assert not trace(model, (torch.randn(2, 4),), sizes=True).reads_sizes
    model[1].register_forward_hook(lambda module, inputs, output: output * output.shape[1])
    assert trace(model, (torch.randn(2, 4),), sizes=True).reads_sizes


class Asks(Code):
    def forward(self, x):
        return [self.a(x) for _ in range(1) if self.a.out_channels == 8][0]


class Layer(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) if self.in_channels == 3 else x


class Own(nn.Sequential):
    def forward(self, x):
        return super().forward(x) if self.groups == 2 else x


def test_integers_of_layers_are_found_in_the_code():
    assert names_a_size(Asks) and names_a_size(Layer)
    assert not any(map(names_a_size, (Code, Own, nn.Conv2d, nn.Sequential, nn.MultiheadAttention)))
