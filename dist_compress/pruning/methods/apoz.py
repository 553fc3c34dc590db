"""Average percentage of zeros (Hu et al. 2016, arXiv:1607.03250).

The score of a unit is the share of its outputs that are not zero behind a ReLU, over samples and positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_compress.pruning.metric import Metric, View


@dataclass
class Options:
    pass


class Apoz(Metric):
    data_driven = True
    hears = "outputs"

    def output_statistic(self, output: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor:
        return (output > 0).double().mean(1)

    def gate_statistic(self, gate: torch.Tensor) -> torch.Tensor:
        return gate.mean(0) if gate.dim() > 1 else gate

    def unit_scores(self, view: View) -> torch.Tensor:
        assert view.statistic is not None
        return view.statistic
