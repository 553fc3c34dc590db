"""Which attributes the forwards of a model's own modules may read, told by the names in their code, without a run."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from dist_compress.tracing.walk import each_module

_BY_TEXT = frozenset("getattr vars locals eval exec attrgetter __dict__ __getattribute__ __getattr__".split())
_PLAIN = (int, float, str, bytes, type, BuiltinFunctionType, torch.Tensor, torch.dtype, torch.device, nn.Module)


def names_read(model: nn.Module) -> frozenset[str] | None:
    """The names; None where code reads attributes that it names by text, or calls what cannot be looked into."""
    modules = [module for module in each_module(model) if not _of_torch(type(module))]
    held = [value for module in modules for name, value in vars(module).items() if name not in _MODULE_STATE]
    if not all(map(_is_known, held)) or any(isinstance(m, torch.jit.ScriptModule) for m in modules):
        return None
    classes = frozenset(type(module) for module in modules)
    return _names(classes, frozenset(f for value in held for f in _functions(value)))


_MODULE_STATE = frozenset(vars(nn.Module()))  # what every module has


def _is_known(value: Any) -> bool:
    """Whether calling methods of `value` runs no code that `_names` does not see."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_known, value))
    if isinstance(value, dict):
        return all(map(_is_known, value.values()))
    return value is None or isinstance(value, _PLAIN) or any(_functions(value))


@functools.lru_cache(maxsize=64)
def _names(classes: frozenset[type], held: frozenset[FunctionType]) -> frozenset[str] | None:
    waiting = [f for cls in classes for name in ("forward", "__call__") for f in _functions(_of_class(cls, name))]
    waiting += held
    seen, names = set(waiting), set()
    while waiting:
        function = waiting.pop()
        own = set(_names_in(function.__code__))
        names |= own
        if not _BY_TEXT.isdisjoint(own):
            return None
        for found in _called(function, own, classes):
            if found not in seen and not _of_torch(found):
                seen.add(found)
                waiting.append(found)
    return frozenset(names)


def _called(function: FunctionType, names: Iterable[str], classes: frozenset[type]) -> Iterator[FunctionType]:
    """The functions that a function may mean by `names`, and those in its closure."""
    known = [function.__globals__.get(name) for name in names]
    libraries = [value for value in known if isinstance(value, ModuleType) and not _of_torch(value)]
    known += [getattr(library, name, None) for library in libraries for name in names]
    known += [_of_class(cls, name) for cls in classes for name in names]
    known += [cell.cell_contents for cell in function.__closure__ or () if cell != type(cell)()]
    known += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for value in known:
        yield from _functions(value)


def _of_class(cls: type, name: str) -> Any:
    return next((vars(c)[name] for c in cls.__mro__ if name in vars(c)), None)


def _functions(value: Any) -> Iterator[FunctionType]:
    """The Python functions that run when `value` is called or read."""
    if isinstance(value, FunctionType):
        yield value
    elif isinstance(value, property):
        yield from (f for f in (value.fget,) if isinstance(f, FunctionType))
    elif isinstance(value, (MethodType, staticmethod, classmethod)):
        yield from _functions(value.__func__)
    elif isinstance(value, functools.partial):
        yield from _functions(value.func)
    elif isinstance(value, functools.cached_property):
        yield from _functions(value.func)


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:  # lambdas and comprehensions
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _of_torch(value: Any) -> bool:
    name = value.__name__ if isinstance(value, ModuleType) else value.__module__
    return f"{name}.".startswith("torch.")
