"""Mean of the outputs of a unit behind a ReLU (Molchanov et al. 2017, arXiv:1611.06440, section 2.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_compress.pruning.metric import Metric, View


@dataclass
class Options:
    pass


class MeanActivation(Metric):
    data_driven = True
    hears = "outputs"

    def output_statistic(self, output: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor:
        return output.double().relu().mean(1)

    def gate_statistic(self, gate: torch.Tensor) -> torch.Tensor:
        return gate.mean(0) if gate.dim() > 1 else gate

    def unit_scores(self, view: View) -> torch.Tensor:
        assert view.statistic is not None
        return view.statistic
