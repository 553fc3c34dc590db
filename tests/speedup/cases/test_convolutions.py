"""Convolutions in groups, transposed, in branches; norms, pools and shuffles around them."""

import pytest
import torch
from small_nets import Net, block, both, image, shapes
from torch import nn
from torch.nn import functional as F


def test_residual_removes_what_both_branches_mask(shrink):
    model = Net(lambda m, x: m.c(m.a(x) + m.b(x)), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(3, 8, 1), c=nn.Conv2d(8, 2, 1))
    small, plan = shrink(model, image(), both("a", [0, 1, 2]) | both("b", [1, 2, 3]))
    assert shapes(small) == {"a.weight": (6, 3, 1, 1), "b.weight": (6, 3, 1, 1), "c.weight": (2, 6, 1, 1)}
    assert plan.keep["c.weight"][1].tolist() == [0, 3, 4, 5, 6, 7]
    assert {(b.fqn, b.count) for b in plan.blocked} == {("a.weight", 1), ("b.weight", 1)}


def grouped():
    return nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 12, 3, groups=4, bias=False), nn.Conv2d(12, 2, 1))


def test_same_position_in_each_group(shrink):
    small, _ = shrink(grouped(), image(), {"1.weight": [1, 4, 7, 10]})
    assert small[1].weight.shape == (8, 2, 3, 3) and small[1].groups == 4 and small[2].in_channels == 8


def test_a_whole_group(shrink):
    small, _ = shrink(grouped(), image(), {"1.weight": [3, 4, 5]})
    assert small[1].weight.shape == (9, 2, 3, 3) and small[1].groups == 3
    assert small[0].weight.shape == (6, 3, 1, 1) and small[2].in_channels == 9


def test_unbalanced_groups_stay_and_say_why(shrink):
    small, plan = shrink(grouped(), image(), {"1.weight": [0, 4]})
    assert small[1].weight.shape == (12, 2, 3, 3)
    assert plan.blocked[0].count == 2 and "convolution in 1" in plan.blocked[0].reason


def test_groups_between_views(shrink):
    """[B, 24] as [B, 6, 4] into 3 groups: per position of a group both channels of a linear block go."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.Flatten(), nn.Unflatten(1, (6, 36)),
        nn.Conv1d(6, 9, 1, groups=3, bias=False), nn.Flatten(), nn.Linear(9 * 36, 2),
    )  # fmt: skip
    small, _ = shrink(model, image(), {"3.weight": [1, 4, 7]})
    assert small[3].weight.shape == (6, 2, 1) and small[3].groups == 3 and small[5].in_features == 6 * 36


def test_depthwise_chain(shrink):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, groups=8, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 4, 1, bias=False),
    )  # fmt: skip
    small, _ = shrink(model, image(), {"0.weight": [2, 5]} | both("1", [2, 5]) | both("4", [2, 5]))
    assert small[3].weight.shape == (6, 1, 3, 3) and small[3].groups == 6 and small[3].in_channels == 6
    assert small[6].weight.shape == (4, 6, 1, 1)


def test_depthwise_multiplier_removes_pairs(shrink):
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.Conv2d(8, 2, 1))
    small, _ = shrink(model, image(), {"0.weight": [1]})
    assert small[1].weight.shape == (6, 1, 3, 3) and small[1].groups == 3 and small[2].in_channels == 6


@pytest.mark.parametrize("masked, left", [([4, 5, 6, 7], 8), ([4, 5, 6], 12)], ids=["all four", "three of four"])
def test_pixel_shuffle_takes_four_channels_together(shrink, masked, left):
    model = nn.Sequential(nn.Conv2d(3, 12, 1, bias=False), nn.PixelShuffle(2), nn.Conv2d(3, 2, 1))
    small, _ = shrink(model, image(), {"0.weight": masked})
    assert small[0].out_channels == left and small[2].in_channels == left // 4


@pytest.mark.parametrize("masked, left", [([8, 9, 10, 11], 3), ([8, 9, 10], 4)], ids=["all four", "three of four"])
def test_pixel_unshuffle_takes_four_columns_together(shrink, masked, left):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.PixelUnshuffle(2), nn.Conv2d(16, 5, 1))
    small, _ = shrink(model, image(), {"2.weight": (1, masked)})
    assert small[0].out_channels == left and small[2].in_channels == 4 * left


def view_and_transpose(m, x):
    b, c, h, w = m.a(x).shape
    return m.b(m.a(x).view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w))


@pytest.mark.parametrize("run", [view_and_transpose, lambda m, x: m.b(F.channel_shuffle(m.a(x), 2))])
def test_channel_shuffle_permutes(shrink, run):
    model = Net(run, a=nn.Conv2d(3, 8, 1, bias=False), b=nn.Conv2d(8, 2, 1))
    small, plan = shrink(model, image(), {"a.weight": [1, 5]})
    assert small.a.out_channels == 6 and plan.keep["b.weight"][1].tolist() == [0, 1, 4, 5, 6, 7]
    small, _ = shrink(Net(run, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1)), image(), {"b.weight": (1, [2, 3])})
    assert small.a.out_channels == 6


def test_transposed_conv(shrink):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.ReLU(), nn.Conv2d(6, 2, 1))
    small, _ = shrink(model, image(), both("0", [1]) | {"1.weight": (1, [0, 3]), "1.bias": [0, 3]})
    assert small[1].weight.shape == (7, 4, 2, 2) and (small[1].in_channels, small[1].out_channels) == (7, 4)


@pytest.mark.parametrize(
    "zero, shape, groups",
    [
        ({"1.weight": (1, [2]), "1.bias": [2, 5]}, (8, 2, 3, 3), 2),
        ({"0.weight": block(0, 4), "0.bias": block(0, 4), "1.bias": [0, 1, 2]}, (4, 3, 3, 3), 1),
    ],
    ids=["same position", "whole group"],
)
def test_transposed_conv_in_groups_with_output_padding(shrink, zero, shape, groups):
    transposed = nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1, groups=2)
    small, _ = shrink(nn.Sequential(nn.Conv2d(3, 8, 1), transposed, nn.Conv2d(6, 2, 1)), image(), zero)
    assert small[1].weight.shape == shape and small[1].groups == groups
    assert small[1].out_channels == small[2].in_channels == shape[1] * groups


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("masked, groups", [([2, 3], 3), ([2], 4)], ids=["whole group", "part of a group"])
def test_group_norm_removes_whole_groups(shrink, masked, groups, affine):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8, affine=affine), nn.ReLU(), nn.Conv2d(8, 2, 1))
    small, _ = shrink(model, image(), both("0", masked) | (both("1", masked) if affine else {}))
    assert (small[1].num_groups, small[1].num_channels) == (groups, 2 * groups)


@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm_lets_channels_pass(shrink, affine):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.InstanceNorm2d(8, affine=affine), nn.ReLU(), nn.Conv2d(8, 2, 1))
    small, _ = shrink(model, image(), both("0", [1, 6]) | (both("1", [1, 6]) if affine else {}))
    assert small[0].out_channels == small[1].num_features == small[3].in_channels == 6


POOLS = (nn.MaxPool2d(2), nn.AvgPool2d(2, count_include_pad=True), nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(3))


@pytest.mark.parametrize("pool", [*POOLS, nn.AdaptiveMaxPool2d(3), nn.MaxPool2d(3, 2, ceil_mode=True)], ids=str)
def test_flatten_behind_a_pool_removes_blocks_of_columns(shrink, pool):
    conv = nn.Conv2d(3, 6, 3, bias=False)
    columns = pool(conv(image()))[0, 0].numel()
    model = nn.Sequential(conv, pool, nn.Flatten(), nn.Linear(6 * columns, 5))
    small, plan = shrink(model, image(), {"0.weight": [0, 4]})
    assert small[3].weight.shape == (5, 4 * columns) and small[3].in_features == 4 * columns
    assert plan.keep["3.weight"][1].tolist() == block(columns, 3 * columns) + block(5 * columns, columns)


def test_dense_concatenation_with_a_norm_per_consumer(shrink):
    """Channels that only some norms cut stay for the others; what all of them cut goes."""

    def run(m, x):
        a = m.a(x)
        b = torch.cat([a, m.b(F.relu(m.norm_b(a)))], 1)
        return m.last(F.relu(m.norm_last(b)))

    def build():
        return Net(
            run, a=nn.Conv2d(3, 6, 1), norm_b=nn.BatchNorm2d(6), b=nn.Conv2d(6, 4, 1), norm_last=nn.BatchNorm2d(10),
            last=nn.Conv2d(10, 2, 1),
        )  # fmt: skip

    small, _ = shrink(build(), image(), both("norm_b", [1, 2]))
    assert small.a.out_channels == 6 and small.b.in_channels == 6
    small, _ = shrink(build(), image(), both("norm_b", [1, 2]) | both("norm_last", [1, 2, 7]))
    assert (small.a.out_channels, small.b.in_channels, small.b.out_channels, small.last.in_channels) == (4, 4, 3, 7)


def test_squeeze_excitation(shrink):
    """What is masked vanishes on both sides of the gate, although the gate itself is 0.5 there."""

    def run(m, x):
        x = m.first(x)
        return m.last(x * torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3), keepdim=True))))))

    model = Net(run, first=nn.Conv2d(3, 8, 1), down=nn.Conv2d(8, 4, 1), up=nn.Conv2d(4, 8, 1), last=nn.Conv2d(8, 2, 1))
    small, _ = shrink(model, image(), both("first", [1, 2]) | both("down", [3]))
    assert small.up.weight.shape == (6, 3, 1, 1) and small.down.weight.shape == (3, 6, 1, 1)
