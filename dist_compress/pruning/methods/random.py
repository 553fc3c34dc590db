"""Random scores: the control that any other method has to beat.

A score is a hash of the bits of the weights (of an activation: of what it held) and of `seed`, so it is the same on
every rank, at any number of ranks and however tensors are sharded. Equal weights have equal scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_compress.hashing import splitmix64, uniform
from dist_compress.pruning.metric import Metric, View


@dataclass
class Options:
    seed: int = 0


class Random(Metric):
    def activation_statistic(self, activation: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor:
        return activation.double().sum(1)

    def unit_scores(self, view: View) -> torch.Tensor:
        if view.statistic is not None:
            return self.block_scores(view.statistic[:, None], None)
        return self.block_scores(torch.cat(view.weights(), 1), None)

    def block_scores(self, weight: torch.Tensor, heard: torch.Tensor | None) -> torch.Tensor:
        bits = _bits(weight)
        return uniform(splitmix64(bits + torch.arange(bits.shape[1], device=bits.device)).sum(1), self.options.seed)


def _bits(weight: torch.Tensor) -> torch.Tensor:
    return weight.float().contiguous().view(torch.int32).long()
