"""Activations as targets: the tensors that go into a module and come out of it, by name.

    _input_0, _input_1      arguments of `forward` by position, however they are passed
    _input_mask             the same by the name of the argument; keyword-only ones and **kwargs have no other
    _output_0, _output_1    what it returns, a tuple or list by position; a single tensor is _output_0
    _output_logits          a dict, a dataclass or a ModelOutput by key
    _output_past.0.1        a tensor inside of another container
    _input_, _output_past   all (floating point) tensors there

A site has one name of its own, `Site.name` (the position of an argument before its name), and settings are kept by it.

How pruning, quantization and distillation use this. `Sites(model, args, kwargs)` runs the model once, when first asked,
in eval mode without gradients; every rank does so by itself and sees the same. A config list names targets through
`Sites.meant`. When a method attaches, before DDP or FSDP2 wrap the model, `replace` puts a function into the data flow
(a mask, a fake quantizer) and `see` shows a tensor without touching it (an observer, a hidden state to distil). The
tensors of such a function should be parameters or buffers below the module it acts on: they then move along, and if
the function is an object that knows the module (or is a submodule itself), `copy.deepcopy` of the model acts with the
copy. (A submodule of an nn.Sequential would run as one of its layers; give it a buffer instead.) Several functions on
one site run in the order in which they were put there. They see every call, evaluation and tracing (`concrete_trace`)
included, and with activation checkpointing a second one in the backward pass (dist_compress.recompute). A tensor that
is kept must be cloned if what follows works in place.

Everything here is local: no collective.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dist_compress import comm
from dist_compress.errors import UserError
from dist_compress.tracing.untouched import untouched
from dist_compress.tracing.weightless import weightless

Function = Callable[[torch.Tensor], Any]


@dataclass(frozen=True)
class Site:
    """A tensor that goes into or comes out of a module, as seen on one call of the model."""

    module: str  # fqn
    name: str  # "_input_0", "_output_logits": the name that settings are kept by
    alias: str  # "_input_x" for an argument that has a position; else as `name`
    shape: tuple[int, ...]  # at the first call of the module
    dtype: torch.dtype

    def goes_by(self, name: str) -> bool:
        """Whether `name` is this site's, or that of all in a container with this one: _input_ of _input_0."""
        return any(
            own == name or name[-1] == "_" and own.startswith(name) or own.startswith(f"{name}.")
            for own in (self.name, self.alias)
        )


class Sites:
    """All sites of a model, found by one call when first asked for."""

    def __init__(self, model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> None:
        self.model, self.args, self.kwargs = model, tuple(args), dict(kwargs or {})

    def run(self) -> None:
        """Call the model, in evaluation mode, whether or not its parameters have values."""
        with weightless(self.model, comm.device()), untouched(self.model):
            self.model(*self.args, **self.kwargs)

    @cached_property
    def by_module(self) -> dict[str, list[Site]]:
        """{module fqn: its sites, inputs first}. A module that does not run has none."""
        found: dict[str, dict[str, Site]] = {}

        def note(where: str, leaves: Iterator[tuple[str, str, torch.Tensor]]) -> None:
            for name, alias, tensor in leaves:
                site = Site(where, name, alias, tuple(tensor.shape), tensor.dtype)
                found.setdefault(where, {}).setdefault(name, site)

        def before(where: str, names: list[str]) -> Callable[..., None]:
            return lambda _, args, kwargs: note(where, _inputs(names, args, kwargs))

        def after(where: str) -> Callable[..., None]:
            return lambda _, args, output: note(where, _outputs(output))

        handles = []
        for where, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(before(where, _positional(module)), with_kwargs=True))
            handles.append(module.register_forward_hook(after(where)))
        try:
            self.run()
        finally:
            for handle in handles:
                handle.remove()
        return {
            where: sorted(sites.values(), key=lambda site: not site.name.startswith("_input_"))
            for where, sites in found.items()
        }

    def meant(self, module: str, name: str) -> list[Site]:
        """The sites of a module that a name means, [] if there is none. Raises UserError for one that holds no floating
        point numbers."""
        found = [site for site in self.by_module.get(module, []) if site.goes_by(name)]
        real = [site for site in found if site.dtype.is_floating_point]
        if found and not real:
            raise UserError(f"{module}: {name} is {found[0].dtype}. Only floating point activations can be targets.")
        return real

    def forget(self) -> None:
        """The model has other modules than before: look again when next asked."""
        vars(self).pop("by_module", None)

    def site(self, module: str, name: str) -> Site:
        """The one site of this name. It exists: it comes from `meant`."""
        return next(site for site in self.by_module[module] if site.name == name)

    def inventory(self, modules: Sequence[str]) -> str:
        """What there is, for messages: "they have _input_0 (x), _output_0"."""
        sites = {site.name: site.alias for module in modules for site in self.by_module.get(module, [])}
        if not sites:
            return f"{', '.join(modules[:3])} did not run on the example input."
        shown = [n if n == alias else f"{n} ({alias.partition('_input_')[2]})" for n, alias in sites.items()]
        return f"they have {', '.join(shown)}."


def replace(module: nn.Module, name: str, fn: Function, where: str) -> RemovableHandle:
    """From now on the tensor at site `name` of `module` is `fn(tensor)`. `where`: the module's name, for messages. The
    handle takes it off again. A call without that tensor raises UserError."""
    return _hook(module, name, fn, where, True)


def see(module: nn.Module, name: str, fn: Function, where: str) -> RemovableHandle:
    """From now on `fn` is shown the tensor at site `name` of `module`; what it returns is dropped."""
    return _hook(module, name, fn, where, False)


def installed(model: nn.Module) -> Iterator[tuple[str, str, Function]]:
    """(module, site, function) of all that `replace` and `see` have put into a model."""
    for where, module in model.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if isinstance(hook, _Before | _After):
                yield where, hook.name, hook.fn


def _hook(module: nn.Module, name: str, fn: Function, where: str, replaces: bool) -> RemovableHandle:
    side, path = name.split("_", 2)[1], name.split("_", 2)[2].split(".")
    if side == "output":
        return module.register_forward_hook(_After(where, name, path, fn, replaces))
    names = _positional(module)
    if path[0] in names:
        path[0] = str(names.index(path[0]))
    position = int(path[0]) if path[0].isdigit() else None
    argument = path[0] if position is None else names[position] if position < len(names) else ""
    hook = _Before(where, name, path[1:], fn, replaces, position, argument)
    return module.register_forward_pre_hook(hook, with_kwargs=True)


@dataclass
class _After:
    """A forward hook. (An object and no closure, so that a deep copy of the module calls the copy of `fn`.)"""

    where: str
    name: str
    path: list[str]
    fn: Function
    replaces: bool

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        try:
            if isinstance(output, torch.Tensor) and self.path == ["0"]:
                changed = self.fn(output)
            else:
                changed = _changed(output, self.path, self.fn, self.replaces)
        except _Absent:
            raise _absent(self.where, self.name, _outputs(output)) from None
        return changed if self.replaces else None


@dataclass
class _Before:
    """A forward pre-hook."""

    where: str
    name: str
    path: list[str]  # inside of the argument
    fn: Function
    replaces: bool
    position: int | None
    argument: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        positional = self.position is not None and self.position < len(args)
        key = self.position if positional else self.argument
        try:
            if not positional and self.argument not in kwargs:
                raise _Absent
            value = args[key] if positional else kwargs[key]  # type: ignore[index]
            changed = _changed(value, self.path, self.fn, self.replaces)
        except _Absent:
            raise _absent(self.where, self.name, _inputs(_positional(module), args, kwargs)) from None
        if not self.replaces:
            return None
        if positional:
            return (*args[:key], changed, *args[key + 1 :]), kwargs  # type: ignore[operator, misc]
        return args, {**kwargs, key: changed}  # type: ignore[dict-item]


class _Absent(Exception):
    """No tensor there."""


def _absent(where: str, name: str, there: Iterator[tuple[str, str, torch.Tensor]]) -> UserError:
    have = ", ".join(name for name, _, _ in there) or "none"
    return UserError(
        f"{where}: a call without {name}, which is a target of the config list. Its tensors in this call: {have}. "
        "Leave the target out, or call the module alike every time."
    )


def _positional(module: nn.Module) -> list[str]:
    """Names of the arguments of `forward` that have a position."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # compiled code without a signature
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _inputs(names: list[str], args: Any, kwargs: Mapping[str, Any]) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(name, alias, tensor) of all tensors of a call."""
    for i, value in enumerate(args):
        yield from _leaves(value, f"_input_{i}", f"_input_{names[i]}" if i < len(names) else f"_input_{i}")
    for key, value in kwargs.items():
        yield from _leaves(value, f"_input_{names.index(key) if key in names else key}", f"_input_{key}")


def _outputs(output: Any) -> Iterator[tuple[str, str, torch.Tensor]]:
    if isinstance(output, torch.Tensor):
        yield "_output_0", "_output_0", output
    else:
        for key, value in items(output):
            yield from _leaves(value, f"_output_{key}", f"_output_{key}")


def _leaves(value: Any, name: str, alias: str) -> Iterator[tuple[str, str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, alias, value
    else:
        for key, inner in items(value):
            yield from _leaves(inner, f"{name}.{key}", f"{alias}.{key}")


def items(value: Any) -> list[tuple[str, Any]]:
    """What a container holds: (key, value); [] of anything else."""
    if isinstance(value, Mapping):  # a ModelOutput is one, and a dataclass besides
        return [(str(key), inner) for key, inner in value.items()]
    if isinstance(value, tuple | list):
        return [(str(i), inner) for i, inner in enumerate(value)]
    if dataclasses.is_dataclass(value):
        return [(f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value)]
    return []


def _changed(value: Any, path: list[str], fn: Function, replaces: bool) -> Any:
    """`value` with fn(tensor) in the place of the tensor at `path`; containers on the way are copied, unless nothing is
    replaced. Raises _Absent."""
    if not path:
        if not isinstance(value, torch.Tensor):
            raise _Absent
        return fn(value)
    key, rest = path[0], path[1:]
    for i, (name, inner) in enumerate(items(value)):
        if name == key:
            changed = _changed(inner, rest, fn, replaces)
            return _with(value, i, changed) if replaces else None
    raise _Absent


def _with(container: Any, i: int, changed: Any) -> Any:
    """A copy of a container with its i-th item changed."""
    if isinstance(container, Mapping):
        new: Any = copy.copy(container)
        new[list(container)[i]] = changed
        return new
    if isinstance(container, tuple | list):
        items = [*container[:i], changed, *container[i + 1 :]]
        return type(container)(*items) if hasattr(container, "_fields") else type(container)(items)  # a named tuple
    new = copy.copy(container)
    object.__setattr__(new, dataclasses.fields(container)[i].name, changed)  # also where it is frozen
    return new
