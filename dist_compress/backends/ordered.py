"""Gradients of whole parameters, summed over the micro-batches of a step in their order: equal bits at any number of
ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dist_compress import comm


class OrderedGradients:
    """A parameter that no micro-batch of the step reached has no gradient."""

    def __init__(self, parameters: Sequence[nn.Parameter], num_micro: int) -> None:
        self.parameters, self.num_micro = list(parameters), num_micro
        self._total: comm.OrderedSum | None = None

    def take(self, round: int) -> None:
        """The backward pass of a micro-batch is over: fold its float32 gradients into the sum. Collective."""
        if not self.parameters:
            return
        reached = torch.tensor([p.grad is not None for p in self.parameters], device=comm.device())
        row = torch.cat([*(_take_grad(p) for p in self.parameters), reached.float()])
        if round == 0:
            self._total = comm.OrderedSum(len(row), row.device)
        assert self._total is not None
        num_live = min(comm.world_size(), self.num_micro - round * comm.world_size())
        self._total.add(row[None], num_live)

    @torch.no_grad()
    def finish(self) -> None:
        """Put the float64 sums, rounded once, in the place of the gradients. Collective."""
        if not self.parameters:
            return
        assert self._total is not None
        *total, reached = self._total.total().split([*(p.numel() for p in self.parameters), len(self.parameters)])
        for parameter, grad, count in zip(self.parameters, total, reached.tolist(), strict=True):
            parameter.grad = grad.view_as(parameter).to(parameter.dtype) if count else None
        self._total = None


def _take_grad(parameter: nn.Parameter) -> torch.Tensor:
    """The flat float32 gradient of this micro-batch, zeros where it did not reach the parameter."""
    grad, parameter.grad = parameter.grad, None
    return torch.zeros_like(parameter).flatten().float() if grad is None else grad.flatten().float()
