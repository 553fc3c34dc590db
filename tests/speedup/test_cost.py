"""Costs against counts made by hand."""

import time

import pytest
import torch
from torch import nn

from dist_compress.config import ModelConfig
from dist_compress.models import build
from dist_compress.speedup import cost


def test_macs_of_layers_by_hand():
    x = torch.randn(1, 4, 8, 8)
    assert cost.macs(nn.Conv2d(4, 6, 3, padding=1), (x,)) == 8 * 8 * 6 * 4 * 9
    assert cost.macs(nn.Conv2d(4, 8, 3, padding=1, groups=2), (x,)) == 8 * 8 * 8 * 2 * 9
    assert cost.macs(nn.Linear(8, 5), (x,)) == 4 * 8 * 8 * 5


def test_macs_of_resnet20_are_the_papers():
    model = build(ModelConfig(name="resnet20"), num_classes=10, seed=0)
    assert cost.macs(model, (torch.randn(1, 3, 32, 32),)) == pytest.approx(40.6e6, rel=0.005)
    assert cost.macs(model, (torch.randn(3, 3, 32, 32),)) == 3 * cost.macs(model, (torch.randn(1, 3, 32, 32),))
    assert cost.num_params(model) == 269_722
    assert model.training and model.bn1.num_batches_tracked == 0


def test_fused_attention_hides_nothing():
    width, tokens = 16, 5
    layer = nn.TransformerEncoderLayer(width, 2, 32, batch_first=True).eval()
    x = torch.randn(1, tokens, width)
    by_hand = tokens * (4 * width * width + 2 * width * 32) + 2 * tokens * tokens * width
    assert cost.macs(layer, (x,)) == by_hand
    assert torch.backends.mha.get_fastpath_enabled()
    q = torch.randn(1, 2, tokens, 8)

    class Attention(nn.Module):
        def forward(self, q):
            return nn.functional.scaled_dot_product_attention(q, q, q)

    assert cost.macs(Attention(), (q,)) == 2 * 2 * tokens * tokens * 8


def test_params_and_bytes_count_ties_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    assert cost.num_params(model) == 16 + 8
    assert cost.num_bytes(model) == (16 + 8 + 8) * 4 + 8


class Sleeper(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.calls = seconds, []

    def forward(self, x, *, scale):
        assert not self.training and not torch.is_grad_enabled() and torch.get_num_threads() == 1
        self.calls.append((x.shape[0], scale.shape[0], time.perf_counter()))
        time.sleep(self.seconds)
        return x


def test_latency_takes_turns_and_orders_the_models():
    models = {"slow": Sleeper(0.004), "fast": Sleeper(0.001)}
    threads = torch.get_num_threads()
    times = cost.latencies(models, (torch.randn(3, 2),), {"scale": torch.ones(3)}, (1, 8), time_s=0.3)
    assert torch.get_num_threads() == threads and models["slow"].training
    for batch in ("b1", "b8"):
        slow, fast = times["slow"][batch], times["fast"][batch]
        assert 4 <= slow["p50"] <= slow["p90"] and 1 <= fast["p50"] <= fast["p90"]
        assert fast["p50"] < slow["p50"]
    assert {(b, s) for b, s, _ in models["slow"].calls} == {(1, 1), (8, 8)}
    calls = sorted((t, name) for name, model in models.items() for _, _, t in model.calls)
    rounds = [{name for _, name in calls[i : i + 2]} for i in range(0, len(calls), 2)]
    assert all(r == {"slow", "fast"} for r in rounds)


def test_latency_is_bounded_in_time():
    start = time.perf_counter()
    cost.latency(Sleeper(0.02), (torch.randn(1, 2),), {"scale": torch.ones(1)}, time_s=0.2)
    assert time.perf_counter() - start < 1.5


def test_resize_batch_repeats_and_drops_samples():
    x = torch.arange(6.0).view(3, 2)
    assert torch.equal(cost.resize_batch(x, 5), x[[0, 1, 2, 0, 1]])
    nested = cost.resize_batch({"a": [x, torch.tensor(3.0)], "b": "text"}, 2)
    assert torch.equal(nested["a"][0], x[:2]) and nested["a"][1] == 3 and nested["b"] == "text"
