"""Each method's scores against its formula, computed in another way."""

import pytest
import torch
from pruning_nets import NUM_MICRO, attach, config, micro_batch
from torch import nn

from dist_compress.pruning.metric import View, build_metric
from dist_compress.target import Member

WEIGHT = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
ROWS = WEIGHT.flatten(1).double()


def data_free(method, **options):
    member = Member("layer.weight", 0, torch.arange(6)[:, None], "producer")
    return build_metric(method, options, "pruning").unit_scores(View(6, (member,), {"layer.weight": WEIGHT}.get))


def test_data_free_methods():
    torch.testing.assert_close(data_free("l1_norm"), ROWS.abs().sum(1))
    torch.testing.assert_close(data_free("l2_norm"), torch.linalg.vector_norm(ROWS, dim=1))
    torch.testing.assert_close(data_free("fpgm"), (ROWS[:, None] - ROWS).square().sum(2).sqrt().sum(1))


def test_random_depends_on_the_seed_alone_and_is_uniform():
    assert torch.equal(data_free("random"), data_free("random"))
    assert not torch.equal(data_free("random"), data_free("random", seed=1))
    scores = build_metric("random", {"seed": 3}, "pruning").element_scores(torch.randn(100_000), None)
    assert 0 <= float(scores.min()) and float(scores.max()) < 1
    assert abs(float(scores.mean()) - 0.5) < 0.005 and abs(float(scores.std()) - 12**-0.5) < 0.005


def after_norms(model, x):
    """{unit set: output of the norm behind it}, with gradients kept."""
    first = model.bn(model.stem(x))
    a = model.bn_a(model.a(first.relu()))
    b = model.bn_b(model.b(a.relu()))
    free = model.free(model.depthwise((first.relu() + b).relu()))
    found = {"stem": first, "a": a, "b": b, "free": free}
    for value in found.values():
        value.retain_grad()
    return found, model.head(free.relu().flatten(1))


@pytest.mark.parametrize("method", ["apoz", "mean_activation", "group_fisher", "taylor"])
def test_scores_that_hear_training(method):
    """Against a float64 run of the same net that keeps all it needs."""
    schedule = {"name": "one_shot", "start": "1steps", "end": "1steps"}
    pruner, model, _ = attach(config([{"op_names": ["a", "free"]}], method=method, schedule=schedule))
    names = [s.name for s in pruner.sets]
    expected = {name: torch.zeros(s.num_units, dtype=torch.float64) for name, s in zip(names, pruner.sets, strict=True)}
    reference = type(model)().double()
    for micro in range(NUM_MICRO):
        x, y = micro_batch(0, micro)
        loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
        if micro == 2:
            with torch.no_grad():
                model.eval()(x)  # an evaluation in between is not heard
            model.train()
            loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
        loss.backward()
        pruner.after_backward(0, micro)
        found, output = after_norms(reference, x.double())
        nn.functional.cross_entropy(output, y, reduction="sum").backward()
        for name, total in expected.items():
            total += formula(method, found[name], found[name].grad)
    [listener] = pruner.listeners.values()
    for name, mean in zip(names, listener.means(), strict=True):
        torch.testing.assert_close(mean, expected[name] / NUM_MICRO, rtol=1e-4, atol=1e-7)


def formula(method, output, grad):
    """What a micro-batch adds, per channel of [B, C, H, W]."""
    if method == "apoz":
        return (output > 0).double().mean((0, 2, 3))
    if method == "mean_activation":
        return output.clamp(min=0).mean((0, 2, 3))
    per_sample = (output * grad).sum((2, 3))
    return per_sample.square().sum(0) if method == "group_fisher" else per_sample.sum(0).square()
