"""What layers are called with, as sums over the tokens of a micro-batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dist_compress.errors import UserError
from dist_compress.layout import device_of
from dist_compress.linear_form import input_rows, weight_rows
from dist_compress.pruning.listener import Listener
from dist_compress.pruning.metric import Metric
from dist_compress.recompute import recomputing


class Inputs(Listener):
    """`metric.input_statistic` of layers that have a linear form."""

    def __init__(self, model: nn.Module, metrics: Mapping[str, Metric], num_micro: int) -> None:
        """`metrics`: {name of a layer: its metric}."""
        self.metrics, self.shapes = dict(metrics), {}
        for name, metric in metrics.items():
            module: Any = model.get_submodule(name)
            rows = weight_rows(module, torch.empty(module.weight.shape, device="meta"))
            nothing = torch.zeros(rows.shape[0], 0, rows.shape[2], device=device_of(model))
            self.shapes[name] = metric.input_statistic(nothing).shape
        super().__init__(model, sum(map(math.prod, self.shapes.values())), num_micro)
        for name in metrics:
            self.hooks.append(model.get_submodule(name).register_forward_pre_hook(self._hook(name), with_kwargs=True))

    def _hook(self, name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not (self.awake and torch.is_grad_enabled()) or recomputing():  # without gradients: an evaluation
                return
            given = args[0] if args else next(iter(kwargs.values()))
            found = self.metrics[name].input_statistic(input_rows(module, given.detach()))
            old = self.latest.get(name)
            self.latest[name] = found if old is None else old + found  # a shared module runs more than once

        return keep

    def parts(self) -> list[torch.Tensor]:
        found = []
        for name, shape in self.shapes.items():
            zero = torch.zeros(shape, dtype=torch.float64, device=self.device)
            found.append(self.latest.get(name, zero).flatten())
        return found

    def means(self, total: torch.Tensor) -> dict[str, torch.Tensor]:
        """{layer: mean of `input_statistic` over the micro-batches since `reset`}, of which `total` is the sum over all
        ranks. Local. Raises UserError for a layer that was never called, on every rank."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        found = dict(zip(self.shapes, self.mean(total).split(sizes), strict=True))
        for name, value in found.items():
            if not value.any():
                raise UserError(
                    f"{name}: pruning method {_name(self.metrics[name])} scores its weights by what the layer is "
                    "called with, but nothing was heard that is not zero: the model does not call it. Exclude it with "
                    "exclude_op_names, or choose another method for it."
                )
        return {name: value.view(self.shapes[name]) for name, value in found.items()}


def _name(metric: Metric) -> str:
    return type(metric).__module__.rpartition(".")[2]
