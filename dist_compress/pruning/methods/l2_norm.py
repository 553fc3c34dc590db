"""L2 norm of the weights of a unit or block; of an element: its magnitude."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_compress.pruning.metric import Metric


@dataclass
class Options:
    pass


class L2Norm(Metric):
    def block_scores(self, weight: torch.Tensor, heard: torch.Tensor | None) -> torch.Tensor:
        return weight.double().square().sum(1).sqrt()
