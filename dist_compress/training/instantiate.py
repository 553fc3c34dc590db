"""A user's own object by the dotted path in `_target_`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from dist_compress.errors import UserError, raised_by


def instantiate(target: dict[str, Any], key: str) -> Any:
    """Call the dotted path `_target_` with the other entries as keyword arguments. Local."""
    path, kwargs = target["_target_"], {k: v for k, v in target.items() if k != "_target_"}
    module, _, name = path.rpartition(".")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{key}._target_={path!r}: cannot be imported ({error}). Give the dotted path of a callable on PYTHONPATH."
        ) from None
    try:
        return function(**kwargs)
    except UserError:
        raise
    except Exception as error:
        raise raised_by(f"{key}._target_={path!r} with {kwargs}", error) from error
