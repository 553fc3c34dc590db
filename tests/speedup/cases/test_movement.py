"""Data movement: concatenation, slices, splits, windows, indices; sizes from shapes and sizes in the code."""

import pytest
import torch
from small_nets import Net, block, both, image, tokens
from torch import nn
from torch.nn import functional as F


def test_concatenation(shrink):
    model = Net(
        lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)),
        a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 6, 1), c=nn.Conv2d(10, 2, 1),
    )  # fmt: skip
    _, plan = shrink(model, image(), both("a", [1]) | both("b", [0, 5]))
    assert plan.keep["c.weight"][1].tolist() == [0, 2, 3, 5, 6, 7, 8]


def test_slices_by_shape_follow(shrink):
    def run(m, x):
        a, b = m.a(x), m.b(x)
        y = torch.cat([a, b], 1)
        return m.c(y[:, : a.shape[1]]) + m.d(y[:, a.shape[1] :])

    layers = {"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(3, 6, 1), "c": nn.Conv2d(4, 2, 1), "d": nn.Conv2d(6, 2, 1)}
    small, _ = shrink(Net(run, **layers), image(), both("a", [1]) | both("b", [0, 5]))
    assert (small.c.in_channels, small.d.in_channels) == (3, 4)


# Code that holds a size: what it splits may only shrink if the code is written anew.
CUTS = {
    "split": (lambda x: x.split([4, 6], 1), [1, 7, 8]),
    "chunk": (lambda x: x.chunk(2, 1), [1, 7, 8]),
    "chunk by name": (lambda x: torch.chunk(x, dim=1, chunks=2), [1, 7, 8]),
    "split by name": (lambda x: torch.split(x, dim=1, split_size_or_sections=5), [1, 7, 8]),
    "tensor_split": (lambda x: x.tensor_split([4], 1), [1, 7, 8]),
    "narrow": (lambda x: (x.narrow(1, 0, 4), x.narrow(1, 4, 6)), [1, 7, 8]),
    "slice": (lambda x: (x[:, :4], x[:, 4:]), [1, 7, 8]),
    "unbind": (lambda x: x.unflatten(1, (2, 5)).unbind(1), [1, 3, 6, 8]),
}


@pytest.mark.parametrize("name", CUTS)
def test_literal_sizes_are_exact(shrink, name):
    cut, masked = CUTS[name]
    left, right = (t.shape[1] for t in cut(torch.zeros(1, 10, 1, 1)))
    model = Net(
        lambda m, x: m.b(cut(m.a(x))[0]) + m.c(torch.tanh(cut(m.a(x))[1])),
        a=nn.Conv2d(3, 10, 1), b=nn.Conv2d(left, 2, 1), c=nn.Conv2d(right, 2, 1),
    )  # fmt: skip
    small, plan = shrink(model, image(), both("a", masked))
    assert small.a.out_channels == 10 - len(masked)


def test_literal_view_is_exact(shrink):
    model = Net(lambda m, x: m.b(m.a(x).view(x.shape[0], 8, -1).mean(-1)), a=nn.Conv2d(3, 8, 1), b=nn.Linear(8, 2))
    small, plan = shrink(model, image(), both("a", [1]))
    assert small.a.out_channels == 7


@pytest.mark.parametrize(
    "run, masked",
    [
        (lambda x: x.roll(1, 1), [1, 5]),
        (lambda x: F.channel_shuffle(x, 3), [3, 4, 5]),
        (lambda x: x[:, 1:4], [0]),
        (lambda x: x.chunk(2, 1)[1], [0, 1]),
        (lambda x: x.view(len(x), 3, -1, 4, 4).sum(1), [0, 1, 4]),
        (lambda x: x / x.shape[1], [1]),
        (lambda x: x * torch.tensor(float(x.shape[1])), [1]),
        (lambda x: x * x.new_full((), x.shape[1]), [1]),
        (lambda x: x * torch.arange(x.shape[1])[:, None, None], [1]),
    ],
    ids=["roll", "shuffle", "slice", "chunk", "view", "number", "tensor", "full", "arange"],
)
def test_what_the_example_does_not_show_is_exact(shrink, run, masked):
    """At the example every kept channel is hidden by the relu, so the values cannot tell where channels went."""
    model = Net(lambda m, x: m.b(run(F.relu(m.a(x)))), a=nn.Conv2d(3, 6, 1), b=nn.LazyConv2d(4, 1))
    model(image(size=4))
    with torch.no_grad():
        model.a.weight.copy_(model.a.weight.abs())

    def make(batch):
        return -torch.rand(1, 3, 4, 4) - 5 if batch == 1 else torch.randn(batch, 3, 4, 4)

    shrink(model, make, both("a", masked))


def test_chunk_and_gate_lose_both_partners(shrink):
    def run(m, x):
        a, b = m.up(x).chunk(2, -1)
        return m.down(F.silu(a) * b)

    model = Net(run, up=nn.Linear(6, 16, bias=False), down=nn.Linear(8, 6, bias=False))
    small, plan = shrink(model, tokens(6), {"up.weight": [1, 12]})
    assert plan.keep["up.weight"][0].tolist() == [0, 2, 3, 5, 6, 7, 8, 10, 11, 13, 14, 15]
    assert small.up.out_features == 12 and small.down.in_features == 6


class Patches(nn.Module):
    """Patch merging: four strided slices side by side."""

    def __init__(self):
        super().__init__()
        self.embed, self.reduce = nn.Linear(6, 8), nn.Linear(32, 5)

    def forward(self, x):
        x = self.embed(x)
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduce(torch.cat(corners, -1))


def test_patch_merging_makes_four_copies(shrink):
    small, plan = shrink(Patches(), torch.randn(1, 4, 6, 6), both("embed", [0, 3]))
    assert small.embed.out_features == 6 and small.reduce.in_features == 24
    assert plan.keep["reduce.weight"][1].tolist() == [c * 8 + i for c in range(4) for i in (1, 2, 4, 5, 6, 7)]


class WindowAttention(nn.Module):
    """Shifted windows with a bias for each pair of places, looked up in a table by a constant index."""

    def __init__(self, dim=8, num_heads=4, window=2):
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, num_heads))
        places = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        away = (places[:, :, None] - places[:, None, :]) + window - 1
        self.register_buffer("index", (away[0] * (2 * window - 1) + away[1]).flatten())

    def forward(self, x):
        b, h, w, c = x.shape
        n = self.window
        x = x.roll((-1, -1), (1, 2)).view(b, h // n, n, w // n, n, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, n * n, c)
        q, k, v = self.qkv(x).reshape(len(x), n * n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index].view(n * n, n * n, -1).permute(2, 0, 1)
        y = ((q @ k.transpose(-2, -1)) / 2 + bias).softmax(-1) @ v
        y = self.proj(y.transpose(1, 2).flatten(2)).view(b, h // n, w // n, n, n, -1).permute(0, 1, 3, 2, 4, 5)
        return y.reshape(b, h, w, -1).roll((1, 1), (1, 2))


def test_windows_let_channels_pass_and_a_head_takes_its_bias_along(shrink):
    model = nn.Sequential(nn.Linear(6, 8), WindowAttention(), nn.Linear(8, 3))
    head = block(2, 2, 0, 8, 16)
    zero = both("0", [5]) | both("1.qkv", head) | {"1.proj.weight": [3], "1.proj.bias": [3]}
    small, plan = shrink(model, torch.randn(1, 4, 4, 6), zero)
    attention = small[1]
    assert small[0].out_features == 7 and small[2].in_features == 7
    assert attention.qkv.weight.shape == (18, 7) and attention.proj.weight.shape == (7, 6)
    assert attention.num_heads == 3 and plan.keep["1.table"] == {1: plan.keep["1.table"][1]}
    assert attention.table.shape == (9, 3) and attention.index.shape == (16,)


def test_writing_through_a_view_in_place_is_exact(shrink):
    def run(m, x):
        x = m.a(x)
        x[:, :2] *= 2
        x[:, :, 0] = 1.5
        return m.b(F.relu_(x))

    shrink(Net(run, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1)), image(), both("a", [1, 5]))


def hidden(run):
    return Net(run, a=nn.Linear(6, 8), b=nn.Linear(8, 3))


POINTWISE_BY_DATA = {
    "masked_fill": lambda m, x: m.b(m.a(x).masked_fill(x[..., :1] > 0, 0.0)),
    "where": lambda m, x: m.b(torch.where(x.sum(-1, keepdim=True) > 0, m.a(x), 0.0)),
    "tril": lambda m, x: m.b(m.a(x) * torch.ones(x.shape[1], x.shape[1]).tril().sum(-1, keepdim=True).to(x)),
}


@pytest.mark.parametrize("name", POINTWISE_BY_DATA)
def test_masks_by_data_let_features_pass(shrink, name):
    small, _ = shrink(hidden(POINTWISE_BY_DATA[name]), tokens(6), both("a", [2, 5]))
    assert small.a.out_features == 6


def index_put(m, x):
    y = m.a(x)
    y[x[..., 0] > 0] = 0.0
    return m.b(y)


def put_rows(m, x):
    y = m.a(x).index_put((torch.tensor([0, 1]),), torch.zeros(()).to(x))
    return m.b(y)


def rows_by_mask(m, x):
    rows = m.a(x).flatten(0, 1)
    chosen = x[..., 0].flatten() > -10
    return m.b(rows[chosen])


def gather_tokens(m, x):
    y = m.a(x)
    order = x.mean(-1).argsort(1)
    return m.b(y.gather(1, order[..., None].expand_as(y)))


@pytest.mark.parametrize("run", [index_put, put_rows, rows_by_mask, gather_tokens])
def test_indices_by_data_are_exact(shrink, run):
    def make(batch):
        return torch.randn(batch + 1, 4, 6)

    shrink(hidden(run), make, both("a", [2, 5]))


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m.b(m.a(x)[..., m.order]),
        lambda m, x: m.b(m.a(x).index_select(-1, m.order)),
        lambda m, x: m.b(m.a(x).gather(-1, m.order.expand(*x.shape[:-1], -1))),
    ],
    ids=["index", "index_select", "gather"],
)
def test_a_constant_index_over_channels_is_exact(shrink, run):
    model = hidden(run)
    model.register_buffer("order", torch.tensor([3, 1, 0, 2, 7, 6, 5, 4]))
    shrink(model, tokens(6), both("a", [1, 5]))
