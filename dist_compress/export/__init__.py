"""What a run hands out: one file of this folder per format, found by its name.

A format is a module with
    export(run_dir, model, plan, config, example)   writes the files
    check(run_dir, model, example) -> {name: value}   loads them and compares outputs with those of `model`
both for rank 0 only. `example` is (args, kwargs) of a call, with two held-out samples; the check of a format that has
a number `NUM_CHECKED` is given so many.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from dist_compress.errors import UserError


def names() -> list[str]:
    """The formats there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> ModuleType:
    """The module of a format. Local. Raises UserError listing the formats."""
    if name not in names():
        raise UserError(f"export=[{name}]: no such format. Available: {', '.join(names())}.")
    return importlib.import_module(f"{__name__}.{name}")
