"""L2 norm of the weights of a unit or block; of an element: its magnitude.

Of a unit of an activation, the norm of all it held in a step, as in NNI 3.0."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_compress.pruning.metric import Metric, View


@dataclass
class Options:
    pass


class L2Norm(Metric):
    def activation_statistic(self, activation: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor:
        return activation.double().square().sum(1)

    def unit_scores(self, view: View) -> torch.Tensor:
        return super().unit_scores(view) if view.statistic is None else view.statistic.sqrt()

    def block_scores(self, weight: torch.Tensor, heard: torch.Tensor | None) -> torch.Tensor:
        return weight.double().square().sum(1).sqrt()
