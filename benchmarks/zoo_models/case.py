"""What a suite says about a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

Inputs = Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]  # batch size -> (args, kwargs), random


@dataclass(frozen=True)
class Case:
    """`build` makes the model with random weights; `inputs(batch)` makes new inputs with each call."""

    name: str
    family: str  # variants of one architecture share it
    build: Callable[[], nn.Module]
    inputs: Inputs
