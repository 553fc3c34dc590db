"""Gradients of unit gates, read off the parameters.

A hook on each leaf parameter sees the gradient of this backward alone, before it is added to others or reduced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from dist_compress.errors import UserError
from dist_compress.pruning.listener import UnitListener
from dist_compress.pruning.metric import Metric, slices
from dist_compress.pruning.units import UnitSet
from dist_compress.target import Member


class Gates(UnitListener):
    """dL/dz of a gate z = 1 on each unit, summed over the samples of a micro-batch."""

    def __init__(self, model: nn.Module, sets: Sequence[UnitSet], metrics: Sequence[Metric], num_micro: int) -> None:
        super().__init__(model, sets, metrics, num_micro)
        by_parameter: dict[str, list[tuple[int, int, Member]]] = {}
        for i, unit_set in enumerate(sets):
            gates = [(k, m) for k, m in enumerate(unit_set.gates) if model.get_parameter(m.fqn).requires_grad]
            if not gates:
                raise UserError(
                    f"{unit_set.name}: {unit_set.setting.said_by('method')} scores by gradients, but none of "
                    f"{', '.join(m.fqn for m in unit_set.gates)} is trained (requires_grad=False)."
                )
            for k, member in gates:
                by_parameter.setdefault(member.fqn, []).append((i, k, member))
        self.hooks += [
            model.get_parameter(name).register_hook(self._hook(model.get_parameter(name), uses))
            for name, uses in by_parameter.items()
        ]

    def _hook(self, parameter: nn.Parameter, uses: list[tuple[int, int, Member]]) -> Callable[[torch.Tensor], None]:
        @torch.no_grad()
        def keep(grad: torch.Tensor) -> None:
            if not self.awake:
                return
            product = grad.detach().double() * parameter.detach().double()
            for i, k, member in uses:
                self.latest[i, k] = slices(product, member).sum(1)

        return keep
