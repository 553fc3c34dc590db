"""Channels that are constant, not zero: what a norm adds, what an activation makes of zero."""

import pytest
import torch
from small_nets import Net, both, image, shapes
from torch import nn
from torch.nn import functional as F


def chain(activation, second):
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), activation, second)


def test_aligned_norm_goes_along(shrink):
    model = chain(nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    small, plan = shrink(model, image(), {"0.weight": [1, 4, 6], **both("1", [1, 4, 6])})
    assert shapes(small) == {"0.weight": (5, 3, 3, 3), "1.weight": (5,), "3.weight": (4, 5, 3, 3)}
    assert small[0].out_channels == 5 and small[1].num_features == 5 and small[3].in_channels == 5
    assert small[1].running_var.shape == (5,) and not plan.bias and not plan.blocked


def test_shift_of_a_norm_is_folded_into_a_pointwise_conv(shrink):
    model = chain(nn.ReLU(), nn.Conv2d(8, 4, 1))
    small, plan = shrink(model, image(), {"0.weight": [1, 4, 6]})
    norm = model[1]
    shift = F.relu(norm.bias - norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt())
    removed = torch.tensor([1, 4, 6])
    expected = model[3].bias + model[3].weight[:, removed, 0, 0] @ shift[removed]
    assert small[3].weight.shape == (4, 5, 1, 1) and set(plan.bias) == {"3.bias"}
    torch.testing.assert_close(small[3].bias, expected)


def test_folding_creates_a_bias_where_there_is_none(shrink):
    small, plan = shrink(chain(nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False)), image(), {"0.weight": [1, 4, 6]})
    assert small[3].weight.shape == (4, 5, 1, 1) and small[3].bias.shape == (4,)


def test_constants_are_folded_through_a_sigmoid_and_a_conv_without_padding(shrink):
    small, plan = shrink(chain(nn.Sigmoid(), nn.Conv2d(8, 4, 3, bias=False)), image(), {"0.weight": [0, 7]})
    assert small[3].weight.shape == (4, 6, 3, 3) and set(plan.bias) == {"3.bias"}


def test_constants_are_folded_behind_a_flatten(shrink):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 5))
    small, plan = shrink(model, image(), both("0", [2]))
    assert small[4].weight.shape == (5, 27) and set(plan.bias) == {"4.bias"}


@pytest.mark.parametrize("size", [8, 1], ids=["image", "one pixel, where the planner sees no border"])
def test_constants_before_padding_stay(shrink, size):
    small, plan = shrink(
        chain(nn.GELU(), nn.Conv2d(8, 4, 3, padding=1)), image(size=size), {"0.weight": [1, 4, 6]}
    )
    assert small[3].weight.shape == (4, 8, 3, 3)
    assert [(b.fqn, b.dim, b.count) for b in plan.blocked] == [("0.weight", 0, 3)]
    assert "cannot fold" in plan.blocked[0].reason


@pytest.mark.parametrize("pool", [nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1, count_include_pad=False)])
def test_average_at_the_border_depends_on_how_it_counts(shrink, pool):
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Sigmoid(), pool, nn.Conv2d(6, 2, 1))
    small, _ = shrink(model, image(), both("0", [1, 3]))
    assert small[3].in_channels == (6 if pool.count_include_pad else 4)


@pytest.mark.parametrize("value, left", [(0.0, 6), (0.5, 8)], ids=["zero", "not zero"])
def test_a_border_of_another_value_is_no_constant_map(shrink, value, left):
    pad = nn.ConstantPad2d(1, value)
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), pad, nn.ReLU(), nn.Conv2d(8, 2, 3))
    small, _ = shrink(model, image(), {"0.weight": [1, 4]})
    assert small[3].in_channels == left


def test_a_mask_on_the_bias_alone_removes_nothing(shrink):
    small, _ = shrink(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(1, 4), {"0.bias": [1, 2]})
    assert small[0].out_features == 8


def test_a_bias_of_its_own_that_is_left_is_folded(shrink):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3, bias=False))
    small, plan = shrink(model, torch.randn(1, 4), {"0.weight": [1, 2]})
    assert small[0].out_features == 6 and set(plan.bias) == {"2.bias"}


def test_an_added_parameter_holds_a_constant(shrink):
    model = Net(
        lambda m, x: m.b(m.a(x) + m.shift), a=nn.Linear(4, 8), b=nn.Linear(8, 3), shift=nn.Parameter(torch.randn(8))
    )
    small, plan = shrink(model, torch.randn(1, 4), both("a", [1, 2]))
    assert small.shift.shape == (6,) and set(plan.bias) == {"b.bias"}


@pytest.mark.parametrize("pool", ["mean", "amax", "sum", "select"])
def test_a_constant_of_each_place_depends_on_the_number_of_places(shrink, pool):
    """Features of a table of positions are constant where the embedding is masked; pooled, they follow the length."""

    def run(m, x):
        y = m.a(x) + m.table[: x.shape[1]]
        return m.b(y[:, -1] if pool == "select" else getattr(y, pool)(1))

    model = Net(run, a=nn.Linear(4, 8), b=nn.Linear(8, 3), table=nn.Parameter(torch.randn(9, 8)))
    small, _ = shrink(model, lambda batch: torch.randn(batch, 4 + batch, 4), both("a", [1, 2]))
    assert small.b.in_features == 8


@pytest.mark.parametrize("pool", ["mean", "amax"])
def test_a_constant_everywhere_is_folded_behind_a_global_pool(shrink, pool):
    model = Net(
        lambda m, x: m.b(getattr(torch.sigmoid(m.a(x)), pool)((2, 3))), a=nn.Conv2d(3, 8, 3), b=nn.Linear(8, 3)
    )
    small, _ = shrink(model, lambda batch: torch.randn(batch, 3, 7 + batch, 8), both("a", [1, 2]))
    assert small.b.in_features == 6


def test_without_folding_only_constants_without_effect_go(shrink):
    """A relu makes zeros of the negative ones."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    small, plan = shrink(model, torch.randn(1, 4), {"0.weight": [1, 2, 5, 6]}, fold=False)
    kept, bias = plan.keep["0.weight"][0].tolist(), model[0].bias
    dead = [i for i in (1, 2, 5, 6) if bias[i] <= 0]
    assert 0 < len(dead) < 4 and kept == [i for i in range(8) if i not in dead] and not plan.bias
    assert [(b.fqn, b.dim, b.count) for b in plan.blocked] == [("0.weight", 0, 4 - len(dead))]
    folded = shrink(model, torch.randn(1, 4), {"0.weight": [1, 2, 5, 6]})[0]
    assert folded[0].out_features == 4
