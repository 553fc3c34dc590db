"""L2 norm of a unit's weights; of an element: its magnitude."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_compress.pruning.metric import Metric, View


@dataclass
class Options:
    pass


class L2Norm(Metric):
    def unit_scores(self, view: View) -> torch.Tensor:
        return torch.stack([weight.double().square().sum(1).sqrt() for weight in view.weights()]).mean(0)

    def element_scores(self, weight: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor:
        return weight.abs()
