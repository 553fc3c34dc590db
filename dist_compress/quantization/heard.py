"""What layers are called with during a calibration, for methods that change weights by it: sums or maxima.

Sums are float64, one slot for each micro-batch, so that the total has equal bits at any number of ranks (statistic.py);
they are reduced one by one, and each is kept by one rank only, the owner of what is decided by it. Maxima have no order
and are reduced together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dist_compress import comm
from dist_compress.errors import UserError
from dist_compress.statistic import Statistic

Measure = Callable[[torch.Tensor], torch.Tensor]


class Heard:
    """A listener of `calibrate`, which is shown every micro-batch of this rank and keeps `measure(input)` of layers."""

    def __init__(
        self, model: nn.Module, measures: Mapping[str, tuple[Measure, tuple[int, ...]]], op: str, num_micro: int
    ) -> None:
        """`measures`: {layer: (function of its input, the shape of what it returns)}; `op`: "sum" or "max" over the
        calls, micro-batches, steps and ranks. No maximum is negative."""
        assert op in ("sum", "max")
        self.op, self.calibrating, self.passes = op, False, 0
        self.shapes = {name: shape for name, (_, shape) in measures.items()}
        device = next(model.parameters()).device
        kept = {name: math.prod(shape) for name, shape in self.shapes.items()}
        self.sums = {name: Statistic(num_micro, size, device) for name, size in kept.items()} if op == "sum" else {}
        zeros = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in self.shapes.items()}
        self.maxima = zeros if op == "max" else {}
        self.latest: dict[str, torch.Tensor] = {}  # of the pass that runs
        self.hooks = [model.register_forward_pre_hook(self._begin_pass)]
        for name, (measure, _) in measures.items():
            hook = self._hearing(name, measure)
            self.hooks.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))

    def _begin_pass(self, model: nn.Module, args: Any) -> None:
        self.latest.clear()

    def _hearing(self, name: str, measure: Measure) -> Any:
        @torch.no_grad()
        def hear(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.calibrating:
                found = measure((args[0] if args else next(iter(kwargs.values()))).detach())
                old = self.latest.get(name)
                self.latest[name] = found if old is None else self._both(old, found)

        return hear

    def _both(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b if self.op == "sum" else torch.maximum(a, b)

    def count_pass(self) -> None:
        """The pass belongs to the next of this rank's micro-batches of the step. Local."""
        micro = self.passes * comm.world_size() + comm.rank()
        self.passes += 1
        for name, found in self.latest.items():
            if self.op == "sum":
                self.sums[name].add(micro, found.flatten())
            else:
                self.maxima[name] = torch.maximum(self.maxima[name], found)
        self.latest.clear()

    def end_step(self) -> None:
        """Nothing is reduced yet."""
        self.passes = 0

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def totals(self, owner: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """Those of this rank's layers, by `owner`, from all ranks. Collective: one for each layer, or one of maxima."""
        mine = [name for name in self.shapes if owner[name] == comm.rank()]
        if self.op == "max":
            flat = torch.cat([value.flatten() for value in self.maxima.values()]).nan_to_num(nan=math.inf)
            parts = comm.all_reduce(flat, "max").split([math.prod(shape) for shape in self.shapes.values()])
            found = dict(zip(self.shapes, parts, strict=True))
            return {name: found[name].view(self.shapes[name]) for name in mine}
        kept = {}
        for name in self.shapes:
            total = self.sums.pop(name).total()
            if name in mine:
                kept[name] = total.view(self.shapes[name])
        return kept


def owners(costs: Mapping[str, float]) -> dict[str, int]:
    """{what: the rank that does it}: the most costly first, each to the rank with least to do. The same on every
    rank."""
    load = [0.0] * comm.world_size()
    found = {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        found[name] = load.index(min(load))
        load[found[name]] += costs[name]
    return {name: found[name] for name in costs}


def refuse(failures: Sequence[str], advice: str) -> None:
    """Raise UserError on every rank if some rank has failures. Collective."""
    said = [failure for of_rank in comm.gather_object(list(failures)) for failure in of_rank]
    if said:
        raise UserError(f"{'; '.join(said)}. {advice}")
