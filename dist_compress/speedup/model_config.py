"""Which integers of `model.config` say the shapes of a shrunk model, found by building the class with other values.

For models that are built as `type(model)(config)`, as those of Hugging Face are. A field is written only if what
follows it in a model built from the changed config is as in the shrunk one. Where all is, it loads what was saved.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import combinations
from typing import Any

import torch
from torch import nn

from dist_compress.speedup.plan import Plan

_MOST_FIELDS = 6  # that may change together; all subsets of them are tried
Shapes = dict[str, tuple[int, ...]]


def config_changes(model: nn.Module, plan: Plan) -> dict[str, int]:
    """{config field, dotted in nested configs: new value} of what `plan` changes alike in all layers. Local.

    {} where a built model would be another function: exchanged modules, created biases, rewritten graphs.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict") or plan.resized or plan.graphs or not plan.keep:
        return {}
    whole = _shapes(model)
    if any(swap.name != "narrow_norm" for swap in plan.swaps.values()) or not set(plan.bias) <= set(whole):
        return {}
    if _built_shapes(_Built(type(model), config, ())) != whole:
        return {}
    target = dict(whole)
    for fqn, dims in plan.keep.items():
        target[fqn] = tuple(len(dims[d]) if d in dims else n for d, n in enumerate(whole[fqn]))
    wanted = {field: new for field, old in _fields(config) if (new := _value(model, config, field, old, whole, target))}
    for count in range(len(wanted), 0, -1):
        # a number of heads goes before a size of heads
        for fields in combinations(sorted(wanted, key=lambda f: "head" not in f or "dim" in f), count):
            changes = {field: wanted[field] for field in fields}
            built = _build(type(model), config, changes)
            if built is not None and _follows(_shapes(built), whole, target) and _holds(built, model, plan.attrs):
                return changes
    return {}


def set_field(config: Any, field: str, value: int) -> None:
    """Write a dotted field of a config."""
    path, _, name = field.rpartition(".")
    for part in path.split(".") if path else ():
        config = getattr(config, part)
    setattr(config, name, value)


def has_field(config: Any, field: str) -> bool:
    """Whether a config has a dotted field."""
    for part in field.split("."):
        if not hasattr(config, part):
            return False
        config = getattr(config, part)
    return True


def _fields(config: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    for name, value in vars(config).items():
        if type(value) is int and value > 1 and not name.startswith("_"):
            yield prefix + name, value
        elif hasattr(value, "to_dict"):
            yield from _fields(value, f"{prefix}{name}.")


def _value(model: nn.Module, config: Any, field: str, old: int, whole: Shapes, target: Shapes) -> int | None:
    """What the field must be for the shapes that follow it, None when they do not agree or do not change."""
    shapes = _built_shapes(_Built(type(model), config, ((field, 2 * old),)))
    if shapes is None or set(shapes) != set(whole):
        return None
    values = set()
    for fqn, shape in whole.items():
        for before, twice, after in zip(shape, shapes[fqn], target[fqn], strict=True):
            if twice != before:
                values.add(old + (after - before) * old / (twice - before))
    (new,) = values if len(values) == 1 else (None,)
    return int(new) if new is not None and new == int(new) and 0 < new < old else None


class _Built:
    """A model to build; equal for one class and equal configs."""

    def __init__(self, kind: type[nn.Module], config: Any, changes: tuple[tuple[str, int], ...]):
        self.kind, self.config, self.changes = kind, config, changes
        self._key = (kind, json.dumps(config.to_dict(), sort_keys=True, default=repr), changes)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Built) and self._key == other._key


@lru_cache(maxsize=128)
def _built_shapes(wanted: _Built) -> Shapes | None:
    """The shapes of a model that is built once for the coupling and all plans; None when it cannot be."""
    built = _build(wanted.kind, wanted.config, dict(wanted.changes))
    return None if built is None else _shapes(built)


def _build(kind: type[nn.Module], config: Any, changes: Mapping[str, int]) -> nn.Module | None:
    """A model of the class on the meta device, None when it refuses the config."""
    changed = copy.deepcopy(config)
    try:
        for field, value in changes.items():
            set_field(changed, field, value)
        with torch.device("meta"):
            return kind(type(config).from_dict(changed.to_dict()))
    except Exception:  # values that do not go together, or a class that is built otherwise
        return None


def _shapes(model: nn.Module) -> Shapes:
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {fqn: tuple(tensor.shape) for fqn, tensor in named}


def _follows(shapes: Shapes, whole: Shapes, target: Shapes) -> bool:
    """Whether every size that the config changes is the shrunk one."""
    return set(shapes) == set(whole) and all(
        new in (before, after)
        for fqn, old in whole.items()
        for new, before, after in zip(shapes[fqn], old, target[fqn], strict=True)
    )


def _holds(built: nn.Module, model: nn.Module, attrs: Mapping[str, int]) -> bool:
    for fqn, value in attrs.items():
        owner, _, name = fqn.rpartition(".")
        if getattr(built.get_submodule(owner), name) not in (value, getattr(model.get_submodule(owner), name)):
            return False
    return True
