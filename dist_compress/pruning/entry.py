"""One entry of the config list, checked for itself: keys, types and ranges, each error with the path of its key."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields
from typing import Any

from dist_compress import blocks
from dist_compress.errors import UserError
from dist_compress.pruning.setting import VALUES, Align
from dist_compress.selection import EXCLUDES, SELECTORS

TARGETS = ("target_names", "target_settings")
# Null in an entry takes these keys back; for the ids and for `method` it is a value, or none at all.
TAKES_BACK = (
    "sparse_ratio", "sparse_threshold", "min_sparse_ratio", "max_sparse_ratio", "granularity", "internal_metric_block",
    "align",
)  # fmt: skip


@dataclass
class Entry:
    """Values of an entry, normalised, by the place they were written at."""

    where: str
    values: dict[str, Any]
    target_names: list[str]
    target_settings: dict[str, dict[str, Any]]

    def asked_of(self, target: str) -> list[tuple[dict[str, Any], str]]:
        """[(values, where they stand)] for one target, the later one wins."""
        asked = [(self.values, self.where)]
        if target in self.target_settings:
            asked.append((self.target_settings[target], f"{self.where}.target_settings.{target}"))
        return asked


def check(entry: Any, where: str) -> Entry:
    """An entry of the config list. Raises UserError."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}={entry!r} is no mapping of keys such as op_types.")
    _check_known(entry, (*SELECTORS, *EXCLUDES, *TARGETS, *VALUES), where)
    if not any(entry.get(key) for key in SELECTORS):
        raise UserError(f"{where} selects nothing: give op_types, op_names or op_names_re.")
    for key in (*SELECTORS, *EXCLUDES, "target_names"):
        value = entry.get(key, [])
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            example = "weight" if key == "target_names" else "Conv2d"
            raise UserError(f"{where}.{key}={value!r} must be a list of strings, e.g. [{example}].")
    names = entry.get("target_names", [])
    for name in names:
        _check_parameter(name, f"{where}.target_names={name!r}")
    if "target_names" in entry and not names:
        raise UserError(f"{where}.target_names=[] names no target. Leave it out, or name some, e.g. [weight].")
    own = {key: value for key, value in entry.items() if key in VALUES}
    settings = by_target(entry.get("target_settings", {}), f"{where}.target_settings")
    for name in settings:
        if names and name not in names:
            raise UserError(f"{where}.target_settings.{name}: {where}.target_names={names} leaves {name} out.")
    return Entry(where, _values(own, where), names, settings)


def by_target(value: Any, where: str) -> dict[str, dict[str, Any]]:
    """{target: {key: value}}, checked. Raises UserError."""
    if not isinstance(value, dict):
        raise UserError(f"{where}={value!r} must map parameters to keys, e.g. {{bias: {{sparse_ratio: 0.1}}}}.")
    found = {}
    for name, values in value.items():
        place = f"{where}.{name}"
        _check_parameter(str(name), place)
        if not isinstance(values, dict):
            raise UserError(f"{place}={values!r} must be a mapping of keys such as sparse_ratio.")
        _check_known(values, VALUES, place)
        found[str(name)] = _values(values, place)
    return found


def ratio(value: Any, key: str, below_one: bool) -> float:
    """A fraction, or UserError."""
    if not _is_number(value) or not 0 <= value <= 1 or (below_one and value == 1):
        raise UserError(f"{key}={value!r} must be a number in [0, 1{')' if below_one else ']'}.")
    return float(value)


def _values(given: dict[str, Any], where: str) -> dict[str, Any]:
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
        elif key == "options" and not isinstance(value, dict):
            raise UserError(f"{path}={value!r} must be a mapping of the method's options.")
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


def _check_known(given: dict[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {close[0]}?" if close else f" Keys: {', '.join(known)}."
            raise UserError(f"{where}.{key}: no such key.{hint}")


def _check_parameter(name: str, what: str) -> None:
    if name.startswith(("_input_", "_output_")):
        raise UserError(f"{what}: activations cannot be pruned, only parameters, such as weight and bias.")


def _check_apply(value: Any, path: str) -> None:
    if value == "mul":
        return
    reasons = {
        "add": "adds to the inputs of a softmax; a weight that is removed is zero",
        "bypass": "would decide masks and leave them out; exclude the module instead",
    }
    reason = reasons.get(value, "is none of ours") if isinstance(value, str) else "is none of ours"
    raise UserError(f"{path}={value!r} {reason}. Masks of parameters allow mul only.")


def _align(value: Any, key: str) -> Align:
    wanted = [f.name for f in fields(Align)]
    if not isinstance(value, dict) or sorted(map(str, value)) != sorted(wanted):
        raise UserError(f"{key}={value!r} must have exactly the keys {', '.join(wanted)}.")
    module, target, dims = value["module_name"], value["target_name"], value["dims"]
    if not isinstance(module, str | None):
        raise UserError(f"{key}.module_name={module!r} must be the name of a module, or null for the target's own.")
    if not isinstance(target, str):
        raise UserError(f"{key}.target_name={target!r} must be the name of a parameter, e.g. weight.")
    _check_parameter(target, f"{key}.target_name={target!r}")
    good = isinstance(dims, list) and dims and all(isinstance(d, int) and not isinstance(d, bool) for d in dims)
    if not good:
        raise UserError(f"{key}.dims={dims!r} must be a list of dimensions, e.g. [0].")
    return Align(module, target, list(dims))
