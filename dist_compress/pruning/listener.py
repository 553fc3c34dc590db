"""What data-driven metrics hear during training, one micro-batch at a time.

A listener keeps only sums: neither activation, gradient nor graph lives on. The statistic has a slot per
micro-batch, so its total has equal bits at any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dist_compress.layout import device_of
from dist_compress.pruning.metric import Metric
from dist_compress.pruning.units import UnitSet
from dist_compress.statistic import Statistic


class Listener:
    """Adds up what a micro-batch says. Local but for totals; subclasses put hooks on the model."""

    def __init__(self, model: nn.Module, size: int, num_micro: int) -> None:
        """`size`: of the statistic, a vector."""
        self.num_micro = num_micro
        self.latest: dict[Any, torch.Tensor] = {}  # what the hooks of this pass found
        self.from_start = False  # all steps are heard, and no decision forgets them
        self.awake = True  # whether this step is heard; the hooks rest if not
        self.device = device_of(model)
        self.statistic = Statistic(num_micro, size, self.device)
        self.hooks: list[torch.utils.hooks.RemovableHandle] = [model.register_forward_pre_hook(self._begin)]

    @property
    def active(self) -> bool:
        return bool(self.hooks)

    def _begin(self, model: nn.Module, args: Any) -> None:
        """A pass begins: what an evaluation or a dummy round left behind is dropped."""
        self.latest.clear()

    def parts(self) -> list[torch.Tensor]:
        """What the last pass adds to the statistic, float64, `size` numbers in all."""
        raise NotImplementedError

    def add(self, micro: int) -> None:
        """Micro-batch `micro` has just gone backward."""
        self.statistic.add(micro, torch.cat(self.parts()))
        self.latest.clear()

    def mean(self, total: torch.Tensor) -> torch.Tensor:
        """float64 [size]: mean over the micro-batches since `reset`, of which `total` is the sum. Local."""
        return total / max(1, self.statistic.count() * self.num_micro)

    def close(self) -> None:
        """Take the hooks off and drop the sums."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        self.latest.clear()
        self.statistic = Statistic(self.num_micro, 0, self.device)


class UnitListener(Listener):
    """Collects `metric.gate_statistic` of unit sets, from `latest`: {(set, gate): [units] or [samples, units]}."""

    def __init__(self, model: nn.Module, sets: Sequence[UnitSet], metrics: Sequence[Metric], num_micro: int) -> None:
        """`metrics[i]` belongs to `sets[i]`; all are data-driven, hear the same and accumulate alike."""
        super().__init__(model, sum(s.num_units for s in sets), num_micro)
        self.sets, self.metrics = sets, metrics
        self.from_start = metrics[0].accumulates

    def parts(self) -> list[torch.Tensor]:
        parts = []
        for i, (unit_set, metric) in enumerate(zip(self.sets, self.metrics, strict=True)):
            found = [value for (s, _), value in sorted(self.latest.items(), key=lambda item: item[0]) if s == i]
            zero = torch.zeros(unit_set.num_units, dtype=torch.float64, device=self.device)
            parts.append(metric.gate_statistic(sum(found, start=zero)))
        return parts

    def means(self, total: torch.Tensor) -> list[torch.Tensor]:
        """For each set, float64 [num_units]: mean over the micro-batches since `reset`, of which `total` is the sum on
        all ranks. Local."""
        return list(self.mean(total).split([s.num_units for s in self.sets]))
