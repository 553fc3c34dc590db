"""Gradients of unit gates, read off the parameters.

A hook on each leaf parameter sees the gradient of this backward alone, before it is added to others or reduced. Where
parameters are sharded (FSDP2), the leaf is the gathered parameter, which is in its module while that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

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
        self.uses, self.hooked = by_parameter, set[nn.Parameter]()
        callers: dict[str, dict[str, None]] = {}  # module -> parameters of its own and of what lies in it
        for name in by_parameter:
            self._hook_leaf(model, name)
            path = name.split(".")[:-1]
            for depth in range(len(path) + 1):
                callers.setdefault(".".join(path[:depth]), {})[name] = None
        for module, names in callers.items():
            self.hooks.append(model.get_submodule(module).register_forward_pre_hook(self._look_again(model, names)))

    def _look_again(self, model: nn.Module, names: Iterable[str]) -> Callable[..., None]:
        def look(module: nn.Module, args: Any) -> None:
            if not torch.compiler.is_compiling():  # what is gathered for a graph was seen when that was called
                for name in names:
                    self._hook_leaf(model, name)

        return look

    def _hook_leaf(self, model: nn.Module, name: str) -> None:
        """Hear the gradients of what is the parameter now, unless it is sharded or heard already."""
        parameter = model.get_parameter(name)
        if not isinstance(parameter, DTensor) and parameter not in self.hooked:
            self.hooked.add(parameter)
            self.hooks.append(parameter.register_hook(self._hook(parameter, self.uses[name])))

    def _hook(self, parameter: nn.Parameter, uses: list[tuple[int, int, Member]]) -> Callable[[torch.Tensor], None]:
        @torch.no_grad()
        def keep(grad: torch.Tensor) -> None:
            if not self.awake:
                return
            product = grad.detach().double() * parameter.detach().double()
            for i, k, member in uses:
                self.latest[i, k] = slices(product, member).sum(1)

        return keep
