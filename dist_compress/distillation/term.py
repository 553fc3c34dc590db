"""What a distillation method has to say: a loss of one micro-batch. Nothing about when, how strong, or on which rank.

A method file holds a dataclass `Options` and one subclass of `Term` (of `LogitTerm` or `LayerTerm`, most likely); the
distiller does the rest: teacher, schedules, weights, logging.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch

from dist_compress import method
from dist_compress.config import merge
from dist_compress.distillation.teacher import Teacher
from dist_compress.errors import UserError
from dist_compress.method import Context


@dataclass(frozen=True)
class Moment:
    """Where the run stands."""

    step: int
    temperature: float


class Term:
    """One loss, logged under `name`."""

    def __init__(self, name: str, options: Any) -> None:
        self.name, self.options = name, options

    def attach(self, context: Context, teacher: Teacher, temperatures: list[float]) -> None:
        """Check that the loss can be had, at any of the temperatures of the run. Local, the same on every rank. Raises
        UserError."""

    def loss(self, moment: Moment, batch: dict[str, Any], output: Any, answer: Any) -> torch.Tensor:
        """Sum over the samples (or valid tokens) of the micro-batch, a scalar. `output`: the student's, `answer`: the
        teacher's. Local."""
        raise NotImplementedError


def term_class(name: str, key: str) -> type[Term]:
    """The term that the file of method `name`, named under `key`, defines. Local. Raises UserError."""
    module = method.load("distillation", f"{key}.method", name)
    found = [
        kind
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, Term) and kind.__module__ == module.__name__
    ]
    if len(found) != 1 or not hasattr(module, "Options"):
        names = ", ".join(kind.__name__ for kind in found) or "none"
        raise UserError(
            f"{key}.method={name!r}: {module.__name__} must define a dataclass `Options` and one subclass of Term, but "
            f"has {names}."
        )
    return found[0]


def options_of(kind: type[Term], options: dict[str, Any], key: str) -> Any:
    """The `Options` of a term's file from what stands under `key`. Raises UserError."""
    return merge(sys.modules[kind.__module__].Options, options, f"{key}.options")
