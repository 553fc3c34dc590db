"""Gradients of unit gates, one micro-batch at a time, for data-driven metrics.

A hook on each leaf parameter sees the gradient of this backward alone, before it is added to others or
reduced, and keeps only the sums per unit: neither gradient nor graph lives on. The statistic has a slot
per micro-batch, so its total has equal bits at any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from dist_compress.errors import UserError
from dist_compress.pruning.metric import Metric, slices
from dist_compress.pruning.units import UnitSet
from dist_compress.statistic import Statistic
from dist_compress.target import Member


class Gates:
    """Collects `metric.gate_statistic` of every data-driven unit set. Local but for `means`."""

    def __init__(self, model: nn.Module, sets: Sequence[UnitSet], metrics: Sequence[Metric], num_micro: int) -> None:
        """`metrics[i]` belongs to `sets[i]`; all are data-driven."""
        self.sets, self.metrics, self.num_micro = sets, metrics, num_micro
        self._latest: dict[tuple[int, int], torch.Tensor] = {}
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
        self.device = next(model.parameters()).device
        self.statistic = Statistic(num_micro, sum(s.num_units for s in sets), self.device)
        self._hooks = [
            model.get_parameter(name).register_hook(self._hook(model.get_parameter(name), uses))
            for name, uses in by_parameter.items()
        ]

    def _hook(self, parameter: nn.Parameter, uses: list[tuple[int, int, Member]]) -> Callable[[torch.Tensor], None]:
        @torch.no_grad()
        def keep(grad: torch.Tensor) -> None:
            product = grad.detach() * parameter.detach()
            for i, k, member in uses:
                self._latest[i, k] = slices(product, member).sum(1, dtype=torch.float64)

        return keep

    @property
    def active(self) -> bool:
        return bool(self._hooks)

    def forget(self) -> None:
        """Drop what the last backward left: it was a dummy round."""
        self._latest.clear()

    def add(self, micro: int) -> None:
        """Micro-batch `micro` has just gone backward."""
        parts = []
        for i, (unit_set, metric) in enumerate(zip(self.sets, self.metrics, strict=True)):
            found = [self._latest[i, k] for k in range(len(unit_set.gates)) if (i, k) in self._latest]
            zero = torch.zeros(unit_set.num_units, dtype=torch.float64, device=self.device)
            parts.append(metric.gate_statistic(sum(found, start=zero)))
        self.statistic.add(micro, torch.cat(parts))
        self.forget()

    def means(self) -> list[torch.Tensor]:
        """For each set, float64 [num_units]: mean over the micro-batches since `reset`. Collective."""
        mean = self.statistic.total() / max(1, self.statistic.count() * self.num_micro)
        return list(mean.split([s.num_units for s in self.sets]))

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.forget()
