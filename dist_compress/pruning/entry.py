"""What an entry of the config list asks of a target: types and ranges, each error with the path of its key."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from dist_compress import blocks
from dist_compress.errors import UserError
from dist_compress.pruning.setting import Align

# Null in an entry takes these keys back; for the ids and for `method` it is a value, or none at all.
TAKES_BACK = (
    "sparse_ratio", "sparse_threshold", "min_sparse_ratio", "max_sparse_ratio", "granularity", "internal_metric_block",
    "align",
)  # fmt: skip


def ratio(value: Any, key: str, below_one: bool) -> float:
    """A fraction, or UserError."""
    if not _is_number(value) or not 0 <= value <= 1 or (below_one and value == 1):
        raise UserError(f"{key}={value!r} must be a number in [0, 1{')' if below_one else ']'}.")
    return float(value)


def values_of(given: dict[str, Any], where: str) -> dict[str, Any]:
    """Values of one target, checked and normalised. None takes a key of TAKES_BACK back."""
    values = dict(given)
    for key, value in given.items():
        path = f"{where}.{key}"
        if key in TAKES_BACK and value is None:
            continue
        if key in ("sparse_ratio", "min_sparse_ratio", "max_sparse_ratio"):
            values[key] = ratio(value, path, below_one=key != "max_sparse_ratio")
        elif key == "sparse_threshold":
            if not _is_number(value) or not math.isfinite(value):
                raise UserError(f"{path}={value!r} must be a number; scores below it go.")
            values[key] = float(value)
        elif key == "granularity":
            values[key] = blocks.parse(value, path)
        elif key in ("global_group_id", "dependency_group_id"):
            if isinstance(value, bool) or not isinstance(value, int | str | None):
                raise UserError(f"{path}={value!r} must be a string, a number or null.")
            values[key] = None if value in (None, "none") else str(value)
        elif key == "internal_metric_block":
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{path}={value!r} must be a number of equal parts, at least 1.")
        elif key == "align":
            values[key] = _align(value, path)
        elif key in ("options", "apply_options") and not isinstance(value, dict):
            whose = "method" if key == "options" else "apply_method"
            raise UserError(f"{path}={value!r} must be a mapping of the options of the {whose}.")
        elif key == "method" and not isinstance(value, str):
            raise UserError(f"{path}={value!r} must be the name of a method.")
        elif key == "apply_method":
            _check_apply(value, path)
    if values.get("sparse_ratio") is not None and values.get("sparse_threshold") is not None:
        raise UserError(
            f"{where}.sparse_ratio={values['sparse_ratio']} and {where}.sparse_threshold={values['sparse_threshold']} "
            "exclude each other. Keep one; min_sparse_ratio and max_sparse_ratio bound what a threshold removes."
        )
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_apply(value: Any, path: str) -> None:
    if value == "bypass":
        raise UserError(f"{path}='bypass' would decide masks and leave them out; exclude the module instead.")
    if not isinstance(value, str):
        raise UserError(f"{path}={value!r} must be mul, add, or the dotted path of a file of yours.")


def _align(value: Any, key: str) -> Align:
    wanted = [f.name for f in fields(Align)]
    if not isinstance(value, dict) or sorted(map(str, value)) != sorted(wanted):
        raise UserError(f"{key}={value!r} must have exactly the keys {', '.join(wanted)}.")
    module, target, dims = value["module_name"], value["target_name"], value["dims"]
    if not isinstance(module, str | None):
        raise UserError(f"{key}.module_name={module!r} must be the name of a module, or null for the target's own.")
    if not isinstance(target, str):
        raise UserError(f"{key}.target_name={target!r} must be the name of a target, e.g. weight.")
    good = isinstance(dims, list) and dims and all(isinstance(d, int) and not isinstance(d, bool) for d in dims)
    if not good:
        raise UserError(f"{key}.dims={dims!r} must be a list of dimensions, e.g. [0].")
    return Align(module, target, list(dims))
