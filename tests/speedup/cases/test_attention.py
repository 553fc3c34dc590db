"""Attention: whole heads, parts of heads, groups of heads, rotary positions, nn.MultiheadAttention."""

import pytest
import torch
from small_nets import FusedAttention, GroupedAttention, Net, block, both, tokens
from torch import nn
from torch.nn import functional as F


def head(index, *parts, size=4, dim=16):
    """Rows of one head in the parts (0 q, 1 k, 2 v) of a fused layer."""
    return block(index * size, size, *(part * dim for part in parts))


@pytest.mark.parametrize("by_hand", [True, False], ids=["by hand", "sdpa"])
@pytest.mark.parametrize("parts", [(0, 1, 2), (2,)], ids=["whole head", "only v"])
def test_fused_qkv_removes_a_head(shrink, parts, by_hand):
    small, plan = shrink(FusedAttention(by_hand=by_hand), tokens(16), both("qkv", head(1, *parts)))
    assert small.qkv.weight.shape == (36, 16) and small.proj.weight.shape == (16, 12)
    assert small.num_heads == 3 and small.head_dim == 4 and plan.attrs["num_heads"] == 3


def test_columns_of_the_output_remove_a_head(shrink):
    small, _ = shrink(FusedAttention(), tokens(16), {"proj.weight": (1, head(2, 0))})
    assert small.qkv.weight.shape == (36, 16) and small.num_heads == 3


def test_part_of_a_head_stays(shrink):
    small, plan = shrink(FusedAttention(), tokens(16), both("qkv", head(1, 0, 1, 2)[:3]))
    assert small.qkv.weight.shape == (48, 16) and plan.blocked[0].fqn == "qkv.weight"


class OwnHeadSizes(nn.Module):
    """Queries and keys of another size than values."""

    def __init__(self, num_heads=4):
        super().__init__()
        self.num_heads, self.scale = num_heads, 4**-0.5
        self.q, self.k, self.v, self.proj = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = ((q @ k.mT) * self.scale).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


def test_same_coordinate_of_all_heads_shrinks_queries_and_keys_only(shrink):
    coordinate = [2, 6, 10, 14]
    small, _ = shrink(OwnHeadSizes(), tokens(16), both("q", coordinate) | both("k", coordinate))
    assert small.q.weight.shape == small.k.weight.shape == (12, 16) and small.v.weight.shape == (16, 16)
    assert small.num_heads == 4 and small.scale == 0.5


@pytest.mark.parametrize("name", ["q", "k"])
def test_a_coordinate_masked_on_one_side_goes_on_both(shrink, name):
    """q @ k does not see what the other side makes zero."""
    small, _ = shrink(OwnHeadSizes(), tokens(16), both(name, [2, 6, 10, 14]))
    assert small.q.weight.shape == small.k.weight.shape == (12, 16)


def test_a_group_of_heads_goes_with_its_key_head(shrink):
    zero = both("q", block(0, 8)) | both("k", block(0, 4)) | both("v", block(0, 4))
    small, _ = shrink(GroupedAttention(), tokens(16), zero)
    assert small.q.weight.shape == (8, 16) and small.k.weight.shape == small.v.weight.shape == (4, 16)
    assert small.proj.weight.shape == (16, 8)


def test_one_head_of_a_group_stays(shrink):
    small, _ = shrink(GroupedAttention(), tokens(16), both("q", block(4, 4)) | {"proj.weight": (1, block(4, 4))})
    assert small.q.weight.shape == (16, 16) and small.k.weight.shape == (8, 16)


def one_key_head(m, x):
    q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (m.q, m.k, m.v))
    return m.proj((((q @ k.mT) * 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_heads_on_one_key_head_go_freely(shrink):
    model = Net(one_key_head, q=nn.Linear(16, 16), k=nn.Linear(16, 4), v=nn.Linear(16, 4), proj=nn.Linear(16, 16))
    small, _ = shrink(model, tokens(16), both("q", block(8, 4)) | {"proj.weight": (1, block(8, 4))})
    assert small.q.weight.shape == (12, 16) and small.k.weight.shape == (4, 16)
    assert small.proj.weight.shape == (16, 12)


def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def rotate_pairs(x):
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


class Rotary(nn.Module):
    """Two heads of eight coordinates, turned in pairs."""

    def __init__(self, interleaved):
        super().__init__()
        self.rotate, self.num_heads = (rotate_pairs if interleaved else rotate_half), 2
        self.q, self.k, self.v, self.proj = (nn.Linear(16, 16) for _ in range(4))
        angles = torch.arange(8.0)[:, None] / 10 ** torch.arange(4)
        angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def turn(self, x):
        return x * self.cos[: x.shape[2]] + self.rotate(x) * self.sin[: x.shape[2]]

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = ((self.turn(q) @ self.turn(k).mT) / 3).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


PAIRS = {False: (1, 5), True: (2, 3)}


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_coordinates_go_in_pairs_with_the_tables(shrink, interleaved):
    rows = [head * 8 + i for head in (0, 1) for i in PAIRS[interleaved]]
    small, plan = shrink(Rotary(interleaved), tokens(16), both("q", rows) | both("k", rows))
    assert small.q.weight.shape == small.k.weight.shape == (12, 16) and small.v.weight.shape == (16, 16)
    assert small.cos.shape == small.sin.shape == (8, 6)
    assert plan.keep["cos"][1].tolist() == [i for i in range(8) if i not in PAIRS[interleaved]]


@pytest.mark.parametrize("interleaved", [False, True])
def test_one_of_a_rotary_pair_stays(shrink, interleaved):
    rows = [head * 8 + PAIRS[interleaved][0] for head in (0, 1)]
    small, _ = shrink(Rotary(interleaved), tokens(16), both("q", rows) | both("k", rows))
    assert small.q.weight.shape == (16, 16) and small.cos.shape == (8, 8)


class TokensFirst(nn.Module):
    """nn.MultiheadAttention as it is used: with the residual around it."""

    def __init__(self, batch_first, bias=True):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=batch_first, bias=bias)

    def forward(self, x):
        return x + self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("fast", [True, False], ids=["fast path", "slow path"])
def test_multihead_attention_removes_a_head(shrink, batch_first, fast):
    rows = head(1, 0, 1, 2)
    zero = {"attention.in_proj_weight": rows, "attention.in_proj_bias": rows}
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(fast)
        small, _ = shrink(TokensFirst(batch_first), tokens(16), zero)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    assert small.attention.in_proj_weight.shape == (36, 16) and small.attention.out_proj.weight.shape == (16, 12)
    assert (small.attention.num_heads, small.attention.head_dim) == (3, 4)


EQUATIONS = {
    "heads": ("bnhd,bmhd->bhnm", "bhnm,bmhd->bnhd"),
    "ellipsis": ("...nhd,...mhd->...hnm", "...hnm,...mhd->...nhd"),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_heads_through_einsum(shrink, name):
    first, second = EQUATIONS[name]

    def run(m, x):
        q, k, v = (p(x).unflatten(-1, (-1, 4)) for p in (m.q, m.k, m.v))
        y = torch.einsum(second, torch.einsum(first, q, k).softmax(-1), v)
        return m.proj(y.flatten(2))

    model = Net(run, **{name: nn.Linear(16, 16) for name in ("q", "k", "v", "proj")})
    small, _ = shrink(model, tokens(16), both("v", block(4, 4)))
    assert [p.weight.shape for p in (small.q, small.k, small.v, small.proj)] == [(12, 16)] * 3 + [(16, 12)]


def test_a_weight_per_head_in_einsum(shrink):
    """bnhd,bnhd->bnh, then bhnd,hde->bhne with a parameter that has a head dim of its own."""

    def run(m, x):
        q = m.q(x).unflatten(-1, (-1, 4))
        gate = torch.einsum("bnhd,bnhd->bnh", q, q)
        y = torch.einsum("bhnd,hde->bhne", q.transpose(1, 2), m.mix).transpose(1, 2)
        return m.proj((y * gate[..., None]).flatten(2))

    model = Net(run, q=nn.Linear(16, 16), mix=nn.Parameter(torch.randn(4, 4, 3)), proj=nn.Linear(12, 5))
    small, _ = shrink(model, tokens(16), both("q", block(8, 4)))
    assert small.mix.shape == (3, 4, 3) and small.proj.weight.shape == (5, 9)
    assert F.linear(torch.zeros(1, 16), small.q.weight).shape == (1, 12)
