"""Filter pruning via the geometric median (He et al. 2019, arXiv:1811.00250).

The score of a unit is the sum of the Euclidean distances from its weights to those of all other units of its layer:
what lies near the middle can be replaced by the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_compress.pruning.metric import Metric, View


@dataclass
class Options:
    pass


class Fpgm(Metric):
    def unit_scores(self, view: View) -> torch.Tensor:
        return torch.stack([_distances(weight.double()).sum(1) for weight in view.weights()]).mean(0)


def _distances(rows: torch.Tensor) -> torch.Tensor:
    """Euclidean distances between all rows: [n, k] -> [n, n]."""
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
