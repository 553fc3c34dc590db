"""First-order Taylor importance at the unit's gate (Molchanov et al. 2019, arXiv:1906.10771).

A gate z = 1 on a unit's output has dL/dz = gamma * dL/dgamma + beta * dL/dbeta behind a norm, and sum(w *
dL/dw) + b * dL/db where no norm follows; on a unit of an activation a that is a target, sum(a * dL/da). The importance
is the mean over micro-batches of (dL/dz)^2, the estimated loss change squared. Never sum(w * dL/dw) of a weight that a
batch norm follows: it is zero by scale invariance. Of a block of weights it is abs(sum(w * dL/dw)), the change of the
loss to first order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_compress.pruning.metric import Metric, View


@dataclass
class Options:
    pass


class Taylor(Metric):
    data_driven = True
    wants_gradients = True

    def activation_statistic(self, activation: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor:
        assert grad is not None
        return (activation.double() * grad.double()).sum(1)

    def gate_statistic(self, gate: torch.Tensor) -> torch.Tensor:
        return super().gate_statistic(gate).square()

    def unit_scores(self, view: View) -> torch.Tensor:
        assert view.statistic is not None
        return view.statistic

    def block_scores(self, weight: torch.Tensor, heard: torch.Tensor | None) -> torch.Tensor:
        assert heard is not None
        return (weight.double() * heard.double()).sum(1).abs()
