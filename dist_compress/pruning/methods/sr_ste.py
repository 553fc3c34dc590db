"""Sparse-refined straight-through training of N:M masks (Zhou et al. 2021, arXiv:2102.04010).

Every `every` steps the mask is decided anew: of each M consecutive weights along the input dim the N largest stay. The
model runs with the masked weights, but their gradient reaches all weights as if there were no mask (straight-through),
and what is masked is pulled towards zero:

    gradient of w = dL/d(mask * w) + decay * (1 - mask) * w                                         (equation 9)

so that masks settle. Any other granularity of blocks works alike, with its ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from dist_compress.errors import UserError
from dist_compress.pruning.metric import Metric


@dataclass
class Options:
    decay: float = 2e-4  # lambda of the paper; 0: the plain straight-through estimator
    every: int = 1  # steps between two masks
    until: float | str = 1.0  # a duration; the mask of then is the last one


class SrSte(Metric):
    granularity = "2:4"
    stays_removed = False

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        if not options.decay >= 0:
            raise UserError(f"sr_ste: options.decay={options.decay} must be at least 0.")
        if options.every < 1:
            raise UserError(f"sr_ste: options.every={options.every} must be at least 1 step.")
        self.masked_decay = options.decay

    def updates(self, first: int, steps: Callable[[float | str, str], int]) -> Iterable[int]:
        return range(first + self.options.every, steps(self.options.until, "until") + 1, self.options.every)

    def block_scores(self, weight: torch.Tensor, heard: torch.Tensor | None) -> torch.Tensor:
        return weight.abs().sum(1, dtype=torch.float64)
