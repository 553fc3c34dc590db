"""What units put out, and its gradient, sample by sample.

The output of a unit is that of the norm behind its producer, or of the producer where no norm follows: the same
places at which `gates` reads gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from dist_compress.blocks import activation_dim
from dist_compress.pruning.listener import UnitListener
from dist_compress.pruning.metric import Metric
from dist_compress.pruning.units import UnitSet
from dist_compress.recompute import recomputing


class Outputs(UnitListener):
    """`metric.output_statistic` of each unit and sample, summed over the places of its set."""

    def __init__(self, model: nn.Module, sets: Sequence[UnitSet], metrics: Sequence[Metric], num_micro: int) -> None:
        super().__init__(model, sets, metrics, num_micro)
        uses: dict[str, list[tuple[int, int, torch.Tensor]]] = {}
        for i, unit_set in enumerate(sets):
            places = dict.fromkeys((m.module, m.dim) for m in unit_set.gates)
            first = {place: next(m for m in unit_set.gates if (m.module, m.dim) == place) for place in places}
            for k, member in enumerate(first.values()):
                uses.setdefault(member.module, []).append((i, k, member.index.to(self.device)))
        self.hooks += [
            model.get_submodule(name).register_forward_hook(self._hook(found)) for name, found in uses.items()
        ]

    def _hook(self, uses: list[tuple[int, int, torch.Tensor]]) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if not (self.awake and torch.is_grad_enabled()) or recomputing():  # without gradients: an evaluation
                return
            heard = [use for use in uses if not self.metrics[use[0]].wants_gradients]
            self._add(heard, _by_sample(module, output.detach()), None)
            rest = [use for use in uses if self.metrics[use[0]].wants_gradients]
            if rest and output.requires_grad:
                value = _by_sample(module, output.detach().clone())  # what follows may overwrite it in place
                output.register_hook(lambda grad: self._add(rest, value, _by_sample(module, grad.detach())))

        return keep

    @torch.no_grad()
    def _add(self, uses: list[tuple[int, int, torch.Tensor]], output: torch.Tensor, grad: torch.Tensor | None) -> None:
        for i, k, index in uses:
            statistic = self.metrics[i].output_statistic(output, grad)[:, index].sum(2)  # [samples, units]
            old = self.latest.get((i, k))
            self.latest[i, k] = statistic if old is None else old + statistic  # a shared module runs more than once


def _by_sample(module: nn.Module, output: torch.Tensor) -> torch.Tensor:
    """[samples, positions, channels]."""
    output = output.movedim(activation_dim(type(module).__name__, output.dim()), -1)
    return output.reshape(output.shape[0], -1, output.shape[-1])
