"""RigL: sparse training whose weights move to where the gradient is (Evci et al. 2020, arXiv:1911.11134).

The first decision keeps the largest weights. From then on, every `every` steps until `until`, a fraction

    f(t) = fraction / 2 * (1 + cos(pi * (t - first) / (until - first)))

of the weights that are kept, those of the smallest magnitude, makes room for as many of the others: those with the
largest gradient, which is dense in these steps. They start at zero. The ratio never changes, unless the schedule says
so. `growth: random` is SET (Mocanu et al. 2018, arXiv:1707.04780). Other than in the paper the optimizer takes its step
at a decision as well; its moments of a weight fade while that is masked, since its gradient is zero then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from dist_compress.errors import UserError
from dist_compress.hashing import uniform
from dist_compress.pruning.metric import Metric

_GROWTHS = ("gradient", "random")
_DISTRIBUTIONS = ("uniform", "erk")


@dataclass
class Options:
    fraction: float = 0.3  # alpha of the paper: what of the kept is exchanged at first
    every: int = 100  # steps between two exchanges
    until: float | str = 0.75  # a duration: the last exchange lies before it
    distribution: str = "uniform"  # of the ratio over the targets: uniform | erk (pruning/distribution.py)
    growth: str = "gradient"  # gradient | random
    seed: int = 0  # of growth=random


class RigL(Metric):
    granularity = "element"

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        if not 0 <= options.fraction < 1:
            raise UserError(f"rigl: options.fraction={options.fraction} must be at least 0 and below 1.")
        if options.every < 1:
            raise UserError(f"rigl: options.every={options.every} must be at least 1 step.")
        for key, choices in (("distribution", _DISTRIBUTIONS), ("growth", _GROWTHS)):
            if getattr(options, key) not in choices:
                raise UserError(f"rigl: options.{key}={getattr(options, key)!r}: choose {' or '.join(choices)}.")
        self.distribution = options.distribution
        self.first = self.end = 0

    def updates(self, first: int, steps: Callable[[float | str, str], int]) -> Iterable[int]:
        self.first, self.end = first, steps(self.options.until, "until")
        times = range(first + self.options.every, self.end, self.options.every)
        if not times:
            raise UserError(
                f"rigl: options.every={self.options.every} and options.until={self.options.until!r} (step {self.end}) "
                f"leave no exchange after the first decision at step {first}. Lower every, or raise until."
            )
        return times

    def exchanged(self, t: int) -> float:
        if (t - self.first) % self.options.every or not self.first < t < self.end:
            return 0.0  # a decision of the schedule alone
        return self.options.fraction / 2 * (1 + math.cos(math.pi * (t - self.first) / (self.end - self.first)))

    def block_scores(self, weight: torch.Tensor, heard: torch.Tensor | None) -> torch.Tensor:
        return weight.abs().sum(1, dtype=torch.float64)

    def growth_scores(self, weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        if self.options.growth == "random":
            return uniform(grad.float().contiguous().view(torch.int32).long().sum(1), self.options.seed)
        return grad.abs().sum(1, dtype=torch.float64)
