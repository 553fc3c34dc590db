"""weight_norm, spectral_norm and other parametrizations: what they hold is sliced, and stays parametrized."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from dist_compress import speedup
from dist_compress.speedup import apply, verify
from dist_compress.speedup.masking import duplicate
from dist_compress.tracing.copies import tensors_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    old_weight_norm, old_spectral_norm = nn.utils.weight_norm, nn.utils.spectral_norm

NORMS = ("weight_norm", "weight_norm_of_old")
KINDS = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm_of_old": old_weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm_of_old": old_spectral_norm,
}
X = torch.randn(2, 3, 8, 8)


def network(kind, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(12, 6, 2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 49, 4),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for i in (0, 2, 4, 7):
            KINDS[kind](model[i])
    return model.to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", NORMS)
def test_units_of_every_group_go(kind, dtype):
    model = network(kind, dtype)
    x = X.to(dtype)
    coupled = speedup.coupling(model, (x,))
    free = [g for g in coupled.groups if not g.blocked]
    assert len(free) == 3
    for group in free:
        speedup.mask_units(model, group, torch.arange(group.num_units // 3))
    plan = speedup.plan(model, (x,))
    small = apply(duplicate(model), plan)
    assert set(small.state_dict()) == set(model.state_dict())
    assert sum(p.numel() for p in small.parameters()) < 0.75 * sum(p.numel() for p in model.parameters())
    for batch in (2, 3):
        new = torch.randn(batch, 3, 8, 8, dtype=dtype)
        with torch.no_grad():
            assert verify(model(new), small(new)) < (1e-5 if dtype == torch.float32 else 1e-10)
    assert small[0].out_channels < 8 and small[0].weight.shape[0] == small[0].out_channels
    small.train()(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_a_cut_norm_is_made_up_for_by_its_gain():
    """Columns of v that go are not zero: without the gain the norm would be another."""
    model = network("weight_norm")
    with torch.no_grad():
        for parameter in (model[0].parametrizations.weight.original0, model[0].bias):
            parameter[[1, 4]] = 0  # the same position in each of two groups would be 1 and 5
            parameter[[0, 5]] = 0
    plan = speedup.plan(model, (X,))
    small = apply(copy.deepcopy(model), plan)
    assert small[2].in_channels == 4 and "2.parametrizations.weight.original0" in plan.bias
    assert verify(model(X), small(X)) < 1e-5
    plan.bias.pop("2.parametrizations.weight.original0")
    assert verify(model(X), apply(copy.deepcopy(model), plan)(X)) > 1e-3


@pytest.mark.parametrize("kind", ["spectral_norm", "spectral_norm_of_old"])
def test_the_norm_of_a_whole_matrix_keeps_it_or_is_exact(kind):
    model = network(kind)
    name = "parametrizations.weight.original" if kind == "spectral_norm" else "weight_orig"
    with torch.no_grad():
        model.get_parameter(f"0.{name}")[[1, 3, 5, 7]] = 0
        model[0].bias[[1, 3, 5, 7]] = 0
        model.get_parameter(f"7.{name}")[:, :49] = 0
    plan = speedup.plan(model, (X,))
    small = apply(copy.deepcopy(model, tensors_of(model)), plan)
    with torch.no_grad():
        assert verify(model(X), small(X)) < 1e-5
    assert plan.blocked


def test_a_parametrization_without_a_rule_keeps_what_it_mixes():
    class Centred(nn.Module):
        def forward(self, weight):
            return weight - weight.mean(0, keepdim=True)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    parametrize.register_parametrization(model[0], "weight", Centred())
    with torch.no_grad():
        model[0].parametrizations.weight.original[2] = 0
        model[2].weight[:, 2] = 0
    x = torch.randn(2, 5)
    plan = speedup.plan(model, (x,))
    assert verify(model(x), apply(copy.deepcopy(model), plan)(x)) < 1e-6
    assert "0.parametrizations.weight.original" not in plan.keep


def test_parametrized_layers_have_the_names_of_their_modules():
    coupled = speedup.coupling(network("spectral_norm"), (X,))
    assert [(g.name, bool(g.blocked)) for g in coupled.groups] == [("0", 0), ("2", 0), ("4", 0), ("7", 1)]
    assert {m.module for g in coupled.groups for m in g.members} == {"0", "2", "4", "7"}
    assert {layer.fqn for layer in coupled.layers} == {"0", "2", "4", "7"}
