"""Outputs as nests that torch's pytree can walk."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from torch.utils._pytree import tree_map


def opened(tree: Any) -> Any:
    """`tree` with dataclasses that pytree does not know as dicts of their fields."""
    return tree_map(_open, tree)


def is_closed(value: Any) -> bool:
    """Whether a leaf of pytree is a dataclass."""
    return is_dataclass(value) and not isinstance(value, type)


def _open(leaf: Any) -> Any:
    if not is_closed(leaf):
        return leaf
    return {field.name: opened(getattr(leaf, field.name)) for field in fields(leaf)}
