"""L1 norm of the weights of a unit or block (Li et al. 2017, arXiv:1608.08710); of an element: its magnitude.

Of a unit of an activation, the norm of all it held in a step, as in NNI 3.0."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_compress.pruning.metric import Metric


@dataclass
class Options:
    pass


class L1Norm(Metric):
    def activation_statistic(self, activation: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor:
        return activation.abs().sum(1, dtype=torch.float64)

    def block_scores(self, weight: torch.Tensor, heard: torch.Tensor | None) -> torch.Tensor:
        return weight.abs().sum(1, dtype=torch.float64)
