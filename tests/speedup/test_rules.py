"""Taint and liveness against brute force: every op is run many times and its element sets are compared."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dist_compress.speedup.propagation import propagate
from dist_compress.tracing import Ref, trace


class Do(nn.Module):
    def __init__(self, fn, **weights):
        super().__init__()
        for name, value in weights.items():
            setattr(self, name, nn.Parameter(value))
        self.fn = fn

    def forward(self, x):
        return self.fn(self, x)


def sparse(*shape):
    """Whole slices of zeros in each dim, as masks make them."""
    value = torch.randn(*shape)
    for dim, n in enumerate(shape):
        if n > 2:
            value.index_fill_(dim, torch.randperm(n)[: n // 3], 0.0)
    return value


X = (2, 6, 4, 4)
CASES = {
    "scale": lambda: (Do(lambda m, x: (x * m.w).relu() + m.b, w=sparse(6, 1, 1), b=sparse(6, 1, 1)), X),
    "conv": lambda: (Do(lambda m, x: F.conv2d(x, m.w, padding=1), w=sparse(9, 6, 3, 3)), X),
    "grouped": lambda: (Do(lambda m, x: F.conv2d(x, m.w, groups=3), w=sparse(9, 2, 3, 3)), X),
    "transposed": lambda: (Do(lambda m, x: F.conv_transpose2d(x, m.w, groups=2), w=sparse(6, 3, 2, 2)), X),
    "linear": lambda: (Do(lambda m, x: F.linear(x, m.w, m.b), w=sparse(9, 6), b=sparse(9)), (2, 5, 6)),
    "bilinear": lambda: (
        Do(lambda m, x: F.bilinear(x * m.g, x * m.h, m.w), g=sparse(6), h=sparse(6), w=sparse(5, 6, 6)),
        (2, 6),
    ),
    "flatten": lambda: (Do(lambda m, x: F.linear((x * m.g).flatten(1), m.w), g=sparse(6, 1, 1), w=sparse(5, 96)), X),
    "pool": lambda: (Do(lambda m, x: F.max_pool2d(x * m.g, 2).mean((2, 3)), g=sparse(6, 1, 1)), X),
    "pixel_shuffle": lambda: (Do(lambda m, x: F.pixel_shuffle((x * m.g)[:, :4], 2), g=sparse(6, 1, 1)), X),
    "pad, roll, flip": lambda: (
        Do(lambda m, x: F.pad(x * m.g, (0, 0, 1, 0, 2, 1)).roll(1, 1).flip(1), g=sparse(6, 1, 1)),
        X,
    ),
    "cat, split": lambda: (
        Do(lambda m, x: torch.cat([x * m.g, x], 1).split([5, 7], 1)[0].permute(0, 2, 1, 3), g=sparse(6, 1, 1)),
        X,
    ),
    "stack, select": lambda: (Do(lambda m, x: torch.stack([x * m.g, x], 2)[:, 1:, 0], g=sparse(6, 1, 1)), X),
    "softmax": lambda: (Do(lambda m, x: (x * m.g).softmax(-1) * m.h, g=sparse(6, 1, 1), h=sparse(6, 1, 1)), X),
    "group_norm": lambda: (Do(lambda m, x: F.group_norm(x * m.g, 3, m.w), g=sparse(6, 1, 1), w=sparse(6)), X),
    "layer_norm": lambda: (Do(lambda m, x: F.layer_norm(x * m.g, (4,), m.w), g=sparse(6, 1, 1), w=sparse(4)), X),
    "expand": lambda: (Do(lambda m, x: x.mean(1, True).expand(-1, 6, -1, -1) * m.g, g=sparse(6, 1, 1)), X),
    "index": lambda: (Do(lambda m, x: (x * m.g)[:, torch.tensor([3, 0, 5])], g=sparse(6, 1, 1)), X),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_taint_and_liveness_cover_what_really_depends(name):
    torch.manual_seed(0)
    model, shape = CASES[name]()
    x = torch.randn(shape)
    recorded = trace(model, (x,), values=True)
    facts = propagate(recorded)
    out = recorded.outputs[0]
    changed = torch.zeros(recorded.info(out).shape, dtype=torch.bool)
    for _ in range(4):
        changed |= model(torch.randn(shape)) != recorded.result
    tainted = facts.tainted(out).expand(changed.shape)
    assert not bool((changed & ~tainted).any()), "an element that depends on the input is not tainted"
    source = recorded.inputs[0]
    seen = torch.zeros(shape, dtype=torch.bool)
    for _ in range(4):
        again = torch.randn(shape, requires_grad=True)
        (model(again) * torch.randn(changed.shape)).sum().backward()
        seen |= again.grad != 0
    observed = facts.observed(source).expand(shape)
    assert not bool((seen & ~observed).any()), "an element that the output sees is not observed"
    # Windows and norms may be larger, never smaller; a softmax of zeros is another constant at another size.
    exact = name not in ("pool", "layer_norm", "softmax")
    channels = [d for d in range(tainted.dim()) if d != 1]
    if exact and name != "cat, split":
        assert torch.equal(changed.any(channels), tainted.any(channels)), "more than needed would be kept"


@pytest.mark.parametrize("name", CASES)
def test_zeros_without_values_are_zeros_of_every_run(name):
    torch.manual_seed(0)
    model, shape = CASES[name]()
    recorded = trace(model, (torch.randn(shape),), values=True)
    facts = propagate(recorded, {fqn: parameter != 0 for fqn, parameter in model.named_parameters()})
    by_value = propagate(recorded)
    for key, value in recorded.values.items():
        nonzero = facts.nonzero(Ref(key)).expand(value.shape)
        assert not bool(((value != 0) & ~nonzero).any()), "a known zero is not zero"
        if recorded.info(Ref(key)).dependent:
            assert torch.equal(facts.alive(Ref(key)), by_value.alive(Ref(key)))


def normed(x, mean, weight, bias):
    return F.batch_norm(x, mean.flatten(), mean.flatten().exp(), weight.flatten(), bias.flatten())


ZERO = {
    "relu, pool": (lambda m, x: F.max_pool2d((x * m.g).relu(), 2) + F.avg_pool2d(x * m.g, 2), True),
    "divided": (lambda m, x: (x * m.g) / (x.abs() + 1), True),
    "batch_norm": (lambda m, x: normed(x, m.h, m.g, m.g), True),
    "where": (lambda m, x: torch.where(x > 0, x * m.g, m.g), True),
    "filled": (lambda m, x: torch.zeros_like(x) + (x * m.g).masked_fill(x > 0, 0), True),
    "sigmoid": (lambda m, x: (x * m.g).sigmoid(), False),
    "filled with one": (lambda m, x: (x * m.g).masked_fill(x > 0, 1), False),
    "plus one": (lambda m, x: x * m.g + 1, False),
    "shifted norm": (lambda m, x: normed(x, m.h, m.g, m.h), False),
}  # fmt: skip


@pytest.mark.parametrize("name", ZERO)
def test_zeros_pass_where_f_of_zero_is_zero(name):
    fn, passes = ZERO[name]
    mask = torch.tensor([True, False, True, True, False, True])
    model = Do(fn, g=torch.ones(6, 1, 1), h=torch.ones(6, 1, 1))
    recorded = trace(model, (torch.randn(X),))
    facts = propagate(recorded, {"g": mask.view(6, 1, 1)})
    known = facts.nonzero(recorded.outputs[0])
    assert torch.equal(known.flatten(), mask) if passes else bool(known.all())
