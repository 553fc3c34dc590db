"""L1 norm of a unit's weights (Li et al. 2017, arXiv:1608.08710); of an element: its magnitude."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_compress.pruning.metric import Metric, View


@dataclass
class Options:
    pass


class L1Norm(Metric):
    def unit_scores(self, view: View) -> torch.Tensor:
        return torch.stack([weight.double().abs().sum(1) for weight in view.weights()]).mean(0)

    def element_scores(self, weight: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor:
        return weight.abs()
