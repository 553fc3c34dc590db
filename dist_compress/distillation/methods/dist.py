"""Relations instead of values: the teacher's order of classes for a sample, and of samples for a class (DIST, Huang et
al. 2022, arXiv:2205.10536).

One minus Pearson's correlation of the softened probabilities, over the classes of each sample (inter) and over the
samples of the micro-batch for each class (intra). Scale and offset of the teacher do not matter, so a much stronger one
serves. The micro-batch is the same unit at any number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dist_compress.distillation.logit_term import LogitTerm
from dist_compress.distillation.term import Moment

_EPSILON = 1e-8


@dataclass
class Options:
    inter: float = 1.0
    intra: float = 1.0
    tau_squared: bool = True  # multiply by temperature^2
    num_classes: int | None = None  # compare the first ones only; None: all


class Dist(LogitTerm):
    def loss(self, moment: Moment, batch: dict[str, Any], output: Any, answer: Any) -> torch.Tensor:
        own, theirs, valid = self.both(moment, batch, output, answer)
        assert isinstance(theirs, torch.Tensor)
        if not bool(valid.any()):
            return 0.0 * own.sum()
        s, t = ((x[valid].float() / moment.temperature).softmax(1) for x in (own, theirs))
        inter, intra = (1 - correlation(s, t)).sum(), len(s) * (1 - correlation(s.T, t.T)).mean()
        scale = moment.temperature**2 if self.options.tau_squared else 1.0
        return scale * (self.options.inter * inter + self.options.intra * intra)


def correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Pearson's, of each row: [rows]."""
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + _EPSILON)
