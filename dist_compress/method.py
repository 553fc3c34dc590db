"""The base of every technique: what the loop calls, and when. The loop names no technique.

One optimizer step, on every rank:

    for each round (micro-batch j = round * world_size + rank):
        forward, task loss + sum of method.loss, backward
        method.after_backward(step, micro)        only for live micro-batches; local, no collective
    gradients are reduced
    method.before_step(step)                      gradient rules, before clipping; collective: called on every rank; in
                                                  reverse, as gradients pass the method that acts last first
    clip, latent weights back, optimizer step
    method.after_step(step)                       decisions; collective: called on every rank
    project the weights

and once in a run, at boundaries between two steps:

    method.start()                                at `start_step`: look at data, then act
    method.detach(), in reverse                   no decision follows: leave the model as it is to be planned
    the model is shrunk in place
    method.rebase(transform), method.reattach()   go on with the smaller model
    method.finish(args, kwargs)                   training is over
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

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
    # Collective: show a listener the model as it is now on so many global batches of training data.
    calibrate: Callable[[Listener, int], None] | None = None
    rest: Callable[[], None] = lambda: None  # after a call of the model by a method: `Backend.rest`


class Listener(Protocol):
    """What looks at forward passes in evaluation mode, without gradients."""

    calibrating: bool  # while it is shown any

    def count_pass(self) -> None:
        """A forward pass of this rank has ended. Local."""

    def end_step(self) -> None:
        """A global batch has ended on this rank. Collective."""


class Method:
    """A technique. Every hook is optional; `state_dict` must be identical on every rank (gather before)."""

    compresses = True  # False: the model keeps its shape, and no decision is waited for
    adjective = ""  # of the model that `start` has changed, which names its metrics: quantized

    def foresee(self, model: nn.Module, example: Any) -> dict[tuple[str, str], Any]:
        """{(module, target): how it is going to be delivered}, of the model before anything is attached, which stays as
        it is. Local, the same on every rank. Raises UserError."""
        return {}

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

    def start_step(self, shrink: int | None) -> int | None:
        """The step boundary at which `start` is due; None: never, or it was called. `shrink`: that of the shrink, None
        where nothing is decided. Raises UserError."""

    def start(self) -> list[str]:
        """Act from here on. The decisions of the boundary are taken, and the weights are projected. Returns lines for
        the user. Collective."""
        return []

    def detach(self) -> None:
        """No decision follows, and the model is about to be shrunk: leave in it what a plan is made of, masked weights
        for good, and take off what stands in the way. Collective."""

    def substitutes(self) -> bool:
        """Whether the model computes with other numbers than its own while this is attached. Then what `detach` leaves
        in it is no ground to fold a constant on. Local, the same on every rank."""
        return False

    def rebase(self, transform: Callable[[Tensors], Tensors]) -> None:
        """The model was shrunk in place since `detach`: `transform({parameter name: tensor})` slices tensors alike.
        Collective. Of what is masked, only what stays (zeros that could not be removed) is kept up."""

    def follow(self, tensors: Tensors) -> Tensors:
        """Slice, as `rebase` did the method's own parameters, what is shaped like them. Local."""
        return tensors

    def reattach(self) -> list[str]:
        """The shrunk model was compared with the masked one: act on as before `detach`. Returns lines for the user.
        Collective."""
        return []

    def conclude(self) -> None:
        """No optimizer step follows, and a sharded model is about to be brought whole to rank 0: leave in the latents
        what there is of the method in parts only. Local."""

    def finish(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Training is over: leave in the model what is delivered, and return what the report and the summary tell of
        it. `args`, `kwargs`: a call on samples held out. Collective. Raises RuntimeError."""
        return {}

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

    def unsharded(self) -> list[str]:
        """Names of the parameters that the method has put into the model and that every rank holds whole, whatever the
        backend does with the others. It sums their gradients like those of the others, if they have any. Local."""
        return []

    def results(self) -> dict[str, Any]:
        """For the report, after the last decision and before `detach`: JSON-like."""
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
