"""Network slimming (Liu et al. 2017, arXiv:1708.06519).

The score of a unit is the absolute scale of the norms behind it. Until the last decision training minimises
loss + `penalty` * sum of abs(scale), by its subgradient, which drives the scales of what is not needed to zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dist_compress.errors import UserError
from dist_compress.pruning.metric import Metric, View, slices


@dataclass
class Options:
    penalty: float = 1e-4


class Slim(Metric):
    def check(self, view: View) -> None:
        if not view.scales:
            names = ", ".join(m.module for m in view.scored)
            raise UserError(f"pruning method slim scores by the scale of norms, but none follows {names}. Exclude it.")

    def unit_scores(self, view: View) -> torch.Tensor:
        return torch.stack([slices(view.latent(m.fqn), m).double().abs().sum(1) for m in view.scales]).mean(0)

    def edit_gradients(self, view: View, grad: Callable[[str], torch.Tensor | None]) -> None:
        for member in view.scales:
            of_scale = grad(member.fqn)
            if of_scale is not None:
                index = member.index.flatten().to(of_scale.device)
                of_scale.index_add_(0, index, view.latent(member.fqn)[index].sign(), alpha=self.options.penalty)
