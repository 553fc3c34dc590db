"""How gradients are computed and summed over the ranks. Each backend is one file here, found by its name."""

from __future__ import annotations

import importlib
import pkgutil

from dist_compress.backends.backend import Backend
from dist_compress.errors import UserError


def load(name: str) -> type[Backend]:
    """The class of backend `name`: the Backend defined in the file of that name. Local."""
    choices = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "backend")
    if name not in choices:
        raise UserError(f"backend.name={name!r}: no such backend. Available: {', '.join(choices)}.")
    module = importlib.import_module(f"{__name__}.{name}")
    own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    return next(v for v in own if issubclass(v, Backend))
