"""Activation checkpointing (`train.activation_checkpointing`): forwards that run again in the backward pass, instead of
being kept for it (Chen et al. 2016, "Training deep nets with sublinear memory cost").

torch.utils.checkpoint does it, around the `forward` of a module: names of modules and parameters stay, and hooks on the
module itself run once. Hooks on what is inside of it run again. Whoever counts what goes by asks `recomputing()` first,
so that nothing counts twice; what changes what goes by (masks, quantizers) acts both times, with the same values.

Everything here is local.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dist_compress.errors import UserError
from dist_compress.forwards import Forward

KEY = "train.activation_checkpointing"
_again: ContextVar[bool] = ContextVar("again", default=False)  # of this thread: backward passes have their own


def recomputing() -> bool:
    """Whether the forward that runs here has run before, and was heard."""
    return _again.get()


class Recompute:
    """The modules of a model whose forward runs again."""

    def __init__(self, classes: Sequence[str]) -> None:
        """`classes`: names of them, as of `backend.wrap`; [] changes nothing."""
        self.classes = list(classes)
        self.put: list[_Again] = []

    def put_on(self, model: nn.Module) -> None:
        """From now on they do. Raises UserError, the same on every rank, for a class that the model does not have."""
        types = {type(module).__name__ for module in model.modules()}
        if unknown := [name for name in self.classes if name not in types]:
            raise UserError(f"{KEY}: no module of the model is a {unknown[0]!r}. There are {', '.join(sorted(types))}.")
        self.put = [_Again(module) for module in model.modules() if type(module).__name__ in self.classes]

    def take_off(self) -> None:
        """Forwards are what they were before `put_on`."""
        for forward in self.put:
            forward.remove()
        self.put = []


class _Again(Forward):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.run_inner(*args, **kwargs)
        if torch.compiler.is_compiling():  # what runs again is decided in the graph: nothing is heard there
            return checkpoint(self.run_inner, *args, use_reentrant=False, **kwargs)
        return checkpoint(self.run_inner, *args, use_reentrant=False, context_fn=_contexts, **kwargs)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What a forward runs in, and what it runs in when it runs again."""
    return nullcontext(), _running_again(random.getstate())


@contextmanager
def _running_again(state: Any) -> Iterator[None]:
    """`state`: of Python's own random numbers; torch's are put back by the checkpoint."""
    token, later = _again.set(True), random.getstate()
    random.setstate(state)
    try:
        yield
    finally:
        random.setstate(later)
        _again.reset(token)
