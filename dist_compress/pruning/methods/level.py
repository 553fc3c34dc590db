"""Magnitude of single weights (Han et al. 2015, arXiv:1506.02626): score = abs(w), the smallest go first.

What `l1_norm` scores, but for what `granularity: default` means: single weights. Of a block or unit the sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_compress.pruning.metric import Metric


@dataclass
class Options:
    pass


class Level(Metric):
    granularity = "element"

    def activation_statistic(self, activation: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor:
        return activation.abs().sum(1, dtype=torch.float64)

    def block_scores(self, weight: torch.Tensor, heard: torch.Tensor | None) -> torch.Tensor:
        return weight.abs().sum(1, dtype=torch.float64)
