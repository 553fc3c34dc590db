"""Kept counts rounded up inside the fixpoint: every shrunk dim of a weight is a multiple, and the result is exact."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from dist_compress import speedup
from dist_compress.speedup import apply, verify


def check(model, x, round_to, zeros, **settings):
    """Zeroes slices {parameter: indices along dim 0}, plans with rounding; the small model, checked."""
    with torch.no_grad():
        for fqn, index in zeros.items():
            model.get_parameter(fqn)[index] = 0
    model.eval()
    plan = speedup.plan(model, (x,), round_to=round_to, **settings)
    small = apply(copy.deepcopy(model), plan)
    for fqn, dims in plan.keep.items():
        for dim, index in dims.items():
            assert len(index) % round_to == 0 or dim >= model.state_dict()[fqn].dim(), (fqn, dim, len(index))
    new = torch.randn(3, *x.shape[1:])
    with torch.no_grad():
        assert verify(model(new), small(new)) < 1e-5
    again = speedup.plan(model, (x,), round_to=round_to, **settings)
    assert again.fingerprint() == plan.fingerprint()
    return small


def test_a_chain_rounds_up_and_a_dim_that_is_no_multiple_stays_below_its_size():
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 3))
    zeros = {"0.weight": range(9), "0.bias": range(9), "2.weight": range(2), "2.bias": range(2)}
    zeros = {fqn: list(index) for fqn, index in zeros.items()}
    small = check(copy.deepcopy(model), torch.randn(2, 6), 8, zeros)
    assert [m.out_features for m in small if isinstance(m, nn.Linear)] == [16, 12, 3]
    small = check(model, torch.randn(2, 6), 1, zeros)
    assert [m.out_features for m in small if isinstance(m, nn.Linear)] == [11, 10, 3]


def test_the_positions_that_come_back_are_the_first_ones():
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter[[1, 2, 3, 10, 11]] = 0
    plan = speedup.plan(model, (torch.randn(2, 6),), round_to=4)
    assert plan.keep["2.weight"][1].tolist() == [0, 1, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15]
    blocked = [b for b in plan.blocked if b.fqn == "0.weight"]
    assert [(b.dim, b.count) for b in blocked] == [(0, 1)] and "multiple of 4" in blocked[0].reason


class Net(nn.Module):
    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def test_branches_that_are_added_round_together():
    def forward(net, x):
        return net.c(net.a(x).relu() + net.b(x).relu())

    model = Net(forward, a=nn.Conv2d(3, 16, 1), b=nn.Conv2d(3, 16, 3, padding=1), c=nn.Conv2d(16, 4, 1))
    zeros = {f"{name}.{kind}": [1, 2, 3, 7, 9] for name in "ab" for kind in ("weight", "bias")}
    small = check(model, torch.randn(1, 3, 6, 6), 4, zeros)
    assert small.a.out_channels == small.b.out_channels == small.c.in_channels == 12


def test_parts_of_a_concatenation_round_each():
    def forward(net, x):
        return net.c(torch.cat([net.a(x), net.b(x)], 1).relu())

    model = Net(forward, a=nn.Conv2d(3, 16, 1), b=nn.Conv2d(3, 8, 1), c=nn.Conv2d(24, 4, 1))
    zeros = {"a.weight": [1, 2, 3], "a.bias": [1, 2, 3], "b.weight": [0, 1, 5, 6, 7], "b.bias": [0, 1, 5, 6, 7]}
    small = check(model, torch.randn(1, 3, 6, 6), 4, zeros)
    assert (small.a.out_channels, small.b.out_channels, small.c.in_channels) == (16, 4, 20)


@pytest.mark.parametrize("round_to, width", [(2, 4), (4, 4), (8, 8)])
def test_groups_of_a_convolution_stay_alike(round_to, width):
    model = nn.Sequential(nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 3, groups=3), nn.ReLU(), nn.Conv2d(24, 4, 1))
    same = [g * 8 + p for g in range(3) for p in (0, 2, 3, 5, 6)]
    zeros = {"1.weight": same, "1.bias": same}
    small = check(model, torch.randn(1, 3, 6, 6), round_to, zeros)
    assert small[1].groups == 3 and small[1].out_channels == 3 * width


@pytest.mark.parametrize("round_to, heads", [(1, 3), (8, 4), (16, 4), (24, 6)])
def test_heads_are_counted_in_rows(round_to, heads):
    """Six heads of four, of which three go."""
    model = torchvision.models.VisionTransformer(8, 4, 1, 6, 24, 16, num_classes=3)
    nn.init.normal_(model.heads.head.weight)
    with torch.no_grad():
        model.encoder.layers[0].self_attention.out_proj.weight[:, :12] = 0
    small = check(model, torch.randn(1, 3, 8, 8), round_to, {})
    assert small.encoder.layers[0].self_attention.num_heads == heads


def test_hidden_width_and_constants():
    model = nn.Sequential(
        nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 16, bias=False), nn.Sigmoid(), nn.Linear(16, 3)
    )
    zeros = {f"{name}.{kind}": [0, 4, 5] for name in "01" for kind in ("weight", "bias")} | {"2.weight": [3, 5]}
    small = check(model, torch.randn(2, 6), 4, zeros, norm="exact")
    assert small[0].out_features == 16 and small[2].out_features == 16
    zeros = {fqn: [*index, 8, 9] for fqn, index in zeros.items()}
    small = check(model, torch.randn(2, 6), 4, zeros, norm="exact")
    assert small[0].out_features == 12 and small[4].in_features == 12 and small[4].bias is not None
