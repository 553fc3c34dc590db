"""The base of every technique: what the loop calls, and when. The loop names no technique.

One optimizer step, on every rank:

    for each round (micro-batch j = round * world_size + rank):
        forward, task loss + sum of method.loss, backward
        method.after_backward(step, micro)        only for live micro-batches; local, no collective
    gradients are reduced
    method.before_step(step)                      gradient rules, before clipping; collective: called on every rank
    clip, latent weights back, optimizer step
    method.after_step(step)                       decisions; collective: called on every rank
    project the weights
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dist_compress.config import Config
from dist_compress.errors import UserError
from dist_compress.projection import Projection
from dist_compress.target import Coupling, Latencies

Tensors = dict[str, torch.Tensor]


@dataclass
class Context:
    """What a method is given when it attaches. The same on every rank, but for the local weights."""

    config: Config
    model: nn.Module  # unwrapped: parameter names are the user's
    projection: Projection
    coupling: Coupling
    num_micro: int  # M: micro-batches of one optimizer step
    total_steps: int
    steps_per_epoch: float
    example: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # a call of the model, by which sites are found
    latencies: Latencies | None = None  # where something is asked in milliseconds
    # Collective: the metrics of the model as it is now on so many samples of training data, the same on every rank.
    evaluate: Callable[[int], dict[str, float]] | None = None


class Method:
    """A technique. Every hook is optional; `state_dict` must be identical on every rank (gather before)."""

    compresses = True  # False: it only adds losses; the model keeps its shape, and no decision is waited for

    def attach(self, context: Context) -> None: ...

    def loss(self, step: int, batch: dict[str, Any], output: Any) -> torch.Tensor | Tensors | None:
        """Sum over the samples of the micro-batch; the loop divides by the global count. Several by their names, the
        same at every call and on every rank, are logged one by one."""

    def task_weight(self, step: int) -> float:
        """What the loss of the task itself is multiplied by."""
        return 1.0

    def after_backward(self, step: int, micro: int) -> None: ...

    def before_step(self, step: int) -> None: ...

    def after_step(self, step: int) -> None: ...

    def change_steps(self) -> list[int]:
        """Sorted steps t at whose end (`after_step(t)`) what the method decides changes; -1: before step 0."""
        return []

    def detach(self) -> None:
        """Leave the compressed weights in the model and take every hook off."""

    def rebase(self, transform: Callable[[Tensors], Tensors]) -> None:
        """The model was shrunk in place since `detach`: `transform({parameter name: tensor})` slices tensors alike.
        Collective. From here on only what stays (zeros that could not be removed) is kept up."""

    def notes(self) -> list[str]:
        """Lines for the user once the method is attached, such as what of the config was overridden. Local."""
        return []

    def metrics(self) -> dict[str, float]:
        """Series to log, e.g. {"pruning/sparse_ratio": 0.4}. Local, cheap."""
        return {}

    def added(self) -> list[str]:
        """Names of the tensors that the method has put into the model and that its state holds: what is done to them is
        no part of a plan that others apply. Local."""
        return []

    def undecayed(self) -> list[str]:
        """Names of the parameters that the method has put into the model and that weight decay would harm. Local."""
        return []

    def results(self) -> dict[str, Any]:
        """For the report, after the last decision: JSON-like."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Collective. Tensors and plain values; identical on every rank and at any world size."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def load(noun: str, key: str, name: str, folder: str = "methods") -> ModuleType:
    """The module of a method: a file of `dist_compress/<noun>/<folder>`, or a dotted path of the user's.

    Local. Raises UserError naming `key` and the choices.
    """
    package = importlib.import_module(f"dist_compress.{noun}.{folder}")
    choices = sorted(m.name for m in pkgutil.iter_modules(package.__path__))
    if name in choices:
        return importlib.import_module(f"{package.__name__}.{name}")
    if "." not in name:
        raise UserError(f"{key}={name!r}: no such method. Available: {', '.join(choices)}, or a dotted path.")
    return import_file(name, key, f"Available: {', '.join(choices)}")


def import_file(path: str, key: str, available: str) -> ModuleType:
    """The user's module of that dotted path. Local. Raises UserError naming `key` and what is `available`."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name and (path == error.name or path.startswith(error.name + ".")):
            raise UserError(
                f"{key}={path!r}: cannot import {path!r} ({error}). {available}, "
                "or the dotted path of a module on PYTHONPATH."
            ) from None
        raise
