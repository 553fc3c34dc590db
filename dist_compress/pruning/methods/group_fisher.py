"""Group Fisher pruning (Liu et al. 2021, arXiv:2108.00708).

A gate z = 1 on a unit has, for each sample, dL/dz = sum over positions of output * dL/doutput; units that are coupled
share a gate, so theirs are added. The score is the sum over samples of (dL/dz)^2. In a global group with compute
params or macs it is divided by the price of the unit, as the paper does with memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_compress.pruning.metric import Metric, View


@dataclass
class Options:
    pass


class GroupFisher(Metric):
    data_driven = True
    hears = "outputs"
    wants_gradients = True

    def output_statistic(self, output: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor:
        assert grad is not None
        return (output.double() * grad.double()).sum(1)

    def gate_statistic(self, gate: torch.Tensor) -> torch.Tensor:
        return gate.square().sum(0) if gate.dim() > 1 else gate

    def unit_scores(self, view: View) -> torch.Tensor:
        assert view.statistic is not None
        return view.statistic
