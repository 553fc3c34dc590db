"""Movement pruning (Sanh et al. 2020, arXiv:2005.07683): weights that move towards zero go.

    S_ij = - sum over steps of dL/dW'_ij * W_ij        W' = mask * W

The gradient passes straight through the mask: scores of masked weights move on, so these may come back, and every
decision is taken anew. The last one is final. (The learning rate of the scores in the paper is a factor that no order
depends on.) The score of a block of weights is the sum of theirs (Lagunas et al. 2021, arXiv:2109.04838). That of a
channel is the sum over its gate, g dL/dg + b dL/db behind a norm, where dL/dW * W of a row would be zero by scale
invariance; a channel that is masked has no gradient, so its score stands still meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_compress.pruning.metric import Metric, View


@dataclass
class Options:
    pass


class Movement(Metric):
    granularity = "element"
    data_driven = True
    accumulates = True
    stays_removed = False

    def gate_statistic(self, gate: torch.Tensor) -> torch.Tensor:
        return -gate

    def unit_scores(self, view: View) -> torch.Tensor:
        assert view.statistic is not None
        return view.statistic

    def block_step(self, score: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        return score - (weight.double() * grad.double()).sum(1)

    def block_scores(self, weight: torch.Tensor, heard: torch.Tensor | None) -> torch.Tensor:
        assert heard is not None
        return heard[:, 0]
