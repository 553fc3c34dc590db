"""The numbers in the call of a graph node that have to follow the kept sizes, computed from what is kept.

Paths name arguments: "1.2" is args[1][2], "kwargs.scale" a keyword, "1.0.stop" the end of a slice, and "target" the
name of the function itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch._ops import OpOverload

Kept = torch.Tensor  # bool [dense size of a dim], True = stays
Changes = dict[str, Any]

_SIZES = frozenset(
    "view reshape expand broadcast_to unflatten _unsafe_view new_zeros new_ones new_full new_empty zeros ones full "
    "empty rand randn".split()
)


@dataclass(frozen=True)
class Call:
    """One call at the old sizes, and what is kept of the dims of its tensors."""

    target: Any
    args: tuple[Any, ...]  # tensors are Nodes, everything else is its value at the old sizes
    kwargs: dict[str, Any]
    source: list[Kept] | None  # of the first tensor argument
    outputs: list[list[Kept]] | None  # of each output tensor

    @property
    def name(self) -> str:
        return name_of(self.target)


def name_of(target: Any) -> str:
    if isinstance(target, str):
        return target
    if isinstance(target, OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", str(target))


def changes_of(call: Call) -> Changes:
    """{path: the value that it must have}; a path may be there although its value stays."""
    name = call.name
    if call.outputs is not None and len(call.outputs) == 1 and name in _SIZES:
        return _sizes(call, call.outputs[0])
    if call.outputs is not None and name in ("split", "split_with_sizes", "chunk", "tensor_split"):
        return _parts(call)
    if call.source is not None and name in ("getitem", "setitem"):
        return dict(_index(call.args[1], call.source))
    if call.source is not None and name in ("narrow", "select", "slice"):
        return _positions(call, call.source)
    if call.source is not None and name == "scaled_dot_product_attention":
        return _scale(call, call.source)
    return {}


def _sizes(call: Call, out: list[Kept]) -> Changes:
    """A run of integers that is the shape of the output, or of the dims that an unflatten makes."""
    for paths, values in _runs(call):
        start = 0
        if call.name == "unflatten":
            dim = call.args[1] if len(call.args) > 1 else call.kwargs["dim"]
            start = dim % (len(out) - len(values) + 1)
        dims = out[start : start + len(values)]
        whole = call.name == "unflatten" or len(values) == len(out)
        if whole and len(dims) == len(values) and all(v in (-1, len(k)) for v, k in zip(values, dims, strict=True)):
            found = zip(paths, values, dims, strict=True)
            return {path: int(k.sum()) for path, value, k in found if value != -1}
    return {}


def _runs(call: Call) -> Iterator[tuple[list[str], list[int]]]:
    """The lists of integers among the arguments, and the integers that end the positional ones."""
    for path, value in [*((str(i), v) for i, v in enumerate(call.args)), *_keywords(call)]:
        if isinstance(value, list | tuple) and value and all(type(v) is int for v in value):
            yield [f"{path}.{i}" for i in range(len(value))], list(value)
    tail = len(call.args)
    while tail and type(call.args[tail - 1]) is int:
        tail -= 1
    yield [str(i) for i in range(tail, len(call.args))], list(call.args[tail:])


def _keywords(call: Call) -> Iterator[tuple[str, Any]]:
    return ((f"kwargs.{key}", value) for key, value in call.kwargs.items())


def _parts(call: Call) -> Changes:
    """Splits: the sizes of the parts."""
    assert call.outputs is not None
    keywords = (item for item in _keywords(call) if item[0] not in ("kwargs.input", "kwargs.dim"))
    path, how = ("1", call.args[1]) if len(call.args) > 1 else next(keywords)
    dim = call.args[2] if len(call.args) > 2 else call.kwargs.get("dim", 0)
    sizes = [int(out[dim].sum()) for out in call.outputs]
    even = torch.arange(sum(sizes))
    if call.name == "chunk":
        if len(sizes) == how and [len(part) for part in even.chunk(how)] == sizes:
            return {}
        path = path.replace("chunks", "indices")
        return {"target": "tensor_split", path: list(accumulate(sizes))[:-1]}
    if call.name == "tensor_split":
        if type(how) is int and [len(part) for part in even.tensor_split(how)] == sizes:
            return {}
        return {path: list(accumulate(sizes))[:-1]}
    if type(how) is int:
        if [len(part) for part in even.split(sizes[0])] == sizes:
            return {path: sizes[0]}
        rename = {"target": "split_with_sizes"} if isinstance(call.target, OpOverload) else {}
        return {**rename, path: sizes}
    return {f"{path}.{i}": size for i, size in enumerate(sizes)}


def _index(index: Any, source: list[Kept]) -> Iterator[tuple[str, Any]]:
    """x[index]: positions and ends of slices, up to the first index that is a tensor or a list."""
    items = index if isinstance(index, tuple) else (index,)
    taking = sum(item is not None and item is not ... for item in items)
    dim = 0
    for i, item in enumerate(items):
        path = f"1.{i}" if isinstance(index, tuple) else "1"
        if item is ...:
            dim = len(source) - (taking - dim)
        elif type(item) is int:
            yield path, _place(item, source[dim], one=True)
            dim += 1
        elif isinstance(item, slice):
            ends = {"start": item.start, "stop": item.stop}
            yield from ((f"{path}.{k}", _place(v, source[dim])) for k, v in ends.items() if type(v) is int)
            dim += 1
        elif item is not None:
            return


def _place(position: int, kept: Kept, one: bool = False) -> int:
    """Where a position, or a border between two, comes to lie; negative ones count from the end."""
    if position < 0:
        behind = int(kept[position:].sum())
        return -behind if behind else int(kept.sum())  # -0 would be the beginning
    if one and position >= len(kept):
        return position
    return int(kept[:position].sum()) + max(position - len(kept), 0)


def _positions(call: Call, source: list[Kept]) -> Changes:
    """narrow(dim, start, length), select(dim, index), aten.slice(dim, start, end)."""
    names = {"narrow": ("start", "length"), "select": ("index",), "slice": ("start", "end")}[call.name]
    places = dict(enumerate(("dim", *names), start=1))
    given = {places[i]: (str(i), v) for i, v in enumerate(call.args) if i in places}
    given |= {key: (f"kwargs.{key}", v) for key, v in call.kwargs.items() if key in places.values()}
    kept = source[given["dim"][1]] if "dim" in given else source[0]
    found: Changes = {}
    for name, (path, value) in given.items():
        if name == "dim" or type(value) is not int:
            continue
        if name == "length":
            start = given["start"][1]
            value = int(kept[start : start + value].sum())
        else:
            value = _place(value, kept, one=name == "index") if value < len(kept) else value
        found[path] = value
    return found


def _scale(call: Call, query: list[Kept]) -> Changes:
    """Attention divides by the root of the head size that the model had."""
    if call.kwargs.get("scale") is not None or bool(query[-1].all()):
        return {}
    return {"kwargs.scale": len(query[-1]) ** -0.5}


def changed(tree: Any, changes: Changes) -> tuple[Any, ...]:
    """(target, args, kwargs) with the changes in it."""
    target, args, kwargs = tree
    args, kwargs = list(args), dict(kwargs)
    if "target" in changes:
        target = _renamed(target, changes["target"])
        kwargs.pop("chunks", None)  # tensor_split calls them indices
    for path, value in changes.items():
        if path == "target":
            continue
        first, *rest = path.split(".")
        if first == "kwargs":
            key = rest.pop(0)
            kwargs[key] = _set(kwargs.get(key), rest, value)
        else:
            args[int(first)] = _set(args[int(first)], rest, value)
    return target, tuple(args), kwargs


def _set(tree: Any, path: list[str], value: Any) -> Any:
    if not path:
        return value
    first, *rest = path
    if isinstance(tree, slice):
        parts = {"start": tree.start, "stop": tree.stop, "step": tree.step}
        return slice(*(parts | {first: value}).values())
    items = list(tree)
    items[int(first)] = _set(items[int(first)], rest, value)
    return items if isinstance(tree, list) else tuple(items)


def _renamed(target: Any, name: str) -> Any:
    """The same kind of callable under another name of torch; only splits are ever renamed."""
    if isinstance(target, str):
        return name
    if isinstance(target, OpOverload):
        splits: dict[str, Callable[..., Any]] = {
            "split_with_sizes": torch.ops.aten.split_with_sizes.default,
            "tensor_split": torch.ops.aten.tensor_split.indices,
        }
        return splits[name]
    return getattr(torch, name)


def literal_paths(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Every integer among the arguments of a node that is written there."""
    for path, value in [*((str(i), v) for i, v in enumerate(args)), *((f"kwargs.{k}", v) for k, v in kwargs.items())]:
        yield from _literals(path, value)


def _literals(path: str, value: Any) -> Iterator[tuple[str, int]]:
    if type(value) is int:
        yield path, value
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _literals(f"{path}.{i}", item)
