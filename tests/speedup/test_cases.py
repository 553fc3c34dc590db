"""Tricky structures: each is exact on new inputs and another batch size, with the sizes one would write by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F


def shapes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters() if name.endswith("weight")}


class Functional(nn.Module):
    """Layers by name and a forward from a lambda; not code one would ship, but short."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def image(channels=3, size=8):
    return torch.randn(1, channels, size, size)


def chain(activation, second):
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), activation, second)


def test_aligned_conv_bn_relu(shrink):
    model = chain(nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    small, plan = shrink(model, image(), {"0.weight": [1, 4, 6], "1.weight": [1, 4, 6], "1.bias": [1, 4, 6]})
    assert shapes(small) == {"0.weight": (5, 3, 3, 3), "1.weight": (5,), "3.weight": (4, 5, 3, 3)}
    assert small[0].out_channels == 5 and small[1].num_features == 5 and small[3].in_channels == 5
    assert small[1].running_var.shape == (5,) and not plan.bias and not plan.blocked


def test_leak_of_norm_is_folded_into_1x1(shrink):
    model = chain(nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False))
    small, plan = shrink(model, image(), {"0.weight": [1, 4, 6]})
    assert small[3].weight.shape == (4, 5, 1, 1)
    assert set(plan.bias) == {"3.bias"} and small[3].bias.shape == (4,)


def test_leak_is_folded_through_sigmoid_and_valid_conv(shrink):
    model = chain(nn.Sigmoid(), nn.Conv2d(8, 4, 3))
    small, _ = shrink(model, image(), {"0.weight": [0, 7]})
    assert small[3].weight.shape == (4, 6, 3, 3)


def test_leak_before_padded_conv_is_kept(shrink):
    model = chain(nn.GELU(), nn.Conv2d(8, 4, 3, padding=1))
    small, plan = shrink(model, image(), {"0.weight": [1, 4, 6]})
    assert small[3].weight.shape == (4, 8, 3, 3)
    assert [(b.fqn, b.dim, b.count) for b in plan.blocked] == [("0.weight", 0, 3)]
    assert "cannot fold" in plan.blocked[0].reason


def test_leak_before_padded_conv_is_kept_where_space_is_one_pixel(shrink):
    model = chain(nn.GELU(), nn.Conv2d(8, 4, 3, padding=1))
    small, _ = shrink(model, image(size=1), {"0.weight": [1]})
    assert small[3].weight.shape == (4, 8, 3, 3)


def test_residual_with_different_masks_removes_the_common_ones(shrink):
    model = Functional(
        lambda m, x: m.c(m.a(x) + m.b(x)), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(3, 8, 1), c=nn.Conv2d(8, 2, 1)
    )
    zero = {f"{n}.{k}": i for n, i in (("a", [0, 1, 2]), ("b", [1, 2, 3])) for k in ("weight", "bias")}
    small, plan = shrink(model, image(), zero)
    assert shapes(small) == {"a.weight": (6, 3, 1, 1), "b.weight": (6, 3, 1, 1), "c.weight": (2, 6, 1, 1)}
    assert {(b.fqn, b.count) for b in plan.blocked} == {("a.weight", 1), ("b.weight", 1)}


def grouped():
    return nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 12, 3, groups=4, bias=False), nn.Conv2d(12, 2, 1))


def test_grouped_conv_same_position_in_each_group(shrink):
    small, _ = shrink(grouped(), image(), {"1.weight": [1, 4, 7, 10]})
    assert small[1].weight.shape == (8, 2, 3, 3) and small[1].groups == 4 and small[2].in_channels == 8


def test_grouped_conv_whole_group(shrink):
    small, _ = shrink(grouped(), image(), {"1.weight": [3, 4, 5]})
    assert small[1].weight.shape == (9, 2, 3, 3) and small[1].groups == 3
    assert small[0].weight.shape == (6, 3, 1, 1) and small[2].in_channels == 9


def test_grouped_conv_unbalanced_keeps_all_and_says_why(shrink):
    small, plan = shrink(grouped(), image(), {"1.weight": [0, 4]})
    assert small[1].weight.shape == (12, 2, 3, 3)
    assert plan.blocked[0].count == 2 and "convolution in 1" in plan.blocked[0].reason


def test_depthwise_chain(shrink):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, groups=8, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 4, 1, bias=False),
    )  # fmt: skip
    zero = {f"{n}.{k}": [2, 5] for n in (1, 4) for k in ("weight", "bias")}
    small, _ = shrink(model, image(), {"0.weight": [2, 5], **zero})
    assert small[3].weight.shape == (6, 1, 3, 3) and small[3].groups == 6 and small[3].in_channels == 6
    assert small[6].weight.shape == (4, 6, 1, 1)


def test_depthwise_with_multiplier_removes_pairs(shrink):
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.Conv2d(8, 2, 1))
    small, _ = shrink(model, image(), {"0.weight": [1]})
    assert small[1].weight.shape == (6, 1, 3, 3) and small[1].groups == 3 and small[2].in_channels == 6


def test_transposed_conv(shrink):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.ReLU(), nn.Conv2d(6, 2, 1))
    zero = {"0.weight": [1], "0.bias": [1], "1.weight": (1, [0, 3]), "1.bias": [0, 3]}
    small, _ = shrink(model, image(), zero)
    assert small[1].weight.shape == (7, 4, 2, 2) and (small[1].in_channels, small[1].out_channels) == (7, 4)


def test_flatten_to_linear_removes_blocks_of_columns(shrink):
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 9, 5))
    small, _ = shrink(model, image(), {"0.weight": [0, 4]})
    assert small[3].weight.shape == (5, 36) and small[3].in_features == 36


def test_pixel_shuffle_removes_blocks_of_four(shrink):
    def build():
        return nn.Sequential(nn.Conv2d(3, 12, 1, bias=False), nn.PixelShuffle(2), nn.Conv2d(3, 2, 1))

    small, _ = shrink(build(), image(), {"0.weight": [4, 5, 6, 7]})
    assert small[0].out_channels == 8 and small[2].in_channels == 2
    small, _ = shrink(build(), image(), {"0.weight": [4, 5, 6]})
    assert small[0].out_channels == 12


def test_concat(shrink):
    model = Functional(
        lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)),
        a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 6, 1), c=nn.Conv2d(10, 2, 1),
    )  # fmt: skip
    small, plan = shrink(model, image(), {"a.weight": [1], "a.bias": [1], "b.weight": [0, 5], "b.bias": [0, 5]})
    assert plan.keep["c.weight"][1].tolist() == [0, 2, 3, 5, 6, 7, 8]


def test_squeeze_excitation(shrink):
    def forward(m, x):
        x = m.first(x)
        gate = torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3), keepdim=True)))))
        return m.last(x * gate)

    model = Functional(
        forward, first=nn.Conv2d(3, 8, 1), down=nn.Conv2d(8, 4, 1), up=nn.Conv2d(4, 8, 1), last=nn.Conv2d(8, 2, 1)
    )
    zero = {"first.weight": [1, 2], "first.bias": [1, 2], "down.weight": [3], "down.bias": [3]}
    small, _ = shrink(model, image(), zero)
    assert small.up.weight.shape == (6, 3, 1, 1) and small.down.weight.shape == (3, 6, 1, 1)


class Attention(nn.Module):
    def __init__(self, dim=16, num_heads=4):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, -1))


def rows(head, parts, size=4, dim=16):
    return [part * dim + head * size + i for part in parts for i in range(size)]


@pytest.mark.parametrize("parts", [(0, 1, 2), (2,)], ids=["whole head", "only v"])
def test_fused_qkv_removes_a_head(shrink, parts):
    index = rows(1, parts)
    small, plan = shrink(Attention(), torch.randn(1, 5, 16), {"qkv.weight": index, "qkv.bias": index})
    assert small.qkv.weight.shape == (36, 16) and small.proj.weight.shape == (16, 12)
    assert small.num_heads == 3 and small.head_dim == 4 and plan.attrs["num_heads"] == 3


def test_head_is_removed_by_its_output_columns(shrink):
    small, _ = shrink(Attention(), torch.randn(1, 5, 16), {"proj.weight": (1, rows(2, (0,)))})
    assert small.qkv.weight.shape == (36, 16)


def test_part_of_a_head_is_kept(shrink):
    index = rows(1, (0, 1, 2))[:3]
    small, plan = shrink(Attention(), torch.randn(1, 5, 16), {"qkv.weight": index, "qkv.bias": index})
    assert small.qkv.weight.shape == (48, 16) and plan.blocked[0].fqn == "qkv.weight"


def test_layer_norm_keeps_its_dim(shrink):
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    small, plan = shrink(model, torch.randn(1, 6), {"0.weight": [1], "0.bias": [1]})
    assert small[0].out_features == 8
    assert plan.blocked[0].reason == "native_layer_norm in 1 normalises over it"


def test_group_norm_removes_whole_groups_only(shrink):
    def build():
        return nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 2, 1))

    zero = {f"{n}.{k}": [2, 3] for n in (0, 1) for k in ("weight", "bias")}
    small, _ = shrink(build(), image(), zero)
    assert (small[1].num_groups, small[1].num_channels) == (3, 6)
    small, _ = shrink(build(), image(), {name: [2] for name in zero})
    assert (small[1].num_groups, small[1].num_channels) == (4, 8)


def test_shared_module_keeps_the_union_of_its_uses(shrink):
    model = Functional(
        lambda m, x: m.last(m.block(F.relu(m.block(m.first(x))))),
        first=nn.Linear(6, 8), block=nn.Linear(8, 8, bias=False), last=nn.Linear(8, 2),
    )  # fmt: skip
    small, _ = shrink(model, torch.randn(1, 6), {"block.weight": [3], "first.weight": [3], "first.bias": [3]})
    assert small.block.weight.shape == (7, 7)
    model = Functional(model.run, first=nn.Linear(6, 8), block=nn.Linear(8, 8, bias=False), last=nn.Linear(8, 2))
    small, _ = shrink(model, torch.randn(1, 6), {"block.weight": [3]})
    assert small.block.weight.shape == (8, 8)


def test_tied_weights_stay_tied(shrink):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(F.relu(self.embed(x)))

    def tokens(batch):
        return torch.randint(11, (batch, 4))

    small, plan = shrink(Tied(), tokens(1), {"embed.weight": (1, [2, 5])}, make_input=tokens)
    assert small.head.weight is small.embed.weight and small.head.weight.shape == (11, 6)
    assert small.head.in_features == 6 and small.embed.embedding_dim == 6 and "head.weight" in plan.keep


def test_input_columns_shrink_the_producer(shrink):
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
    small, _ = shrink(model, torch.randn(1, 4), {"2.weight": (1, [0, 7])})
    assert small[0].out_features == 6


def test_scale_parameter_removes_the_producer(shrink):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.gamma = nn.Linear(4, 8), nn.Linear(8, 3), nn.Parameter(torch.rand(8) + 1)

        def forward(self, x):
            return self.b(self.a(x) * self.gamma)

    small, _ = shrink(Scaled(), torch.randn(1, 4), {"gamma": [1, 2]})
    assert small.a.out_features == 6 and small.gamma.shape == (6,)


def test_literal_size_in_user_code_is_kept(shrink):
    model = Functional(
        lambda m, x: m.b(m.a(x).view(x.shape[0], 8, -1).mean(-1)), a=nn.Conv2d(3, 8, 1), b=nn.Linear(8, 2)
    )
    small, plan = shrink(model, image(), {"a.weight": [1], "a.bias": [1]})
    assert small.a.out_channels == 8
    assert "holds this size" in plan.blocked[0].reason


def test_literal_offset_in_user_code_is_kept(shrink):
    model = Functional(lambda m, x: m.b(m.a(x)[:, 2:6]), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(4, 2, 1))
    small, _ = shrink(model, image(), {"a.weight": [2], "a.bias": [2]})
    assert small.b.in_channels == 4


def test_chunk_with_gate(shrink):
    def forward(m, x):
        a, b = m.up(x).chunk(2, -1)
        return m.down(F.silu(a) * b)

    model = Functional(forward, up=nn.Linear(6, 16, bias=False), down=nn.Linear(8, 6, bias=False))
    small, _ = shrink(model, torch.randn(1, 6), {"up.weight": [1, 12]})
    assert small.up.out_features == 12 and small.down.in_features == 6


def test_in_place_through_a_view_is_exact(shrink):
    def forward(m, x):
        x = m.a(x)
        x[:, :2] *= 2
        return m.b(F.relu_(x))

    model = Functional(forward, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1))
    shrink(model, image(), {"a.weight": [1, 5], "a.bias": [1, 5]})


def test_unknown_op_is_a_barrier(shrink):
    model = Functional(lambda m, x: m.b(m.a(x).renorm(2, 0, 1.0)), a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    small, plan = shrink(model, torch.randn(1, 4), {"a.weight": [1], "a.bias": [1]})
    assert small.a.out_features == 8 and plan.blocked


def test_whole_layer_dead_keeps_one_slice(shrink):
    model = Functional(lambda m, x: x + m.b(F.relu(m.a(x))), a=nn.Linear(4, 8), b=nn.Linear(8, 4))
    small, _ = shrink(model, torch.randn(1, 4), {"a.weight": list(range(8)), "a.bias": list(range(8))})
    assert small.a.out_features == 1
