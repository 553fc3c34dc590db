"""Plain values into dataclasses, strictly: int becomes float or str where that is wanted, nothing else is converted."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from dist_compress.errors import UserError

T = TypeVar("T")


class UnknownKey(UserError):
    """A key that the dataclass at its place lacks."""

    def __init__(self, key: str, siblings: list[str]) -> None:
        super().__init__(f"{key}: no such key. Keys there: {', '.join(siblings) or 'none'}.")
        self.key, self.siblings = key, siblings


def merge(cls: type[T], values: Mapping[str, Any], key: str) -> T:
    """An instance of the dataclass `cls` from plain `values`, which lie under `key` of the user's config."""
    hints = get_type_hints(cls)
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for name in values:
        if name not in names:
            raise UnknownKey(join(key, str(name)), names)
    converted = {name: _convert(hints[name], value, join(key, name)) for name, value in values.items()}
    try:
        return cls(**converted)
    except TypeError as error:  # a field without default
        raise UserError(f"{key}: {str(error).partition('() ')[2]}. Keys: {', '.join(names)}.") from None


def join(key: str, name: str) -> str:
    """The full name of a key in the section `key`; "" is the top."""
    return f"{key}.{name}" if key else name


def _convert(hint: Any, value: Any, key: str) -> Any:
    """`value` as the type `hint`: dataclasses, X | Y, list[X], dict[str, X], Any and the plain types."""
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(hint, value, key)
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            keys = ", ".join(f.name for f in fields(hint))
            raise _wrong_type(key, value, f"a section with the keys {keys}")
        return merge(hint, value, key)
    if origin is list and isinstance(value, list):
        return [_convert(get_args(hint)[0], v, f"{key}[{i}]") for i, v in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return {str(k): _convert(get_args(hint)[1], v, join(key, str(k))) for k, v in value.items()}
    if isinstance(hint, type) and type(value) is hint:  # type(): a bool is no int here
        return value
    if hint in (float, str) and type(value) is int:  # `lr=1`, `group=7`: YAML's int is meant
        return hint(value)
    raise _wrong_type(key, value, type_name(hint))


def _convert_union(hint: Any, value: Any, key: str) -> Any:
    """The first member that takes the value; a value keeps its own type where that is a member."""
    members = get_args(hint)
    if value is None and type(None) in members:
        return None
    for member in sorted((m for m in members if m is not type(None)), key=lambda m: m is not type(value)):
        try:
            return _convert(member, value, key)
        except UserError:
            if get_origin(member) and type(value) is get_origin(member):
                raise  # names the place inside the list or mapping
    raise _wrong_type(key, value, type_name(hint))


def _wrong_type(key: str, value: Any, expected: str) -> UserError:
    return UserError(f"{key}={value!r}: expected {expected}, got {type(value).__name__}.")


def type_name(hint: Any) -> str:
    """A type in words: "float or str or null"."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(type_name(h) for h in get_args(hint))
    if hint is type(None):
        return "null"
    return hint.__name__ if get_origin(hint) is None else str(hint)
