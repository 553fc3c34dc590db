"""A small net whose mask is a function of trained scores: autograd's own gradients of both, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pruning_nets import attach, config
from torch import nn

from dist_compress.blocks import Blocks
from dist_compress.target import Coupling


class Straight(torch.autograd.Function):
    """weight * mask, where the gradient of a score is that of the mask it stands for."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, score: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        weight, mask = ctx.saved_tensors
        return grads[0] * mask, grads[0] * weight, None


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(20, 5, dtype=torch.float64, generator=generator), torch.randint(0, 3, (20,), generator=generator)


def check_straight_through(
    method: str,
    options: dict[str, Any],
    granularity: Any,
    threshold: float | None,
    schedule: dict[str, Any],
    choose: Callable[[torch.Tensor, float], torch.Tensor],
) -> int:
    """Scores, masks and weights of the middle layer over the whole schedule. Returns how many weights came back.
    `choose(scores, fraction)` -> bool, which of the blocks stay. The scores descend by options["lr"] (1), with
    options["penalty"] (0) on their sigmoids."""
    entry: dict[str, Any] = {"op_names": ["2"], "granularity": granularity, "dependency_group_id": None}
    entry |= {"sparse_ratio": None} if threshold is None else {"sparse_threshold": threshold}
    keys = {} if granularity == "2:4" else {"sparse_ratio": 0.5}
    cfg = config([entry], method=method, options=options, schedule=schedule, **keys)
    pruner, model, projection = attach(cfg, net(), Coupling(), total_steps=4)
    ours = torch.optim.SGD(model.parameters(), 0.5)

    other = net()
    weight = other[2].weight
    blocks = Blocks.of(granularity, weight.shape, "Linear", "it")
    score = torch.zeros(blocks.num, dtype=torch.float64, requires_grad=True)
    mask = torch.ones_like(weight, dtype=torch.bool)
    theirs = torch.optim.SGD([{"params": other.parameters()}, {"params": [score], "lr": options.get("lr", 1.0)}], 0.5)
    came_back = 0
    for step in range(4):
        x, y = batch(step)
        ours.zero_grad()
        projection.project()
        nn.functional.cross_entropy(model(x), y).backward()
        pruner.before_step(step)
        projection.edit_gradients()
        projection.restore()
        ours.step()
        pruner.after_step(step)

        theirs.zero_grad()
        masked = Straight.apply(weight, blocks.spread(score), mask)
        hidden = nn.functional.linear(other[1](other[0](x)), masked, other[2].bias)
        loss = nn.functional.cross_entropy(other[4](other[3](hidden)), y)
        (loss + options.get("penalty", 0.0) * score.sigmoid().sum()).backward()
        theirs.step()
        new = blocks.spread(choose(score.detach(), pruner.schedule[step + 1]))
        came_back += int((new & ~mask).sum())
        mask = new

        torch.testing.assert_close(pruner.running.scores()["2.weight"][0], score.detach(), rtol=1e-6, atol=1e-15)
        assert torch.equal(pruner.masks()["2.weight"].expand(mask.shape), mask)
        torch.testing.assert_close(projection.latent("2.weight"), weight.detach(), rtol=1e-6, atol=1e-15)
    assert not mask.all()
    return came_back
