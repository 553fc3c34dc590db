"""How gradients are computed and summed over the ranks. Each backend is one file here, found by its name."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace

from dist_compress.backends.backend import Backend
from dist_compress.config import Config, merge
from dist_compress.errors import UserError

_ROOMS = (  # files that are no backends
    "answering", "backend", "ordered", "unsharding", "zero_config", "zero_layout", "zero_library", "zero_partitions",
)  # fmt: skip


def build(config: Config) -> tuple[Config, Backend]:
    """The backend of the run, and the config with `train.exact` decided: null means where the backend can. Raises
    UserError. Local, the same on every rank."""
    kind, options = find(config.backend.name)
    chosen = merge(options, config.backend.options, "backend")
    if config.train.exact is None:
        config = replace(config, train=replace(config.train, exact=kind.can_be_exact(chosen)))
    return config, kind(config, chosen)


def find(name: str) -> tuple[type[Backend], type]:
    """The class of backend `name`, the Backend defined in the file of that name, and its Options. Local."""
    choices = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _ROOMS)
    if name not in choices:
        raise UserError(f"backend.name={name!r}: no such backend. Available: {', '.join(choices)}.")
    module = importlib.import_module(f"{__name__}.{name}")
    own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    return next(v for v in own if issubclass(v, Backend)), module.Options
