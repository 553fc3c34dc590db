"""Optimizers by name, and their state by parameter name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_compress import moments
from dist_compress.config import OptimConfig
from dist_compress.errors import UserError
from dist_compress.training import optim


def trained_model(name: str, **kwargs: object) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)  # type: ignore[union-attr]
    optimizer = optim.build(OptimConfig(name=name, lr=0.01, kwargs=dict(kwargs)), optim.trained(model))
    for _ in range(2):
        model(torch.ones(5, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(("name", "kwargs"), [("SGD", {"momentum": 0.9}), ("AdamW", {"betas": [0.8, 0.9]})])
def test_the_state_comes_back_by_name(name, kwargs):
    model, optimizer = trained_model(name, **kwargs)
    state = moments.state_by_name(optimizer, optim.trained(model))
    assert list(state) == ["0.weight", "1.weight", "1.bias"]
    other, fresh = trained_model(name, **kwargs)
    moments.load_by_name(fresh, optim.trained(other), state)
    again = moments.state_by_name(fresh, optim.trained(other))
    for parameter, values in state.items():
        for key, value in values.items():
            assert torch.equal(torch.as_tensor(again[parameter][key]), torch.as_tensor(value))


def test_what_is_not_to_decay_does_not_and_its_state_comes_back_too():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    names = optim.trained(model)
    config = OptimConfig(name="SGD", lr=0.5, weight_decay=0.1, kwargs={"momentum": 0.9})
    optimizer = optim.build(config, names, {"0.weight"})
    before = {name: p.detach().clone() for p, name in names.items()}
    for p in names:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, name in names.items():
        torch.testing.assert_close(p.detach(), before[name] * (1.0 if name == "0.weight" else 0.95))
    state = moments.state_by_name(optimizer, names)
    fresh = optim.build(config, names, {"0.weight"})  # its groups are in another order than the model
    moments.load_by_name(fresh, names, state)
    for name, values in moments.state_by_name(fresh, names).items():
        assert torch.equal(values["momentum_buffer"], state[name]["momentum_buffer"])
    with_all = optim.build(OptimConfig(name="Rprop"), names, {"0.weight"})  # has no weight decay at all
    assert len(with_all.param_groups) == 1


def test_moments_are_transformed_and_counters_are_not():
    model, optimizer = trained_model("AdamW")
    state = moments.state_by_name(optimizer, optim.trained(model))
    halves = moments.transformed(state, lambda tensors: {n: t[:1] for n, t in tensors.items()})
    assert halves["0.weight"]["exp_avg"].shape == (1, 3) and halves["1.bias"]["exp_avg_sq"].shape == (1,)
    assert halves["1.bias"]["step"] == 2.0


@pytest.mark.parametrize("name", ["LBFGS", "Muon", "Adafactor"])
def test_state_that_is_not_elementwise_is_refused_by_name(name):
    with pytest.raises(UserError, match=rf"optim\.name='{name}'.*not elementwise"):
        trained_model(name)


def test_unknown_names_and_arguments_list_what_there_is():
    with pytest.raises(UserError, match=r"optim\.name='Sgd'.*AdamW, .*SGD"):
        trained_model("Sgd")
    with pytest.raises(UserError, match=r"optim\.kwargs\.momentun: SGD accepts momentum, .*nesterov"):
        trained_model("SGD", momentun=0.9)
    with pytest.raises(UserError, match=r"optim\.kwargs\.lr"):
        trained_model("SGD", lr=0.9)
    with pytest.raises(UserError, match=r"(?s)optim \(SGD.*Nesterov"):
        trained_model("SGD", nesterov=True)
    with pytest.raises(UserError, match=r"optim\.weight_decay=0\.1: Rprop has none"):
        optim.build(OptimConfig(name="Rprop", weight_decay=0.1), optim.trained(nn.Linear(1, 1)))
