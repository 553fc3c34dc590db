"""What activations that are targets hold, and their gradient, sample by sample, before their mask acts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from dist_compress.errors import UserError
from dist_compress.pruning.activations import Activation, Activations
from dist_compress.pruning.listener import UnitListener
from dist_compress.pruning.metric import Metric
from dist_compress.pruning.units import UnitSet
from dist_compress.recompute import recomputing
from dist_compress.sites import replace
from dist_compress.statistic import Statistic


class Hearing(UnitListener):
    """`metric.activation_statistic` of each unit and sample, summed over the members of its set."""

    def __init__(
        self,
        activations: Activations,
        model: nn.Module,
        sets: Sequence[UnitSet],
        metrics: Sequence[Metric],
        num_micro: int,
    ) -> None:
        super().__init__(model, sets, metrics, num_micro)
        size = sum(s.num_units for s in sets) + len(sets)  # and whether anything was heard of each
        self.statistic = Statistic(num_micro, size, self.device)
        for i, (unit_set, metric) in enumerate(zip(sets, metrics, strict=True)):
            for k, member in enumerate(unit_set.activations):
                target = activations.targets[member.fqn]
                module = model.get_submodule(target.setting.module)
                hook = self._hook((i, k), target, metric)
                self.hooks.append(replace(module, target.setting.target, hook, target.setting.module))

    def parts(self) -> list[torch.Tensor]:
        heard = {i for i, _ in self.latest}
        flags = [float(i in heard) for i in range(len(self.sets))]
        return [*super().parts(), torch.tensor(flags, dtype=torch.float64, device=self.device)]

    def means(self, total: torch.Tensor) -> list[torch.Tensor]:
        """For each set, float64 [num_units]. Local. Raises UserError for what was never heard, on every rank."""
        *found, flags = self.mean(total).split([*(s.num_units for s in self.sets), len(self.sets)])
        for unit_set, metric, flag in zip(self.sets, self.metrics, flags.tolist(), strict=True):
            if not flag:
                what = "no gradient of the loss reached it" if metric.wants_gradients else "its module did not run"
                raise UserError(
                    f"{unit_set.name}: {unit_set.setting.said_by('method')} heard nothing since the last decision: "
                    f"{what} in training. Choose another target or method."
                )
        return list(found)

    def _hook(self, key: tuple[int, int], target: Activation, metric: Metric) -> Callable[[torch.Tensor], Any]:
        @torch.no_grad()
        def add(value: torch.Tensor, grad: torch.Tensor | None) -> None:
            by_unit = None if grad is None else target.by_unit(grad)
            statistic = metric.activation_statistic(target.by_unit(value), by_unit)
            old = self.latest.get(key)
            self.latest[key] = statistic if old is None else old + statistic  # a shared module runs more than once

        def hear(x: torch.Tensor) -> torch.Tensor:
            if not self.awake or not torch.is_grad_enabled():  # or an evaluation
                return x
            if not metric.wants_gradients:
                if not recomputing():
                    add(x.detach(), None)
                return x
            x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()  # its gradient by this way alone
            if not recomputing():
                value = x.detach().clone()  # what follows may overwrite it in place
                x.register_hook(lambda grad: add(value, grad))
            return x

        return hear
