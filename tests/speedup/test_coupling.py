import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from dist_compress import speedup
from dist_compress.speedup import capture
from dist_compress.speedup.capture import Capture


def by_name(coupling):
    return {group.name: group for group in coupling.groups}


def members(group):
    return {(m.fqn, m.dim, m.role): m.index.tolist() for m in group.members}


def test_roles_of_a_chain():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 2))
    coupling = speedup.coupling(model, (torch.randn(1, 3, 4, 4),))
    group = by_name(coupling)["0"]
    each = [[0], [1], [2], [3]]
    assert members(group) == {
        ("0.weight", 0, "producer"): each,
        ("0.bias", 0, "producer"): each,
        ("1.weight", 0, "affine"): each,
        ("1.bias", 0, "affine"): each,
        ("4.weight", 1, "consumer"): [[4 * c + i for i in range(4)] for c in range(4)],
    }
    assert group.num_units == 4 and not group.blocked and group.producers() == ["0"]
    assert by_name(coupling)["4"].blocked == "is an output of the model"


def test_residual_ties_producers_and_depthwise_passes_through():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
            self.expand, self.project = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)
            self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)

        def forward(self, x):
            x = self.stem(x)
            return self.last(x + self.project(F.relu(self.depthwise(self.expand(x)))))

    groups = by_name(speedup.coupling(Block(), (torch.randn(1, 3, 6, 6),)))
    assert groups["stem"].producers() == ["stem", "project"]
    assert groups["expand"].producers() == ["expand", "depthwise"]
    assert ("depthwise.weight", 0, "producer") in members(groups["expand"])
    assert not groups["stem"].blocked and not groups["expand"].blocked


def test_grouped_conv_ties_the_same_position_of_each_group():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, groups=2), nn.Conv2d(6, 2, 1))
    groups = by_name(speedup.coupling(model, (torch.randn(1, 3, 6, 6),)))
    assert members(groups["0"])[("0.weight", 0, "producer")] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert members(groups["0"])[("1.weight", 1, "consumer")] == [[0], [1], [2], [3]]
    assert members(groups["1"])[("1.weight", 0, "producer")] == [[0, 3], [1, 4], [2, 5]]


class Attention(nn.Module):
    """Heads by an attribute, so that removing one can be followed."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.qkv, self.proj = 3, nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, 4)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_a_head_is_one_unit():
    group = by_name(speedup.coupling(Attention(), (torch.randn(2, 5, 12),)))["qkv"]
    assert group.num_units == 3 and not group.blocked
    head = [part * 12 + 4 + i for part in range(3) for i in range(4)]
    assert members(group)[("qkv.weight", 0, "producer")][1] == head
    assert members(group)[("proj.weight", 1, "consumer")][1] == [4, 5, 6, 7]


def test_what_cannot_go_is_blocked_with_the_reason():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    groups = by_name(speedup.coupling(model, (torch.randn(1, 4),)))
    assert groups["0"].blocked == "native_layer_norm in 1 normalises over it"
    assert not groups["2"].blocked


def test_a_literal_size_in_user_code_is_rewritten_and_blocks_nothing():
    class Literal(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(self.a(x).view(x.shape[0], 8, -1).mean(-1))

    groups = by_name(speedup.coupling(Literal(), (torch.randn(1, 3, 4, 4),)))
    assert not groups["a"].blocked


def test_a_size_in_arithmetic_blocks_its_group():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = self.a(x).relu()
            return self.b(x / x.shape[-1])

    model = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)), Scaled())
    groups = by_name(speedup.coupling(model, (torch.randn(1, 4),)))
    assert "holds this size" in groups["1.a"].blocked and not groups["0.0"].blocked


def test_a_leak_that_nothing_folds_blocks_its_group():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 2, 3, padding=1))
    groups = by_name(speedup.coupling(model, (torch.randn(1, 3, 4, 4),)))
    assert "cannot fold" in groups["0"].blocked


def test_weights_that_start_at_zero_do_not_matter():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    nn.init.zeros_(model[2].weight)
    assert not by_name(speedup.coupling(model, (torch.randn(1, 4),)))["0"].blocked


def test_costs_are_per_sample():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 4, 2))
    coupling = speedup.coupling(model, (torch.randn(5, 3, 4, 4),))
    assert [(layer.fqn, layer.macs) for layer in coupling.layers] == [("0", 3 * 4 * 9 * 4), ("2", 32)]
    fixed, parts = coupling.layers[1].factors[-1]
    assert fixed == 0 and parts[0][1].tolist() == [4.0] * 4


class OneKeyHead(nn.Module):
    """Query heads that share one key and value head."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(6, 12), nn.Linear(6, 8), nn.Linear(12, 6)

    def forward(self, x):
        q = self.q(x).unflatten(-1, (-1, 4)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, 1, 4)).permute(2, 0, 3, 1, 4)
        return self.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_query_heads_that_share_a_value_head_are_masked_at_their_reader():
    torch.manual_seed(0)
    model, x = OneKeyHead(), torch.randn(2, 5, 6)
    group = by_name(speedup.coupling(model, (x,)))["q"]
    assert group.num_units == 3 and not group.blocked
    assert members(group)[("o.weight", 1, "reader")][1] == [4, 5, 6, 7]
    silent = copy.deepcopy(model)
    with torch.no_grad():  # without the reader the head is the mean of its values
        silent.q.weight[4:8], silent.q.bias[4:8] = 0, 0
    assert "q.weight" not in speedup.plan(silent, (x,)).keep
    speedup.mask_units(model, group, torch.tensor([1]))
    small = speedup.apply(copy.deepcopy(model), speedup.plan(model, (x,)))
    assert small.q.out_features == 8 and speedup.verify(model(x), small(x)) < 1e-5


class SplitByRouting(nn.Module):
    """Python reads from values how many rows each of two experts gets."""

    def __init__(self):
        super().__init__()
        self.first, self.router = nn.Linear(4, 16), nn.Linear(16, 2)
        self.experts = nn.ModuleList([nn.Linear(16, 10), nn.Linear(16, 10)])
        self.last = nn.Linear(10, 2)

    def forward(self, x):
        x = self.first(x).relu()
        choice = self.router(x).argmax(-1)
        counts = (choice[:, None] == torch.arange(2)).sum(0).tolist()
        parts = x[choice.argsort()].split(counts)
        return self.last(torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)]).relu())


def test_another_routing_of_the_masked_model_blocks_nothing():
    torch.manual_seed(1)
    groups = by_name(speedup.coupling(SplitByRouting(), (torch.randn(64, 4),)))
    assert not groups["first"].blocked and not groups["experts.0"].blocked


def blocked(model, x):
    return [(g.name, g.num_units, g.blocked) for g in speedup.coupling(model, (x,)).groups]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "convnext_tiny"])
def test_groups_of_code_that_reads_no_size_need_no_rehearsal(name, randomise, monkeypatch):
    torch.manual_seed(0)
    model, x = randomise(getattr(torchvision.models, name)(num_classes=10)), torch.randn(1, 3, 64, 64)
    assert capture(model, (x,)).holds_no_size
    without = blocked(model, x)
    monkeypatch.setattr(Capture, "holds_no_size", False)
    assert without == blocked(model, x)


class Asking(nn.Module):
    """Its code asks for a size that a shrunk model has not."""

    def __init__(self, asks):
        super().__init__()
        self.a, self.b, self.asks = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), asks
        self.each = nn.Parameter(torch.randn(8, 1, 1, 1))

    def forward(self, x):
        y = self.a(x)
        if self.asks == "shape" and y.shape[1] == 8 or self.asks == "layer" and self.a.out_channels == 8:
            y = y * 2
        return self.b(F.conv2d(y, self.each, groups=8) if self.asks == "groups" else y)


@pytest.mark.parametrize("asks", ["shape", "layer"])
def test_code_that_asks_for_a_size_is_rehearsed(asks):
    why = {name: why for name, _, why in blocked(Asking(asks), torch.randn(1, 3, 4, 4))}
    assert "holds this size" in why["a"]


def test_groups_given_to_a_function_are_rehearsed():
    assert not capture(Asking("groups"), (torch.randn(1, 3, 4, 4),)).holds_no_size
