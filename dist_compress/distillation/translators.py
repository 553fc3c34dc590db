"""Small linear maps between a student's and a teacher's widths, trained beside the student, with an Adam of their own.

They are no part of the model that is delivered, so neither is the run's optimizer theirs. All of them are slices of one
vector; its gradient is summed over the micro-batches in their order (dist_compress/statistic.py), so that every rank
takes the same step, with equal bits at any number of ranks. Adam: Kingma and Ba 2015, arXiv:1412.6980.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from dist_compress.hashing import seed_of
from dist_compress.statistic import Statistic

_PURPOSE = 0x7A1  # of the seed
_BETAS, _EPSILON = (0.9, 0.999), 1e-8


class Translators:
    def __init__(self, seed: int, num_micro: int, lr: float, device: torch.device) -> None:
        self.seed, self.num_micro, self.lr, self.device = seed, num_micro, lr, device
        self.shapes: list[tuple[int, int]] = []
        self.values = torch.zeros(0, device=device)

    def add(self, to_width: int, from_width: int) -> int:
        """A new map, its number for `weight`. Its weights are drawn by the number, uniform as nn.Linear's."""
        bound, number = 1 / math.sqrt(from_width), len(self.shapes)
        generator = torch.Generator().manual_seed(seed_of(self.seed, _PURPOSE, number))
        drawn = (2 * torch.rand(to_width * from_width, generator=generator) - 1) * bound
        self.shapes.append((to_width, from_width))
        self.values = torch.cat([self.values, drawn.to(self.device)])
        return number

    def ready(self) -> None:
        """All are there: from here on they are trained."""
        self.values.requires_grad_()
        self.first, self.second = torch.zeros_like(self.values).detach(), torch.zeros_like(self.values).detach()
        self.steps = 0
        self.statistic = Statistic(self.num_micro, len(self.values), self.device)

    def weight(self, number: int) -> torch.Tensor:
        """[to_width, from_width]."""
        sizes = [a * b for a, b in self.shapes]
        start = sum(sizes[:number])
        return self.values[start : start + sizes[number]].view(self.shapes[number])

    def after_backward(self, micro: int) -> None:
        """Put this micro-batch's gradient aside. Local."""
        if self.values.grad is not None:
            self.statistic.add(micro, self.values.grad)
            self.values.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One step of Adam on the sum over the global batch. Collective, unless there are none anywhere."""
        if not self.shapes:
            return
        self.values.grad = None  # of a micro-batch that does not exist
        grad = self.statistic.total().to(self.values.dtype)
        self.statistic.reset()
        self.steps += 1
        self.first.lerp_(grad, 1 - _BETAS[0])
        self.second.lerp_(grad.square(), 1 - _BETAS[1])
        mean, square = (m / (1 - b**self.steps) for m, b in zip((self.first, self.second), _BETAS, strict=True))
        self.values -= self.lr * mean / (square.sqrt() + _EPSILON)

    def state_dict(self) -> dict[str, Any]:
        """The same on every rank."""
        return {
            "values": self.values.detach().clone(), "first": self.first.clone(), "second": self.second.clone(),
            "steps": self.steps,
        }  # fmt: skip

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("values", "first", "second"):
            getattr(self, name).copy_(state[name])
        self.steps = state["steps"]
