"""What data-driven metrics hear during training, one micro-batch at a time.

A listener keeps only sums per unit: neither activation, gradient nor graph lives on. The statistic has a slot per
micro-batch, so its total has equal bits at any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dist_compress.pruning.metric import Metric
from dist_compress.pruning.units import UnitSet
from dist_compress.statistic import Statistic


class Listener:
    """Collects `metric.gate_statistic` of unit sets. Local but for `means`; subclasses put hooks on the model."""

    def __init__(self, model: nn.Module, sets: Sequence[UnitSet], metrics: Sequence[Metric], num_micro: int) -> None:
        """`metrics[i]` belongs to `sets[i]`; all are data-driven and hear the same."""
        self.sets, self.metrics, self.num_micro = sets, metrics, num_micro
        self.latest: dict[tuple[int, int], torch.Tensor] = {}  # (set, gate) -> [units] or [samples, units]
        self.device = next(model.parameters()).device
        self.statistic = Statistic(num_micro, sum(s.num_units for s in sets), self.device)
        self.hooks: list[torch.utils.hooks.RemovableHandle] = [model.register_forward_pre_hook(self._begin)]

    @property
    def active(self) -> bool:
        return bool(self.hooks)

    def _begin(self, model: nn.Module, args: Any) -> None:
        """A pass begins: what an evaluation or a dummy round left behind is dropped."""
        self.latest.clear()

    def add(self, micro: int) -> None:
        """Micro-batch `micro` has just gone backward."""
        parts = []
        for i, (unit_set, metric) in enumerate(zip(self.sets, self.metrics, strict=True)):
            found = [value for (s, _), value in sorted(self.latest.items(), key=lambda item: item[0]) if s == i]
            zero = torch.zeros(unit_set.num_units, dtype=torch.float64, device=self.device)
            parts.append(metric.gate_statistic(sum(found, start=zero)))
        self.statistic.add(micro, torch.cat(parts))
        self.latest.clear()

    def means(self) -> list[torch.Tensor]:
        """For each set, float64 [num_units]: mean over the micro-batches since `reset`. Collective."""
        mean = self.statistic.total() / max(1, self.statistic.count() * self.num_micro)
        return list(mean.split([s.num_units for s in self.sets]))

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        self.latest.clear()
