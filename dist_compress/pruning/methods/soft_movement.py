"""Soft movement pruning (Sanh et al. 2020, arXiv:2005.07683, section 4.2): what scores below a threshold goes.

    S_ij -= lr * (dL/dW'_ij * W_ij + penalty * dsigmoid(S_ij)/dS_ij)        kept where sigmoid(S_ij) >= sparse_threshold

so the scores minimise loss + penalty * sum of sigmoid(S), by plain gradient descent where the paper has Adam. They
start at 0, a sigmoid of 1/2; the larger the penalty, the sparser. Gradients pass straight through the mask, and what is
masked may come back until the last decision. Of a block (Lagunas et al. 2021, arXiv:2109.04838) there is one S,
whose gradient is the sum over the weights of the block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_compress.pruning.metric import Metric


@dataclass
class Options:
    lr: float = 1.0  # of the scores: such that they move by some tenths in a run
    penalty: float = 0.0


class SoftMovement(Metric):
    granularity = "element"
    data_driven = True
    accumulates = True
    stays_removed = False

    def block_step(self, score: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        kept = score.sigmoid()
        slope = (weight.double() * grad.double()).sum(1) + self.options.penalty * kept * (1 - kept)
        return score - self.options.lr * slope

    def block_scores(self, weight: torch.Tensor, heard: torch.Tensor | None) -> torch.Tensor:
        assert heard is not None
        return heard[:, 0].sigmoid()
