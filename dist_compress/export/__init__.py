"""What a run hands out: one file of this folder per format, found by its name.

A format is a module with
    export(run_dir, model, plan, config, example)   writes the files
    check(run_dir, model, example) -> {name: value}   loads them and compares outputs with those of `model`
and, if it likes,
    ready(model, targets, example)   raises UserError for a library that is missing, and for what it cannot hold
all for rank 0 only. `example` is (args, kwargs) of a call, with two held-out samples; the check of a format that has
a number `NUM_CHECKED` is given so many. `ready` is asked before anything is trained: of the dense float model, and of
`targets`, {(module, target): Spec} of what is going to be quantized.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from torch import nn

from dist_compress.errors import UserError
from dist_compress.quantization.fake_quant import Spec


def names() -> list[str]:
    """The formats there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)


def find(name: str) -> ModuleType:
    """The module of a format. Local. Raises UserError listing the formats."""
    if name not in names():
        raise UserError(f"export=[{name}]: no such format. Available: {', '.join(names())}.")
    return importlib.import_module(f"{__name__}.{name}")


def check_ready(
    formats: Sequence[str], model: nn.Module, targets: Mapping[tuple[str, str], Spec], example: Any
) -> None:
    """Ask all formats. Rank 0 only. Raises UserError."""
    for name in formats:
        ready = getattr(find(name), "ready", None)
        if ready is not None:
            ready(model, targets, example)
