"""Modules whose own code holds a size: their recorded graph runs instead, with other numbers in it."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.swin_transformer import ShiftedWindowAttention

from dist_compress import speedup
from dist_compress.errors import UserError
from dist_compress.speedup import Plan, apply, verify
from dist_compress.speedup.graph_forward import GraphForward


class Attention(nn.Module):
    """4 heads of 8, all of it written into the code."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.drop = nn.Linear(32, 96), nn.Linear(32, 32), nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(1))

    def scores(self, q, k):
        return (q @ k.transpose(-1, -2)) * q.size(-1) ** -0.5

    def forward(self, x, causal: bool = False):
        B, N, _ = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, 4, 8).permute(2, 0, 3, 1, 4)
        scores = self.scores(q, k)
        if causal:
            scores = scores + torch.full((N, N), -1e9, device=x.device).triu(1)
        x = (self.drop(scores.softmax(-1)) @ v).transpose(1, 2).reshape(B, N, 32)
        return F.dropout(self.proj(x), 0.5, training=self.training)


class FusedAttention(Attention):
    def scores(self, q, k):
        raise NotImplementedError

    def forward(self, x):
        q, k, v = self.qkv(x).view(x.size(0), -1, 3, 4, 8).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Net(nn.Module):
    def __init__(self, attention, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.head = attention(), nn.Linear(32, 5)
        self.settings = settings

    def forward(self, x):
        return self.head(self.attention(x, **self.settings).flatten(1, -2).mean(1))


X, Y = torch.randn(2, 6, 32), torch.randn(5, 9, 32)


def zero(*slices):
    with torch.no_grad():
        for tensor, index in slices:
            tensor[index] = 0


def without_head(attention=Attention, **settings):
    """Head 1 masked."""
    model = Net(attention, **settings)
    rows = [j * 32 + 8 + i for j in range(3) for i in range(8)]
    zero((model.attention.qkv.weight, rows), (model.attention.qkv.bias, rows))
    return model


def planned(model, x=X):
    """The plan, and a shrunk copy that was found to equal the masked model at another batch and length."""
    plan = speedup.plan(model, (x,))
    small = apply(copy.deepcopy(model), plan)
    for data in (x, Y[..., : x.shape[-1]] if x.dim() == 3 else torch.randn(5, *x.shape[1:])):
        assert verify(copy.deepcopy(model).eval()(data), small.eval()(data)) < 1e-6
    return plan, small


@pytest.mark.parametrize("settings", [{}, {"causal": True}])
def test_a_head_goes_from_code_that_counts_heads(settings):
    model = without_head(**settings)
    plan, small = planned(model)
    attention = small.attention
    assert attention.qkv.weight.shape == (72, 32) and attention.proj.weight.shape == (32, 24)
    assert plan.graphs["attention"].calls == ("attention.qkv", "attention.proj", "attention.drop")
    assert plan.graphs["attention"].rewrites == {"view": {"4": 3}, "reshape": {"3": 24}}
    assert isinstance(attention, GraphForward) and isinstance(attention, Attention) and type(small) is Net
    assert list(small.state_dict()) == list(model.state_dict())
    assert [name for name, _ in small.named_modules()] == [name for name, _ in model.named_modules()]


def test_modes_hooks_gradients_and_copies_survive():
    model = without_head()
    calls = []
    model.attention.register_forward_hook(lambda *_: calls.append(1))
    _, small = planned(model)
    calls.clear()
    small.train()
    torch.manual_seed(1)
    one = small(X)
    assert not torch.equal(one, small(X)), "both dropouts follow the mode"
    assert len(calls) == 2
    one.sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    twin = copy.deepcopy(small).eval()
    zero((small.attention.proj.weight, ...))
    assert verify(twin(X), small.eval()(X)) > 1e-3, "a copy has parameters of its own"
    assert small.double()(X.double()).dtype == torch.float64


def test_functional_dropout_follows_the_mode():
    model = without_head()
    model.attention.drop.p = 0.0
    _, small = planned(model)
    small.train()
    assert not torch.equal(small(X), small(X))


def test_the_attention_of_swin_loses_heads():
    model = Net(lambda: ShiftedWindowAttention(32, [4, 4], [2, 2], 4))
    rows = [j * 32 + 8 + i for j in range(3) for i in range(8)]
    zero((model.attention.qkv.weight, rows), (model.attention.qkv.bias, rows))
    plan, small = planned(model, torch.randn(1, 8, 8, 32))
    assert small.attention.num_heads == 3 and small.attention.proj.weight.shape == (32, 24)
    assert plan.keep["attention.relative_position_bias_table"][1].tolist() == [0, 2, 3]


def test_the_scale_stays_when_all_heads_get_smaller():
    """q and k lose one coordinate; both the scale in the code and that of fused attention were of 8."""
    for attention in (Attention, FusedAttention):
        model = Net(attention)
        rows = [j * 32 + h * 8 + 3 for j in range(2) for h in range(4)]
        zero((model.attention.qkv.weight, rows), (model.attention.qkv.bias, rows))
        _, small = planned(model)
        assert small.attention.qkv.weight.shape == (96, 32)  # q, k and v come from one view
    model = Net(Separate)
    rows = [h * 8 + 3 for h in range(4)]
    for layer in (model.attention.q, model.attention.k):
        zero((layer.weight, rows), (layer.bias, rows))
    plan, small = planned(model)
    assert small.attention.q.weight.shape == (28, 32) and small.attention.v.weight.shape == (32, 32)
    assert plan.graphs["attention"].rewrites["scaled_dot_product_attention"] == {"kwargs.scale": 8**-0.5}


class Separate(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in "qkv")

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Cut(nn.Module):
    """10 features cut in two by what `cut` does, and joined in the other order."""

    def __init__(self, cut):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.cut = nn.Linear(6, 10), nn.Linear(10, 3), cut

    def forward(self, x):
        left, right = self.cut(self.a(x).relu())
        return self.b(torch.cat([right, left * 2], -1))


@pytest.mark.parametrize(
    "cut",
    [
        lambda x: x.split([4, 6], -1),
        lambda x: torch.split(x, 5, dim=-1),
        lambda x: x.chunk(2, -1),
        lambda x: torch.tensor_split(x, 2, dim=-1),
        lambda x: x.tensor_split([4], -1),
        lambda x: (x[:, :4], x[:, 4:]),
        lambda x: (x[..., :-6], x[..., -6:]),
        lambda x: (x.narrow(-1, 0, 4), torch.narrow(x, -1, 4, 6)),
    ],
)
def test_literal_cuts_follow(cut):
    model = Cut(cut)
    zero((model.a.weight, [1, 2, 7]), (model.a.bias, [1, 2, 7]))
    _, small = planned(model, torch.randn(3, 6))
    assert small.a.weight.shape == (7, 6) and small.b.weight.shape == (3, 7)


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(1, 8, 3), nn.Linear(8 * 3 * 3, 4)

    def forward(self, x):
        return self.fc(F.max_pool2d(self.conv(x).relu(), 2).view(-1, 8 * 3 * 3))


def test_the_model_itself_can_hold_the_size():
    model = LeNet()
    zero((model.conv.weight, [2, 5]), (model.conv.bias, [2, 5]))
    plan, small = planned(model, torch.randn(2, 1, 8, 8))
    assert small.fc.weight.shape == (4, 54) and plan.graphs[""].rewrites == {"view": {"2": 54}}
    assert isinstance(small, LeNet)


def test_an_argument_that_was_fixed_is_not_ignored():
    plan, small = planned(without_head())
    small.attention(X, causal=False)
    with pytest.raises(UserError, match="recorded with causal=False, and was now called with bool True"):
        small.attention(X, causal=True)
    plan, small = planned(without_head(causal=True))
    with pytest.raises(UserError, match="causal=True"):
        small.attention(X, None)


class BoundToItsBatch(Attention):
    def forward(self, x):
        x = super().forward(x)
        return x.reshape(int(str(x.size(0))), -1, 32) if x.size(0) == 2 else x


def test_a_graph_that_would_fix_the_batch_is_not_used():
    plan, small = planned(without_head(BoundToItsBatch))
    assert not plan.graphs and small.attention.qkv.weight.shape == (96, 32)
    assert any("attention" in blocked.reason for blocked in plan.blocked)


def test_a_plan_with_a_graph_is_replayed_on_a_fresh_model(tmp_path):
    plan, small = planned(without_head())
    plan.save(tmp_path)
    fresh = apply(Net(Attention), Plan.load(tmp_path))
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh.eval()(Y), small.eval()(Y))


def test_another_program_is_refused_and_nothing_changes():
    plan, _ = planned(without_head())
    other = Net(FusedAttention)
    with pytest.raises(UserError, match="'attention' runs another program"):
        apply(other, plan)
    assert other.attention.qkv.weight.shape == (96, 32) and type(other.attention) is FusedAttention
    wrong = replace(plan.graphs["attention"], inputs=((torch.randn(1, 6, 7),), {}))
    with pytest.raises(UserError, match="cannot be recorded"):
        apply(Net(Attention), replace(plan, graphs={"attention": wrong}))


class Groups(nn.Module):
    """Two heads and two heads, treated apart; shared by all attentions."""

    def forward(self, v):
        one, other = v.split([2, 2], 1)
        return torch.cat([one, other.roll(1, 2)], 1)


class Convolved(Attention):
    groups = Groups()

    def __init__(self):
        super().__init__()
        self.extra = self.groups

    def scores(self, q, k):
        return super().scores(q, k) + self.extra(k.mean(-1, keepdim=True)).mT


def test_a_graph_that_calls_a_shared_module_that_is_a_graph():
    class Both(Net):
        def __init__(self):
            super().__init__(Convolved)
            self.second = Convolved()

        def forward(self, x):
            return super().forward(self.second(x))

    model = Both()
    rows = [j * 32 + 8 + i for j in range(3) for i in range(8)]
    for attention in (model.attention, model.second):
        zero((attention.qkv.weight, rows), (attention.qkv.bias, rows))
    plan, small = planned(model)
    assert set(plan.graphs) == {"attention", "second", "attention.extra"}
    assert small.second.extra is small.attention.extra and small.second.proj.weight.shape == (32, 24)


class Normed(nn.Module):
    """A size in its code, and a norm behind it that counts batches while it trains."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.out = nn.Linear(4, 8), nn.BatchNorm1d(5), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.norm(self.fc(x).relu().view(-1, 5, 8)))


def test_statistics_of_a_model_in_training_mode_stay():
    torch.manual_seed(0)
    model = Normed().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    kept = torch.arange(8) >= 3
    made = speedup.plan(model, (torch.randn(2, 5, 4),), masks={"fc.weight": kept[:, None], "fc.bias": kept})
    assert made.graphs and model.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
