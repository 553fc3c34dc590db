"""What the tests of NNI 3.0 expect of masks of activations, and of models with many operators, as black boxes."""

from __future__ import annotations

import functools

import pytest
import torch
from pruning_nets import attach, config
from torch import nn
from torch.nn import functional as F

import dist_compress
from dist_compress.target import Coupling

LATER = {"name": "one_shot", "start": "1steps", "end": "1steps"}
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


class Wrapped(nn.Module):
    """NNI's convolution of 3 to 3 channels, and what it was."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def masked(*entries):
    """The model after one step and decision, the module as it was, and the pruner."""
    model, before = Wrapped(), Wrapped().conv
    pruner, _, projection = attach(config(list(entries), schedule=LATER), model, Coupling(), example=X)
    model(X).sum().backward()
    for micro in range(6):
        pruner.after_backward(0, micro)
    pruner.after_step(0)
    projection.project()
    return model, before, pruner


def entry(*targets, **keys):
    return {"op_names": ["conv"], "target_names": list(targets), "sparse_ratio": 0.34, **keys}


def test_an_output_mask_is_the_output_without_these_channels():
    model, before, pruner = masked(entry("_output_0"))
    gone = ~pruner.activations.on()["conv._output_0"]
    assert int(gone.sum()) == 1 and torch.equal(model(X), before(X) * ~gone)


def test_an_input_mask_is_the_input_without_these_channels():
    model, before, pruner = masked(entry("_input_"))
    gone = ~pruner.activations.on()["conv._input_0"]
    assert int(gone.sum()) == 1 and torch.equal(model(X), before(X * ~gone))


def test_input_weight_bias_and_output_at_once():
    keys = {"target_settings": {"weight": {"granularity": "element"}, "bias": {"granularity": "element"}}}
    model, before, pruner = masked(entry("_input_0", "weight", "bias", "_output_0", **keys))
    acts, masks = pruner.activations.on(), pruner.masks()
    assert all(int((~m).sum()) == round(0.34 * m.numel() - 0.5) for m in (*acts.values(), *masks.values()))
    weight, bias = before.weight * masks["conv.weight"], before.bias * masks["conv.bias"]
    assert torch.equal(model(X), F.conv2d(X * acts["conv._input_0"], weight, bias) * acts["conv._output_0"])


def plain(forward):
    return forward


def wrapping(forward):
    @functools.wraps(forward)
    def call(*args, **kwargs):
        return forward(*args, **kwargs)

    return call


def hiding(forward):
    def call(*args, **kwargs):
        return forward(*args, **kwargs)

    return call


@pytest.mark.parametrize("decorators", [(), (wrapping,), (plain, wrapping), (wrapping, hiding, wrapping), (hiding,)])
def test_decorated_forwards_still_take_masks(decorators):
    class Inner(nn.Module):
        def forward(self, x):
            return x * 2, x + 1

    for decorator in decorators:
        Inner.forward = decorator(Inner.forward)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = Inner(), nn.Linear(6, 2)

        def forward(self, x):
            doubled, more = self.inner(x)
            return self.head(doubled + more)

    model, x = Outer(), torch.rand(4, 6)
    entries = [{"op_names": ["inner"], "target_names": ["_input_0", "_output_1"], "sparse_ratio": 0.5}]
    pruner, _, _ = attach(config(entries, schedule=LATER), model, Coupling(), example=x)
    model(x).sum().backward()
    pruner.after_backward(0, 0)
    pruner.after_step(0)
    given, out = (pruner.activations.on()[f"inner.{site}"].float() for site in ("_input_0", "_output_1"))
    assert given.sum() == out.sum() == 3
    assert torch.equal(model(x), model.head(x * given * 2 + (x * given + 1) * out))


class Classes(nn.Module):
    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 10), nn.Linear(10, 4)
        self.softmax = nn.Softmax(dim=1)
        self.functional = functional

    def forward(self, x):
        x = self.first(x)
        return self.second(F.softmax(x, 1) if self.functional else self.softmax(x))


@pytest.mark.parametrize("functional", [True, False])
def test_a_softmax_behind_a_pruned_layer(functional):
    """NNI removes what the softmax makes positive; here it stays, with the reason, and the function is the same."""
    model, x = Classes(functional), torch.randn(3, 8)
    entries = [{"op_names": ["first"], "sparse_ratio": 0.5, "granularity": "element"}]
    small, report = dist_compress.prune(model, (x,), config_list=entries)
    assert report.targets[0]["given"] == 0.5 and report.difference <= 1e-5
    assert small.first.out_features == 10


class ManyOps(nn.Module):
    """A convolution, forty operators that leave its channels alone, and a convolution: [B, 3, 6, 6] -> [B, 4, 5, 5]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        x = F.gelu(F.silu(F.elu(F.leaky_relu(torch.tanh(x).relu() * 3 + torch.sin(x)))))
        x = x.neg().abs().sqrt().square().div(2).clamp(-5, 5).erf().sign() * x
        x = torch.where(x > 0, x, x.expm1())
        x = x.permute(0, 2, 3, 1).transpose(1, 2).permute(0, 3, 2, 1)
        x = x.flatten(2).unflatten(2, (6, 6)).unsqueeze(2).squeeze(2).contiguous()
        x = self.conv2(torch.maximum(x, torch.minimum(x * 2, x - x)))
        x = torch.stack([x, x * 2], 4).sum(4)
        x = torch.cat(x.split(3, 3), 3).roll(1, 3).flip(2)
        x = x + x.mean((2, 3), keepdim=True) * x.amax((2, 3), keepdim=True)
        x = x[:, :, 1:].repeat(1, 1, 1, 1)
        x = F.pad(x, (0, 0, 1, 0)).cumsum(2).narrow(3, 0, 6)
        return self.conv3(F.dropout(x, 0.5, self.training).log1p().nan_to_num().trunc() * 0 + x)


def test_a_model_of_many_operators():
    model, x = ManyOps().eval(), torch.randn(2, 3, 6, 6)
    small, report = dist_compress.prune(model, (x,), config_list=[{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    given = {row["name"]: row["given"] for row in report.targets}
    assert given == {"conv1": 0.5, "conv2": 0.5}  # conv3 is the output
    assert small(x).shape == (2, 4, 5, 5)
    weights = [sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.Conv2d)) for net in (model, small)]
    assert 0.45 < 1 - weights[1] / weights[0] < 0.75


def test_every_hook_of_a_step_fires_once_in_a_step():
    from dist_compress.method import Method

    fired = []
    for name in ("after_backward", "before_step", "after_step"):
        assert hasattr(Method, name)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recipe = {"pruning": {"method": "l1_norm", "sparse_ratio": 0.5, "config_list": [
        {"op_types": ["Linear"], "granularity": "element"}], "schedule": LATER}}  # fmt: skip
    x = torch.randn(3, 4)
    net = nn.Sequential(model)
    compression = dist_compress.attach(net, optimizer, recipe, (x,), total_steps=50)
    [pruner] = compression.methods
    for name in ("after_backward", "before_step", "after_step"):
        original = getattr(pruner, name)
        setattr(pruner, name, lambda *a, name=name, original=original: (fired.append(name), original(*a)))
    for _ in range(50):
        optimizer.zero_grad()
        compression.loss(net(x).sum()).backward()
        compression.step()
    assert [fired.count(name) for name in ("after_backward", "before_step", "after_step")] == [50, 50, 50]
