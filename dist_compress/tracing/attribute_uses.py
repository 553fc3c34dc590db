"""Which integers of a user's modules say the size of which dims: one run with integers that know their names."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name

from dist_compress.tracing.attribute_names import names_read
from dist_compress.tracing.tape import Ref, Trace
from dist_compress.tracing.trace import current_ref
from dist_compress.tracing.walk import each_module

# What takes sizes of its result, all of them, in order.
_SHAPED = frozenset(
    "view reshape expand broadcast_to zeros ones full empty rand randn new_zeros new_ones new_full new_empty".split()
)


@dataclass(frozen=True)
class Use:
    """An integer attribute that was the size of `ref` along `dim`, or, with `prefix`, a position along it."""

    attribute: str  # "module fqn.name"
    value: int
    ref: Ref
    dim: int
    prefix: bool


class NamedInt(int):
    """An int to everybody that knows which attribute it is. What is computed with it is a plain int."""

    attribute: str

    def __new__(cls, value: int, attribute: str) -> NamedInt:
        self = super().__new__(cls, value)
        self.attribute = attribute
        return self

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)  # a copied or pickled model that kept one holds no name


def has_uses(model: nn.Module) -> bool:
    """Whether the model's forward may read an integer attribute at all; if not, it has no uses."""
    integers = list(_integers(model))
    names = names_read(model) if integers else frozenset()
    return names is None or any(name in names for _, _, name, _ in integers)


def attribute_uses(model: nn.Module, run: Callable[[], Trace]) -> tuple[Trace, list[Use]]:
    """The tape of `run()`, which traces `model` once, and the uses of attributes in it; attributes are restored."""
    watch = _Watch()
    with _named(model), watch:
        return run(), watch.uses


@contextmanager
def _named(model: nn.Module) -> Iterator[None]:
    replaced: list[tuple[dict[str, Any], str, int]] = []
    try:
        for fqn, module, name, value in list(_integers(model)):
            replaced.append((vars(module), name, value))
            vars(module)[name] = NamedInt(value, f"{fqn}.{name}".lstrip("."))
        yield
    finally:
        for attributes, name, value in replaced:
            if isinstance(attributes.get(name), NamedInt):
                attributes[name] = value


def _integers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, int]]:
    """(fqn, user's module, attribute, value) that may be sizes."""
    for module, fqn in each_module(model).items():
        if type(module).__module__.startswith("torch.") or isinstance(module, torch.jit.ScriptModule):
            continue
        for name, value in vars(module).items():
            if type(value) is int and value > 1 and not name.startswith("_"):
                yield fqn, module, name, value


class _Watch(TorchFunctionMode):
    """Sees the arguments of torch functions before they become plain."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: list[Use] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(isinstance(leaf, NamedInt) for leaf in _leaves((args, kwargs))):
            self._note((resolve_name(func) or "").rpartition(".")[2], args, kwargs, result)
        return result

    def _note(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        results = [x for x in (result if isinstance(result, (tuple, list)) else [result]) if _is_tensor(x)]
        if name == "__getitem__" or name == "__setitem__":
            self._note_index(args[0], args[1])
        elif name in _SHAPED and len(results) == 1:
            sizes = kwargs.get("size", kwargs.get("shape"))
            if sizes is None:
                rest = args[1:] if args and _is_tensor(args[0]) else args
                sizes = rest[0] if rest and isinstance(rest[0], (tuple, list)) else rest
            offset = results[0].dim() - len(sizes)
            for place, size in enumerate(sizes):
                self._add(size, results[0], place + offset)
        elif name == "unflatten":
            dim, sizes = kwargs.get("dim", args[1] if len(args) > 1 else None), kwargs.get("sizes", args[-1])
            for place, size in enumerate(sizes):
                self._add(size, results[0], dim % args[0].dim() + place)
        elif name in ("split", "split_with_sizes", "narrow"):
            dim = kwargs.get("dim", next((x for x in args[1:] if type(x) is int), 0) if name == "narrow" else None)
            dim = (args[2] if len(args) > 2 else 0) if dim is None else dim
            sizes = [leaf for leaf in _leaves((args[1:], kwargs)) if isinstance(leaf, NamedInt)]
            for size in sizes:
                for piece in results:
                    self._add(size, piece, dim % piece.dim())

    def _note_index(self, tensor: torch.Tensor, index: Any) -> None:
        items = index if isinstance(index, tuple) else (index,)
        dims = sum(1 for item in items if item is not None and item is not Ellipsis)
        dim = 0
        for item in items:
            if item is Ellipsis:
                dim += tensor.dim() - dims
            elif item is not None:
                for bound in (item.start, item.stop) if isinstance(item, slice) else (item,):
                    self._add(bound, tensor, dim, prefix=True)
                dim += 1

    def _add(self, size: Any, tensor: torch.Tensor, dim: int, prefix: bool = False) -> None:
        ref = current_ref(tensor)
        fits = isinstance(size, NamedInt) and 0 <= dim < tensor.dim() and (prefix or tensor.size(dim) == size)
        if fits and ref is not None:
            self.uses.append(Use(size.attribute, operator.index(int(size)), ref, dim, prefix))


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _leaves(item)
    elif isinstance(tree, dict):
        yield from _leaves(tuple(tree.values()))
    elif isinstance(tree, slice):
        yield from (tree.start, tree.stop, tree.step)
    else:
        yield tree
