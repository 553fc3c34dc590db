"""Entries checked, each for itself: keys and types, each error with the path of its key."""

from __future__ import annotations

import difflib
from typing import Any

from dist_compress.config_list.entry import Entry, is_activation
from dist_compress.config_list.noun import Noun
from dist_compress.errors import UserError
from dist_compress.selection import EXCLUDES, SELECTORS

TARGETS = ("target_names", "target_settings")


def check(noun: Noun[Any], entry: Any, where: str) -> Entry:
    """An entry of the config list. Raises UserError."""
    keys = noun.setting.keys()
    if not isinstance(entry, dict):
        raise UserError(f"{where}={entry!r} is no mapping of keys such as op_types.")
    _check_known(entry, (*SELECTORS, *EXCLUDES, *TARGETS, *keys), where)
    if not any(entry.get(key) for key in SELECTORS):
        raise UserError(f"{where} selects nothing: give op_types, op_names or op_names_re.")
    for key in (*SELECTORS, *EXCLUDES, "target_names"):
        value = entry.get(key, [])
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            example = "weight" if key == "target_names" else "Conv2d"
            raise UserError(f"{where}.{key}={value!r} must be a list of strings, e.g. [{example}].")
    names = entry.get("target_names", [])
    for name in names:
        noun.check_target(name, f"{where}.target_names={name!r}")
    if "target_names" in entry and not names:
        raise UserError(f"{where}.target_names=[] names no target. Leave it out, or name some, e.g. [weight].")
    own = {key: value for key, value in entry.items() if key in keys}
    settings = by_target(noun, entry.get("target_settings", {}), f"{where}.target_settings")
    for name in settings:
        if names and name not in names and not is_activation(name):  # the names of a site are compared by `merge`
            raise UserError(f"{where}.target_settings.{name}: {where}.target_names={names} leaves {name} out.")
    return Entry(where, entry, noun.values(own, where), names, settings)


def by_target(noun: Noun[Any], value: Any, where: str) -> dict[str, dict[str, Any]]:
    """{target: {key: value}}, checked. Raises UserError."""
    keys = noun.setting.keys()
    if not isinstance(value, dict):
        raise UserError(f"{where}={value!r} must map targets to keys, e.g. {{bias: {{{keys[0]}: ...}}}}.")
    found = {}
    for name, values in value.items():
        place = f"{where}.{name}"
        noun.check_target(str(name), place)
        if not isinstance(values, dict):
            raise UserError(f"{place}={values!r} must be a mapping of keys such as {keys[0]}.")
        _check_known(values, keys, place)
        found[str(name)] = noun.values(dict(values), place)
    return found


def _check_known(given: dict[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {close[0]}?" if close else f" Keys: {', '.join(known)}."
            raise UserError(f"{where}.{key}: no such key.{hint}")
