"""ZeRO 0 to 3 against plain training in one process: masked at every step, sharded unevenly, accumulated, resumed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_compress import backends, comm
from dist_compress.config import Config
from dist_compress.projection import Masked, Projection

pytest.importorskip("deepspeed", reason="NOT RUN deepspeed: pip install deepspeed --no-build-isolation")

NUM_MICRO, STEPS = 5, 4
STAGES = (0, 1, 2, 3)


class Mlp(nn.Module):
    """A tied layer, a layer that nothing uses, a frozen one; the smallest parameters are empty on a rank."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 3)
        self.again, self.idle, self.frozen = nn.Linear(9, 9), nn.Linear(2, 2), nn.Linear(9, 9)
        self.tied = nn.Linear(9, 9, bias=False)
        self.tied.weight = self.again.weight
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tied(self.again(self.norm(self.first(x)).tanh()))
        return self.last(self.frozen(x)) * self.scale


def model() -> nn.Module:
    torch.manual_seed(0)
    return Mlp()


def config(stage: int) -> Config:
    told = Config()
    told.backend.name, told.backend.options = "deepspeed", {"stage": stage}
    told.train.global_batch_size, told.train.micro_batch_size = 4 * NUM_MICRO, 4
    told.train.exact = None
    return told


def inputs(step: int, micro: int) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(100 * step + micro))


def loss_of(output: torch.Tensor) -> torch.Tensor:
    return (output - 1.0).square().sum() / (4.0 * NUM_MICRO)


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.03, weight_decay=0.1)


def keep(step: int, shape: torch.Size) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(step)) > 0.4


def plain(masked: bool = True) -> list[float]:
    """The losses of one process that has the latent and computes with the masked weight."""
    net, losses = model(), []
    optimizer, weight = adamw(net), net.first.weight  # type: ignore[union-attr]
    for p in net.idle.parameters():  # type: ignore[union-attr]
        p.grad = torch.zeros_like(p)  # ZeRO steps what no loss reaches
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        latent = weight.detach().clone()
        if masked:
            weight.data.mul_(keep(step, weight.shape))  # type: ignore[operator, arg-type]
        losses.append(0.0)
        for micro in range(NUM_MICRO):
            loss = loss_of(net(inputs(step, micro)))
            loss.backward()
            losses[-1] += loss.item()
        weight.data.copy_(latent)  # type: ignore[operator, arg-type]
        optimizer.step()
    return losses


def train(stage: int, masked: bool = True) -> list[float]:
    net, told = model(), config(stage)
    if comm.rank():
        nn.init.zeros_(net.first.weight)  # type: ignore[union-attr, arg-type]
    backend = backends.build(told)[1]
    module = backend.wrap(net)
    module, optimizer = backend.prepare(module, adamw(net))
    projection = Projection(net, backend.layout)
    losses, rounds = [], -(-NUM_MICRO // comm.world_size())
    for step in range(STEPS):
        if masked:
            whole = keep(step, backend.layout.shape("first.weight"))
            projection.add("first.weight", "mask", Masked(backend.layout.part("first.weight", whole)))
        projection.project()
        optimizer.zero_grad()
        total = torch.zeros(1)
        for round in range(rounds):
            micro, last = round * comm.world_size() + comm.rank(), round == rounds - 1
            live = micro < NUM_MICRO
            with backend.sync_context(last):
                loss = loss_of(module(inputs(step, micro if live else 0)))
                backend.backward(loss * live, round, last)
            total += loss.detach() * live
        backend.finish_gradients()
        projection.restore(publish=False)
        backend.step(optimizer)
        losses.append(float(comm.all_reduce(total)))
    backend.release()
    return losses


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_those_of_one_process(ranks, stage):
    expected = plain()
    assert max(abs(a - b) for a, b in zip(expected, plain(masked=False), strict=True)) > 1e-2  # masks do matter
    for n in (1, 2, 3, 4):
        for losses in ranks(n, train, stage):
            assert losses == pytest.approx(expected, rel=1e-6), f"{n} ranks"
