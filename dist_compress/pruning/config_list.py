"""`pruning.config_list`: which modules are targets, and what each of them is asked for.

Keys and their meaning follow the NNI 3.0 config list. An entry selects modules by

    (op_names | modules matching op_names_re) & op_types, or op_types alone; minus what the exclude_ keys name

where a type is the exact class name, and a pattern must match from the start of the module name (`re.match`).
Later entries win key by key for the same module. What matches nothing is an error.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from dist_compress.config import PruningConfig
from dist_compress.errors import UserError

SELECTORS = ("op_types", "op_names", "op_names_re")
EXCLUDES = tuple(f"exclude_{key}" for key in SELECTORS)
GRANULARITIES = ("out_channel", "in_channel", "element")
_ROOT = "pruning.config_list"


@dataclass
class Align:
    """The mask follows that of another parameter: alive where anything of `dims[0]`'s slice there is
    alive."""

    module_name: str
    target_name: str
    dims: list[int]


@dataclass
class Setting:
    """What is asked of one module."""

    module: str  # fqn
    sparse_ratio: float = 0.0
    min_sparse_ratio: float = 0.0
    max_sparse_ratio: float = 1.0
    granularity: str = "out_channel"
    global_group_id: str | None = None
    dependency_group_id: str | None = "auto"
    align: Align | None = None
    method: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, int] = field(default_factory=dict)  # key -> entry that set it; "" -> the last that matched

    def said_by(self, key: str) -> str:
        """Where the value of `key` comes from, for messages."""
        if key in self.entries:
            return f"{_ROOT}[{self.entries[key]}].{key}={getattr(self, key)!r}"
        if key in ("sparse_ratio", "method", "options"):
            return f"pruning.{key}={getattr(self, key)!r}"
        return f"{key}={getattr(self, key)!r} by default"


_VALUES = tuple(f.name for f in fields(Setting) if f.name not in ("module", "entries"))


def resolve(config: PruningConfig, model: nn.Module) -> list[Setting]:
    """The targets and aligned modules in model order. Local, the same on every rank. Raises UserError."""
    modules = {name: module for name, module in model.named_modules() if name}
    first = {id(module): name for name, module in modules.items()}
    names = {name: first[id(m)] for name, m in model.named_modules(remove_duplicate=False) if name}
    if not config.config_list:
        raise UserError(f"{_ROOT} is empty: add an entry such as {{op_types: [Conv2d]}}, or set pruning.method=null.")
    merged: dict[str, Setting] = {}
    for number, entry in enumerate(config.config_list):
        values = _check_entry(entry, number)
        for name in _select(entry, number, modules, names):
            setting = merged.setdefault(name, Setting(name))
            _override(setting, values, number)
    settings = [merged[name] for name in modules if name in merged]
    for setting in settings:
        _complete(setting, config)
    _check_global_groups(settings)
    return settings


def _override(setting: Setting, values: dict[str, Any], number: int) -> None:
    for key in ("global_group_id", "dependency_group_id"):
        old = getattr(setting, key)
        if {old, values.get(key)} & {None, "auto"} or old == values[key]:
            continue
        if key in setting.entries:
            raise UserError(
                f"{setting.module} is put in two groups: {setting.said_by(key)} and "
                f"{_ROOT}[{number}].{key}={values[key]!r}. Exclude it from one entry, or set {key}: null there."
            )
    if "method" in values and "options" not in values:
        values = {**values, "options": {}}
    for key, value in values.items():
        setattr(setting, key, value)
        setting.entries[key] = number
    setting.entries[""] = number


def _complete(setting: Setting, config: PruningConfig) -> None:
    """Inherit what no entry set, and check what only the whole tells."""
    where = f"{_ROOT}[{setting.entries['']}]"
    if setting.align:
        asked = [key for key in ("sparse_ratio", "global_group_id") if key in setting.entries]
        if asked:
            said = " and ".join(setting.said_by(key) for key in asked)
            raise UserError(f"{setting.module}: {said} contradict {setting.said_by('align')}: it follows that mask.")
        return
    if "sparse_ratio" not in setting.entries:
        if config.sparse_ratio is None:
            raise UserError(
                f"{where} sets no sparse_ratio for {setting.module}, nor does pruning.sparse_ratio. Set one."
            )
        setting.sparse_ratio = _ratio(config.sparse_ratio, "pruning.sparse_ratio", below_one=True)
    if "method" not in setting.entries:
        if config.method is None:
            raise UserError(f"{where} sets no method for {setting.module}, nor does pruning.method. Set one.")
        setting.method = config.method
        setting.options = {**config.options, **setting.options}
    low, high = setting.min_sparse_ratio, setting.max_sparse_ratio
    if low > high:
        raise UserError(
            f"{setting.module}: {setting.said_by('min_sparse_ratio')} is above {setting.said_by('max_sparse_ratio')}."
        )
    if setting.global_group_id is None and not low <= setting.sparse_ratio <= high:
        raise UserError(
            f"{setting.module}: {setting.said_by('sparse_ratio')} lies outside of min_sparse_ratio={low} and "
            f"max_sparse_ratio={high}. Without a global_group_id the ratio is spent in the module itself."
        )
    if setting.granularity == "element":
        if setting.dependency_group_id not in (None, "auto"):
            raise UserError(
                f"{setting.module}: {setting.said_by('granularity')} and "
                f"{setting.said_by('dependency_group_id')} "
                "exclude each other: only channels depend on each other."
            )
        setting.dependency_group_id = None


def _check_global_groups(settings: list[Setting]) -> None:
    """Members of a global group agree on everything but their bounds."""
    first: dict[str, Setting] = {}
    for setting in settings:
        if setting.align or setting.global_group_id is None:
            continue
        head = first.setdefault(setting.global_group_id, setting)
        check_agree(head, setting, ("sparse_ratio", "granularity", "method", "options"), "global_group_id")


def check_agree(a: Setting, b: Setting, keys: Iterable[str], group: str) -> None:
    """Raise UserError naming both modules, entries and values unless the members of one group agree on
    `keys`."""
    for key in keys:
        if getattr(a, key) != getattr(b, key):
            kind = f"{group}={getattr(a, group)!r}" if getattr(a, group) is not None else group
            raise UserError(
                f"{a.module} and {b.module} are in one group ({kind}) but {a.said_by(key)} for the one and "
                f"{b.said_by(key)} for the other. Give both the same {key}, or take one out of the group."
            )


def _check_entry(entry: dict[str, Any], number: int) -> dict[str, Any]:
    """The entry's values, checked and normalised, without its selectors."""
    where = f"{_ROOT}[{number}]"
    if not isinstance(entry, dict):
        raise UserError(f"{where}={entry!r} is no mapping of keys such as op_types.")
    known = (*SELECTORS, *EXCLUDES, *_VALUES)
    for key in entry:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {close[0]}?" if close else f" Keys: {', '.join(known)}."
            raise UserError(f"{where}.{key}: no such key.{hint}")
    if not any(entry.get(key) for key in SELECTORS):
        raise UserError(f"{where} selects nothing: give op_types, op_names or op_names_re.")
    for key in (*SELECTORS, *EXCLUDES):
        value = entry.get(key, [])
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise UserError(f"{where}.{key}={value!r} must be a list of strings, e.g. [Conv2d].")
    values = {key: entry[key] for key in _VALUES if key in entry}
    for key in ("sparse_ratio", "min_sparse_ratio", "max_sparse_ratio"):
        if key in values:
            values[key] = _ratio(values[key], f"{where}.{key}", below_one=key != "max_sparse_ratio")
    if values.get("granularity", "element") not in GRANULARITIES:
        raise UserError(f"{where}.granularity={values['granularity']!r}: allowed are {', '.join(GRANULARITIES)}.")
    for key in ("global_group_id", "dependency_group_id"):
        if key in values:
            values[key] = None if values[key] in (None, "none") else str(values[key])
    if values.get("align") is not None:
        values["align"] = _align(values["align"], f"{where}.align")
    if not isinstance(values.get("options", {}), dict):
        raise UserError(f"{where}.options={values['options']!r} must be a mapping of the method's options.")
    if not isinstance(values.get("method", ""), str):
        raise UserError(f"{where}.method={values['method']!r} must be the name of a method.")
    return values


def _ratio(value: Any, key: str, below_one: bool) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1 or (below_one and value == 1):
        raise UserError(f"{key}={value!r} must be a number in [0, 1{')' if below_one else ']'}.")
    return float(value)


def _align(value: Any, key: str) -> Align:
    wanted = [f.name for f in fields(Align)]
    if not isinstance(value, dict) or sorted(value) != sorted(wanted):
        raise UserError(f"{key}={value!r} must have exactly the keys {', '.join(wanted)}.")
    dims = value["dims"]
    if not isinstance(dims, list) or len(dims) != 1 or not isinstance(dims[0], int):
        raise UserError(f"{key}.dims={dims!r} must be a list of one dimension, e.g. [0].")
    return Align(str(value["module_name"]), str(value["target_name"]), dims)


def _select(entry: dict[str, Any], number: int, modules: dict[str, nn.Module], names: dict[str, str]) -> list[str]:
    """The modules an entry is about: they have a weight of two or more dimensions, or any weight to be
    aligned."""
    where = f"{_ROOT}[{number}]"
    found = {key: _match(entry.get(key, []), key, where, modules, names) for key in (*SELECTORS, *EXCLUDES)}
    chosen = found["op_names"] | found["op_names_re"]
    if not (entry.get("op_names") or entry.get("op_names_re")):
        chosen = found["op_types"]
    elif entry.get("op_types"):
        chosen &= found["op_types"]
    chosen -= found["exclude_op_types"] | found["exclude_op_names"] | found["exclude_op_names_re"]
    least = 1 if entry.get("align") else 2
    fit = {name for name in chosen if _weight_dims(modules[name]) >= least}
    unfit = sorted(chosen - fit)
    if unfit and (entry.get("op_types") or not entry.get("op_names_re") or not fit):
        kind = type(modules[unfit[0]]).__name__
        raise UserError(
            f"{where} selects {unfit[0]} ({kind}), which has no weight of {least} or more dimensions to prune. "
            f"Prunable types in this model: {', '.join(_prunable_types(modules, least))}."
        )
    if not fit:
        raise UserError(f"{where}: nothing is left of what it selects. Check op_types and the exclude_ keys.")
    return [name for name in modules if name in fit]


def _match(wanted: list[str], key: str, where: str, modules: dict[str, nn.Module], names: dict[str, str]) -> set[str]:
    """Modules named by one selector. Each of its values must name at least one."""
    found: set[str] = set()
    for value in wanted:
        if key.endswith("op_types"):
            hits = {name for name, module in modules.items() if type(module).__name__ == value}
        elif key.endswith("op_names"):
            hits = {names[value]} if value in names else set()
        else:
            try:
                hits = {first for name, first in names.items() if re.match(value, name)}
            except re.error as error:
                raise UserError(f"{where}.{key}={value!r} is no regular expression: {error}.") from None
        if not hits:
            raise UserError(f"{where}.{key}={value!r} matches no module; {_inventory(value, key, modules, names)}")
        found |= hits
    return found


def _inventory(value: str, key: str, modules: dict[str, nn.Module], names: dict[str, str]) -> str:
    if key.endswith("op_types"):
        return f"types in this model: {', '.join(_prunable_types(modules, 1))}."
    close = difflib.get_close_matches(value, names, n=3, cutoff=0.5)
    weighted = [name for name in names if _weight_dims(modules[names[name]]) >= 2]
    listed = ", ".join(weighted[:30]) + (f", ... ({len(weighted)} in all)" if len(weighted) > 30 else "")
    return (f"did you mean {' or '.join(close)}? " if close else "") + f"names in this model: {listed}."


def _weight_dims(module: nn.Module) -> int:
    weight = module._parameters.get("weight")
    return 0 if weight is None else weight.dim()


def _prunable_types(modules: dict[str, nn.Module], least: int) -> list[str]:
    return sorted({type(m).__name__ for m in modules.values() if _weight_dims(m) >= least})
