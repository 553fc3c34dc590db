"""Rules of ops that index by data, transform or contract: masked == shrunk by value, with the shapes that result."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dist_compress import speedup


class Between(nn.Module):
    """first -> an op on [batch, 5, 8] -> last: what the op lets pass, the plan removes from both layers."""

    def __init__(self, fn, width=8, weight=None):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8, bias=False), nn.Linear(width, 3)
        self.index = nn.Linear(6, 1)
        if weight is not None:
            self.weight = nn.Parameter(torch.randn(weight))
        self.fn = fn

    def forward(self, x):
        return self.last(self.fn(self, self.first(x), self.index(x).squeeze(-1)))


def order(score):
    return score.argsort(1)


def expand(index, x):
    return index.unsqueeze(-1).expand(-1, -1, x.shape[-1])


def scattered(m, x, score):
    return torch.zeros_like(x).scatter(1, expand(order(score), x), x)


def put(m, x, score):
    y = x * 0
    y[torch.arange(x.shape[0]).unsqueeze(1), order(score)[:, :3]] = x[:, :3]
    return y


def added(m, x, score):
    return x.flatten(0, 1).index_add(0, order(score).flatten(), x.flatten(0, 1) * 2).view(x.shape)


def halves(m, x, score):
    """Written in two parts, one through a transposed view, one at a fixed token, over a buffer of zeros."""
    y = torch.zeros_like(x)
    y.transpose(1, 2)[:, :, :3] = x.transpose(1, 2)[:, :, :3] * 2
    y[:, 3:] += x[:, 1:3]
    y[:, 0] = score[:, :1] * x[:, 4]
    return y


def doubled(m, x, score):
    """The base is written while a view of it waits."""
    y = x.clone()
    view = y[:, 1:, :]
    y.mul_(2)
    return torch.cat([view, y[:, :1]], 1)


def through(m, x, score):
    """A view that merges dims is written to."""
    y = x.clone()
    y.view(x.shape[0], -1).relu_()
    y[..., None].squeeze(-1).mul_(score.unsqueeze(-1))
    return y


PASSING = {
    "gather": lambda m, x, score: x.gather(1, expand(order(score), x)),
    "take_along_dim": lambda m, x, score: torch.take_along_dim(x, order(score).unsqueeze(-1), 1),
    "index": lambda m, x, score: x[torch.arange(x.shape[0]).unsqueeze(1), order(score)],
    "mask": lambda m, x, score: x[score > 0].sum(0),
    "index_select": lambda m, x, score: x.index_select(1, order(score)[0]),
    "index_add": added,
    "index_put": put,
    "scatter": scattered,
    "scatter_add": lambda m, x, score: x.scatter_add(1, expand(order(score), x), x * 2),
    "masked_scatter": lambda m, x, score: x.masked_scatter((score > 0).unsqueeze(-1).expand_as(x), x * 2),
    "fft": lambda m, x, score: torch.fft.fft(x, dim=1).real,
    "complex": lambda m, x, score: torch.view_as_complex(torch.stack([x, x * 2], -1)).abs(),
    "triu": lambda m, x, score: x.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, 5).triu().sum(-1).transpose(1, 2),
    "sum": lambda m, x, score: x * x.sum(-1, keepdim=True),
    "norm": lambda m, x, score: F.normalize(x, dim=-1),
    "mv": lambda m, x, score: x * torch.mv(m.weight[0], x[0, 0]),
    "cumsum, topk": lambda m, x, score: x.cumsum(1).topk(2, 1).values,
    "grid_sample": lambda m, x, score: F.grid_sample(
        x.transpose(1, 2).unsqueeze(-1), torch.tanh(score)[:, :, None, None].expand(-1, -1, 1, 2), align_corners=False
    ).squeeze(-1).transpose(1, 2),
    "fold": lambda m, x, score: F.fold(
        F.unfold(x.transpose(1, 2).unsqueeze(-1), (3, 1), padding=(1, 0)).relu(), (5, 1), (3, 1), padding=(1, 0)
    ).squeeze(-1).transpose(1, 2),
    "write to parts": halves,
    "write to the base": doubled,
    "write through views": through,
    "cdist": lambda m, x, score: x * torch.cdist(score.unsqueeze(-1), score.unsqueeze(-1)).mean((1, 2))[:, None, None],
}  # fmt: skip


def make(batch):
    return torch.randn(batch, 5, 6)


@pytest.mark.parametrize("name", PASSING)
def test_dims_that_an_op_lets_pass_shrink(name, shrink):
    model = Between(PASSING[name], weight=(2, 8, 8))
    small, plan = shrink(model, make, {"first.weight": [1, 6]})
    assert small.first.weight.shape == (6, 6) and small.last.weight.shape == (3, 6), plan.blocked


def test_a_slice_that_data_addresses_stays(shrink):
    def along(m, x, score):
        return x.gather(2, (score > 0).long().unsqueeze(-1).expand_as(x)) + x.sort(-1).values

    small, plan = shrink(Between(along), make, {"first.weight": [1, 6]})
    assert small.first.weight.shape == (8, 6) and plan.blocked[0].fqn == "first.weight"


def test_a_sum_keeps_slices_that_are_constant(shrink):
    small, _ = shrink(Between(lambda m, x, score: x * x.exp().sum(-1, keepdim=True)), make, {"first.weight": [1, 6]})
    assert small.first.weight.shape == (8, 6)


class Experts(nn.Module):
    """A mixture of experts as grouped matmuls: rows sorted by an expert that data chooses."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 8, 16))
        self.down = nn.Parameter(torch.randn(2, 16, 8))

    def forward(self, m, x, score):
        rows, expert = x.flatten(0, 1), (score.flatten() > 0).long()
        where = expert.argsort(stable=True)
        ends = torch.stack([(expert <= e).sum() for e in (0, 1)]).int()
        hidden = F.silu(F.grouped_mm(rows[where], self.up, offs=ends))
        made = F.grouped_mm(hidden, self.down, offs=ends)
        return torch.zeros_like(rows).index_add(0, where, made).view(x.shape)


def test_what_python_reads_counts_as_seen(shrink):
    """Channels that only `.item()` looks at decide how the others are scaled."""

    def scaled(m, x, score):
        return x / x.abs().max().item()

    small, _ = shrink(Between(scaled), lambda batch: torch.ones(batch, 5, 6), {"last.weight": (1, [1, 6])})
    assert small.first.weight.shape == (8, 6)


def test_experts_of_grouped_matmuls_shrink():
    torch.manual_seed(0)
    model = Between(None)
    model.fn = Experts()
    with torch.no_grad():
        model.fn.up[..., [0, 3, 5, 7, 9]] = 0  # rows of the kernel are whole 16 bytes: one of them stays
    plan = speedup.plan(model, (make(2),))
    small = speedup.apply(copy.deepcopy(model), plan)
    assert small.fn.up.shape == (2, 8, 12) and small.fn.down.shape == (2, 12, 8), plan.blocked
    x = make(3)
    assert speedup.verify(model(x), small(x)) < 1e-5
    groups = {group.num_units: group for group in speedup.coupling(model, (make(2),)).groups}
    assert not groups[16].blocked and {m.fqn for m in groups[16].members} == {"fn.up", "fn.down"}


def test_parts_of_channels_are_written_like_a_concatenation(shrink):
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.last = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False), nn.Linear(8, 3)

        def forward(self, x):
            a, b = self.a(x), self.b(x)
            y = x.new_zeros(*x.shape[:-1], a.shape[-1] + b.shape[-1])
            y[..., : a.shape[-1]] = a
            y[..., a.shape[-1] :] = b
            return self.last(y)

    small, plan = shrink(Parts(), make, {"a.weight": [1], "b.weight": [0, 3]})
    assert small.last.weight.shape in ((3, 5), (3, 8)), plan.blocked
