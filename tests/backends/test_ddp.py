"""Gradients are the sum over the global batch: equal bits when exact, close otherwise; clipping; missing rounds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_compress import backends, comm
from dist_compress.config import Config
from dist_compress.errors import UserError

NUM_MICRO = 5


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))


def inputs(micro: int) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(micro)) * 10.0 ** (micro - 2)


def gradients(exact: bool, max_norm: float | None = None, spoil: bool = False) -> tuple:
    config = Config()
    config.train.exact = exact
    config.train.global_batch_size, config.train.micro_batch_size = 4 * NUM_MICRO, 4
    net = model()
    if spoil and comm.rank() > 0:
        nn.init.zeros_(net[0].weight)  # type: ignore[arg-type]
    backend = backends.build(config)[1]
    module = backend.wrap(net)
    rounds = -(-NUM_MICRO // comm.world_size())
    for round in range(rounds):
        micro, last = round * comm.world_size() + comm.rank(), round == rounds - 1
        with backend.sync_context(last):
            live = micro < NUM_MICRO
            loss = module(inputs(micro if live else 0)).square().sum() / 20.0 * live
            backend.backward(loss, round, last)
    backend.finish_gradients()
    norm = None if max_norm is None else float(backend.clip(max_norm))
    return [backend.layout.grad(name).clone() for name, _ in net.named_parameters()], norm, dict(comm.calls)  # type: ignore


def whole_batch() -> list[torch.Tensor]:
    net = model().double()
    for micro in range(NUM_MICRO):
        (net(inputs(micro).double()).square().sum() / 20.0).backward()
    return [p.grad for p in net.parameters()]  # type: ignore[misc]


@pytest.mark.parametrize("exact", [True, False])
def test_gradients_are_the_sum_over_the_global_batch(ranks, exact):
    for n in (1, 2, 3, 4):
        for grads, _, calls in ranks(n, gradients, exact, None, True):
            for grad, expected in zip(grads, whole_batch(), strict=True):
                assert (grad - expected).abs().max() <= 1e-5 * expected.abs().max()
            assert exact or n == 1 or calls["sum_hook"] == 1  # once a step, in the last round


def test_exact_gradients_have_equal_bits_and_plain_ones_do_not(ranks):
    single = {exact: ranks(1, gradients, exact)[0][0] for exact in (True, False)}
    differ = 0
    for n in (2, 3, 4):
        exact, plain = (ranks(n, gradients, e)[0][0] for e in (True, False))
        assert all(map(torch.equal, exact, single[True])), f"{n} ranks"
        differ += not all(map(torch.equal, plain, single[False]))
    assert differ > 0  # the negative control: these values do show the order of a plain sum


class Branches(nn.Module):
    """One layer that nothing uses, and one that only the inputs of micro-batch 1 use."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.idle, self.seldom = nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.trunk(x) + self.seldom(x) if torch.equal(x, inputs(1)) else self.trunk(x)


def two_steps_of_branches(exact: bool) -> tuple[set[str], dict[str, torch.Tensor]]:
    config = Config()
    config.train.exact = exact
    config.train.global_batch_size, config.train.micro_batch_size = 4 * NUM_MICRO, 4
    torch.manual_seed(0)
    net = Branches()
    backend = backends.build(config)[1]
    module = backend.wrap(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-5, weight_decay=0.1)
    rounds = -(-NUM_MICRO // comm.world_size())
    for _ in range(2):
        optimizer.zero_grad()
        for round in range(rounds):
            micro, last = round * comm.world_size() + comm.rank(), round == rounds - 1
            with backend.sync_context(last):
                live = micro < NUM_MICRO
                backend.backward(module(inputs(micro if live else 0)).square().sum() * live, round, last)
        backend.finish_gradients()
        optimizer.step()
    return {n for n, p in net.named_parameters() if p.grad is None}, {n: p.detach() for n, p in net.named_parameters()}


@pytest.mark.parametrize("exact", [True, False])
def test_what_no_micro_batch_reaches_has_no_gradient_and_stays(ranks, exact):
    torch.manual_seed(0)
    untouched = Branches().idle.weight
    idle, single = ranks(1, two_steps_of_branches, exact)[0]
    assert idle == {"idle.weight", "idle.bias"} and torch.equal(single["idle.weight"], untouched)
    for n in (2, 3, 4):
        for names, weights in ranks(n, two_steps_of_branches, exact):
            assert names == idle
            assert all(torch.allclose(weights[k], single[k], rtol=1e-4, atol=1e-6) for k in single)


def test_clip_returns_the_norm_before_and_scales_to_the_bound(ranks):
    whole = torch.cat([g.flatten() for g in whole_batch()]).norm()
    for grads, norm, _ in ranks(2, gradients, True, 0.5):
        assert norm == pytest.approx(float(whole), rel=1e-5)
        assert torch.cat([g.flatten() for g in grads]).norm() == pytest.approx(0.5, rel=1e-4)


def test_an_unknown_backend_lists_the_choices():
    with pytest.raises(UserError, match=r"backend\.name='horovod'.*ddp"):
        backends.find("horovod")
