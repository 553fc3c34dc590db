"""Compression in a loop of one's own: the same decisions at any number of ranks, and what users get wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_compress import comm
from dist_compress.errors import UserError
from dist_compress.own_loop import attach

EXAMPLE = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(9)),)
RECIPE = {
    "pruning": {
        "method": "taylor",
        "sparse_ratio": 0.5,
        "schedule": {"name": "linear", "start": "2steps", "end": "4steps", "num_decisions": 2},
        "config_list": [{"op_types": ["Conv2d"]}],
    }
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip


def batch(step: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + micro)
    return torch.randn(5, 3, 8, 8, generator=generator), torch.randint(0, 4, (5,), generator=generator)


def trained(num_steps: int, lr: float, recipe: Any = RECIPE, wrap: bool = True) -> dict[str, Any]:
    """Five lines around a plain loop; 12 micro-batches a step whatever the number of ranks."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    each = 12 // comm.world_size()
    c = attach(model, optimizer, recipe, EXAMPLE, total_steps=num_steps, micro_batches=each)
    if wrap and comm.is_initialized():
        module: nn.Module = DistributedDataParallel(model)
    else:
        module = model
    for step in range(num_steps):
        optimizer.zero_grad()
        for micro in range(each):
            x, y = batch(step, micro * comm.world_size() + comm.rank())
            c.loss(nn.functional.cross_entropy(module(x), y)).backward()
        c.step()
    small, finished = c.finish()
    x, y = batch(99, 0)
    nn.functional.cross_entropy(small(x), y).backward()
    optimizer.step()  # goes on with the small parameters and their sliced moments
    moments = [tuple(s["momentum_buffer"].shape) for s in optimizer.state.values()]
    return {
        "decisions": finished.results["decisions"],
        "plan": finished.plan.fingerprint(),
        "parameters": finished.parameters,
        "equal": finished.difference <= 1e-5,
        "moments": moments == [tuple(p.shape) for p in small.parameters()],
        "channels": (small[0].out_channels, small[3].out_channels),
    }


def test_ranks_decide_what_one_would(ranks: Any) -> None:
    """With weights that stand still the micro-batches are all that a decision depends on."""
    one = ranks(1, trained, 5, 0.0)[0]
    assert one["channels"] == (4, 3) and one["equal"] and one["moments"]
    assert one["parameters"][1] < one["parameters"][0] / 2 and len(one["decisions"]) == 2
    for size in (2, 3, 4):
        assert ranks(size, trained, 5, 0.0) == [one] * size


def test_ranks_agree_while_they_train(ranks: Any) -> None:
    a, b = ranks(2, trained, 5, 0.05)
    assert a == b and a["channels"] == (4, 3) and a["equal"]


def limited(num_steps: int) -> Any:
    pruning = {**RECIPE["pruning"], "sparse_ratio": None, "at_most": {"params": 250}}
    return trained(num_steps, 0.0, {"pruning": pruning, "speedup": {"round_to": 2, "keep": ["3.bias"]}})


def test_limits_of_the_whole_model_and_settings_of_the_speedup(ranks: Any) -> None:
    one = ranks(1, limited, 5)[0]
    assert one["channels"] == (2, 6) and one["parameters"][1] <= 250 and one["equal"]  # no output of 3 goes
    assert ranks(2, limited, 5) == [one] * 2


def test_recipes_by_name_and_by_overrides() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    overrides = ["+recipe=resnet_prune", "pruning.method=l1_norm", "pruning.compute=channels"]
    c = attach(model, optimizer, overrides, EXAMPLE, total_steps=10)
    assert c.config.pruning.method == "l1_norm" and c.last <= 10
    assert attach(net(), optimizer, "resnet_prune", EXAMPLE, total_steps=10).config.pruning.compute == "macs"


def test_masks_are_on_between_steps_and_the_optimizer_sees_what_is_beneath() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recipe = {"pruning": {"method": "l1_norm", "sparse_ratio": 0.5, "config_list": [{"op_names": ["0"]}]}}
    c = attach(model, optimizer, recipe, EXAMPLE, total_steps=3)
    dead = model[0].weight.flatten(1).eq(0).all(1)
    assert int(dead.sum()) == 4
    beneath = []
    optimizer.register_step_pre_hook(lambda *_: beneath.append(model[0].weight.flatten(1).eq(0).all(1).any()))
    for step in range(3):
        x, y = batch(step, 0)
        c.loss(nn.functional.cross_entropy(model(x), y)).backward()
        optimizer.step()  # by whoever calls it
    assert not any(beneath) and torch.equal(model[0].weight.flatten(1).eq(0).all(1), dead)


def test_zeros_that_cannot_go_stay_zero_after_the_end() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    entry = {"op_names": ["3"], "granularity": "element"}
    recipe = {"pruning": {"method": "l1_norm", "sparse_ratio": 0.5, "config_list": [entry]}}
    c = attach(model, optimizer, recipe, EXAMPLE, total_steps=1)
    for step in range(3):
        x, y = batch(step, 0)
        c.loss(nn.functional.cross_entropy(model(x), y)).backward()
        c.step()
        if step == 0:
            model, _ = c.finish()
            dead = model[3].weight == 0
    assert int(dead.sum()) == dead.numel() // 2 and torch.equal(model[3].weight == 0, dead)


def test_zeros_stay_in_a_model_that_is_not_to_be_shrunk() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruning = {"method": "l1_norm", "sparse_ratio": 0.5, "config_list": [{"op_names": ["0"]}]}
    recipe = {"pruning": pruning, "speedup": {"enabled": False}}
    c = attach(model, optimizer, recipe, EXAMPLE, total_steps=1)
    for step in range(3):
        x, y = batch(step, 0)
        c.loss(nn.functional.cross_entropy(model(x), y)).backward()
        c.step()
        if step == 0:
            model, finished = c.finish()
    assert finished.plan is None and finished.difference == 0 and model[0].out_channels == 8
    assert int(model[0].weight.flatten(1).eq(0).all(1).sum()) == 4 and int(model[1].weight.eq(0).sum()) == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optimizer": torch.optim.LBFGS}, "LBFGS cannot be used: its history is over whole parameter vectors"),
        ({"recipe": {"pruning": {"method": None}}}, "the recipe asks for nothing; set pruning.method"),
        ({"recipe": {"prunning": {}}}, "prunning: no such key"),
        ({"recipe": {**RECIPE, "speedup": {"at": 0.9}}}, "speedup.at=0.9: finish\\(\\) shrinks the model"),
        ({"recipe": {**RECIPE, "train": {"exact": True}}}, "train of the recipe would have no effect"),
        ({"recipe": "no_such"}, "no_such"),
        ({"backwards": 2}, "backward pass 2 before the optimizer step, but micro_batches=1"),
        ({"steps": 3}, "finish\\(\\) after 3 optimizer steps, but the last decision falls after 4"),
    ],
)
def test_what_users_get_wrong(change: dict[str, Any], said: str) -> None:
    model = net()
    optimizer = change.get("optimizer", torch.optim.SGD)(model.parameters(), 0.1)
    with pytest.raises(UserError, match=said):
        c = attach(model, optimizer, change.get("recipe", RECIPE), EXAMPLE, total_steps=5)
        for step in range(change.get("steps", 5)):
            for _ in range(change.get("backwards", 1)):
                x, y = batch(step, 0)
                c.loss(nn.functional.cross_entropy(model(x), y)).backward()
            c.step()
        c.finish()
