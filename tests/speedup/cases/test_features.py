"""Hidden features of transformers and small nets: gates, experts, tied and shared weights, norms, unused parts."""

import pytest
import torch
from small_nets import Net, block, both, tokens
from torch import nn
from torch.nn import functional as F


def gated(m, x):
    return m.down(F.silu(m.gate(x)) * m.up(x))


@pytest.mark.parametrize(
    "zero", [{"gate.weight": [1, 4]}, {"up.weight": [1, 4]}, {"gate.weight": [1], "up.weight": [4]}]
)
def test_either_side_of_a_gate_removes_both(shrink, zero):
    layers = {name: nn.Linear(6, 8, bias=False) for name in ("gate", "up")}
    small, _ = shrink(Net(gated, **layers, down=nn.Linear(8, 6)), tokens(6), zero)
    assert small.gate.out_features == small.up.out_features == small.down.in_features == 6


def test_fused_gate_loses_the_partner_too(shrink):
    def run(m, x):
        gate, up = m.both(x).chunk(2, -1)
        return m.down(F.silu(gate) * up)

    model = Net(run, both=nn.Linear(6, 16, bias=False), down=nn.Linear(8, 6))
    small, plan = shrink(model, tokens(6), {"both.weight": [4]})
    assert set(range(16)) - set(plan.keep["both.weight"][0].tolist()) == {4, 12} and small.down.in_features == 7


class Experts(nn.Module):
    """Each token goes to the two experts that the router likes most."""

    def __init__(self, num_experts=4):
        super().__init__()
        self.router = nn.Linear(6, num_experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)) for _ in range(num_experts)
        )

    def forward(self, x):
        rows = x.flatten(0, 1)
        weights, chosen = self.router(rows).softmax(-1).topk(2, -1)
        out = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            token, slot = (chosen == i).nonzero(as_tuple=True)
            out.index_add_(0, token, expert(rows[token]) * weights[token, slot, None])
        return out.view_as(x)


def test_hidden_units_of_one_expert(shrink):
    zero = both("experts.1.0", [2, 3]) | both("experts.2.0", [0])
    small, _ = shrink(Experts(), lambda batch: torch.randn(batch + 3, 8, 6), zero)
    assert [e[0].out_features for e in small.experts] == [8, 6, 7, 8]
    assert [e[2].in_features for e in small.experts] == [8, 6, 7, 8]


def test_hidden_units_of_fused_experts(shrink):
    """All experts in one tensor: the same unit of each."""

    def run(m, x):
        gates = m.router(x).softmax(-1)
        hidden = F.relu(torch.einsum("btd,edh->bteh", x, m.up))
        return torch.einsum("bteh,ehd,bte->btd", hidden, m.down, gates)

    up, down = nn.Parameter(torch.randn(4, 6, 8)), nn.Parameter(torch.randn(4, 8, 6))
    model = Net(run, router=nn.Linear(6, 4), up=up, down=down)
    small, _ = shrink(model, tokens(6), {"up": (2, [1, 5])})
    assert small.up.shape == (4, 6, 6) and small.down.shape == (4, 6, 6)


def test_rows_of_the_router_stay(shrink):
    """topk sees all experts: which of them win does not commute with removing one."""
    small, plan = shrink(Experts(), lambda batch: torch.randn(batch + 3, 8, 6), {"router.weight": [1]})
    assert small.router.out_features == 4 and plan.blocked[0].fqn == "router.weight"


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mid, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.mid(self.embed(x)))


def words(batch):
    return torch.randint(11, (batch, 3 + batch))


def test_a_tied_embedding_masked_on_both_sides_shrinks_and_stays_tied(shrink):
    small, plan = shrink(Tied(), words, {"embed.weight": (1, [2, 5]), **both("mid", [2, 5])})
    assert small.head.weight is small.embed.weight and small.head.weight.shape == (11, 6)
    assert small.head.in_features == 6 and small.embed.embedding_dim == 6 and "head.weight" in plan.keep
    assert small.mid.weight.shape == (6, 6)


def test_a_tied_embedding_masked_on_one_side_stays(shrink):
    small, _ = shrink(Tied(), words, both("mid", [2, 5]))
    assert small.head.weight is small.embed.weight and small.head.weight.shape == (11, 8)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_normalised_dim_stays_by_default(shrink, norm):
    model = nn.Sequential(nn.Linear(6, 8), norm(8), nn.Linear(8, 3))
    small, plan = shrink(model, tokens(6), both("0", [1]))
    why = "normalises over it" if norm is nn.LayerNorm else "mean in 1 reduces over it"
    assert small[0].out_features == 8 and why in plan.blocked[0].reason


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_a_normalised_dim_goes_exactly(shrink, kind):
    norm = kind(8)
    nn.init.uniform_(norm.weight)
    model = nn.Sequential(nn.Linear(6, 8), norm, nn.Linear(8, 3))
    zero = both("0", [1, 5]) | {"1.weight": [1, 5]} | ({"1.bias": [1, 5]} if kind is nn.LayerNorm else {})
    small, _ = shrink(model, tokens(6), zero, norm="exact")
    assert small[0].out_features == 6 and small[1].weight.shape == (6,) and small[2].in_features == 6


def test_hidden_width_with_exact_norms_is_removed_everywhere(shrink):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x):
            return x + self.down(F.gelu(self.up(self.norm(x))))

    model = nn.Sequential(nn.Embedding(11, 8), Block(), Block(), nn.LayerNorm(8), nn.Linear(8, 11))
    index = [0, 3, 6]
    zero = {"0.weight": (1, index)}
    for name in ("1.norm", "2.norm", "3", "1.down", "2.down"):
        zero |= both(name, index)
    small, _ = shrink(model, words, zero, norm="exact")
    assert small[0].embedding_dim == small[1].up.in_features == small[2].down.out_features == small[4].in_features == 5


@pytest.mark.parametrize("shape, run", [((8,), lambda m, x: m.b(m.a(x) * m.gamma)), ((8, 1), lambda m, x: m.b(
    (m.a(x).mT * m.gamma).mT))], ids=["row", "column"])  # fmt: skip
def test_a_scale_with_zeros_removes_the_producer(shrink, shape, run):
    model = Net(run, a=nn.Linear(4, 8), b=nn.Linear(8, 3), gamma=nn.Parameter(torch.rand(shape) + 1))
    small, _ = shrink(model, tokens(4), {"gamma": [1, 2]})
    assert small.a.out_features == 6 and small.gamma.shape == (6, *shape[1:])


def test_input_columns_shrink_the_producer(shrink):
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
    small, _ = shrink(model, torch.randn(1, 4), {"2.weight": (1, [0, 7])})
    assert small[0].out_features == 6


def test_a_part_that_nobody_reads_vanishes_but_for_one_slice(shrink):
    model = Net(lambda m, x: m.b(m.a(x).chunk(2, -1)[0]), a=nn.Linear(4, 16), b=nn.Linear(8, 3))
    small, _ = shrink(model, torch.randn(1, 4), {})
    assert small.a.out_features == 9 and small.b.in_features == 8


def test_a_branch_that_nobody_reads_changes_nothing_else(shrink):
    def run(m, x):
        m.unread(F.relu(m.hidden(x)))
        return m.out(m.stem(x))

    layers = {"stem": nn.Linear(4, 8), "hidden": nn.Linear(4, 8), "unread": nn.Linear(8, 6), "out": nn.Linear(8, 3)}
    small, _ = shrink(Net(run, **layers), torch.randn(1, 4), both("stem", [1]))
    assert small.stem.out_features == small.out.in_features == 7
    assert small.unread.in_features == small.hidden.out_features


def test_a_dead_layer_keeps_one_slice(shrink):
    model = Net(lambda m, x: x + m.b(F.relu(m.a(x))), a=nn.Linear(4, 8), b=nn.Linear(8, 4))
    small, _ = shrink(model, torch.randn(1, 4), both("a", block(0, 8)))
    assert small.a.out_features == 1


def test_a_shared_module_keeps_the_union_of_its_uses(shrink):
    def build():
        return Net(
            lambda m, x: m.last(m.block(F.relu(m.block(m.first(x))))),
            first=nn.Linear(6, 8), block=nn.Linear(8, 8, bias=False), last=nn.Linear(8, 2),
        )  # fmt: skip

    small, _ = shrink(build(), torch.randn(1, 6), {"block.weight": [3], **both("first", [3])})
    assert small.block.weight.shape == (7, 7)
    small, _ = shrink(build(), torch.randn(1, 6), {"block.weight": [3]})
    assert small.block.weight.shape == (8, 8)


def test_modules_in_a_list_and_modules_made_in_forward(shrink):
    """Python lists hide modules from the model: their weights are constants, and everything they touch stays."""
    hidden = [nn.Linear(8, 8)]

    def run(m, x):
        return m.b(nn.ReLU()(m.a(x))) + m.c(F.relu(hidden[0].to(x)(m.a(x))))

    model = Net(run, a=nn.Linear(4, 8), b=nn.Linear(8, 3), c=nn.Linear(8, 3))
    small, plan = shrink(model, torch.randn(1, 4), both("a", [2]) | {"c.weight": (1, [0, 1])})
    assert small.a.out_features == 8 and plan.blocked
    seen = Net(lambda m, x: m.b(nn.ReLU()(m.a(x))), a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    small, _ = shrink(seen, torch.randn(1, 4), both("a", [2]))
    assert small.a.out_features == 7


def test_an_op_nobody_knows_is_a_barrier(shrink):
    model = Net(lambda m, x: m.b(m.a(x).renorm(2, 0, 1.0)), a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    small, plan = shrink(model, torch.randn(1, 4), both("a", [1]))
    assert small.a.out_features == 8 and plan.blocked


@pytest.mark.parametrize(
    "mix",
    [lambda y: y - y.mean(-1, keepdim=True), lambda y: y / y.std(-1, keepdim=True), lambda y: F.normalize(y, dim=1)],
    ids=["mean", "std", "normalize"],
)
def test_what_mixes_over_features_is_exact(shrink, mix):
    shrink(Net(lambda m, x: m.b(mix(m.a(x))), a=nn.Linear(4, 8), b=nn.Linear(8, 2)), torch.randn(1, 4), both("a", [1]))


def test_what_sorts_features_is_exact(shrink):
    def run(m, x):
        y = m.a(x)
        return m.b(y.topk(5, -1)[0] + y.argmax(-1, keepdim=True) + y.sort(-1)[0][..., :5])

    shrink(Net(run, a=nn.Linear(4, 8), b=nn.Linear(5, 2)), torch.randn(1, 4), both("a", [1]))
