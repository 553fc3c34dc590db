"""The model that a run begins with. One whose parameters are going to be sharded is whole on no device: they are meta
tensors on every rank, and their values wait in the memory of rank 0's host until the backend asks for them, one after
the other.

Rank 0 builds the model, with its weights, on the CPU. The others build its modules on the meta device; where that makes
another model, or fails (code that looks at values, or keeps tensors in places of its own), whole on the CPU, and let go
of the parameters. Buffers, and tensors that modules keep as attributes, are small: those of rank 0 are on every rank.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from dist_compress import comm
from dist_compress.tracing.untouched import untouched
from dist_compress.tracing.weightless import weightless

T = TypeVar("T")
Build = Callable[[], nn.Module]
Example = tuple[tuple[Any, ...], dict[str, Any]]
Places = list[tuple[nn.Module, str]]


class Initial:
    """`model` with its values, or without: then `values` are those of its parameters on rank 0, and none elsewhere."""

    def __init__(
        self, model: nn.Module, example: Example, values: dict[nn.Parameter, nn.Parameter] | None = None, note: str = ""
    ) -> None:
        """`example`: of a call. `note`: a line for the user, why a model is whole that should not be."""
        self.model, self.example, self.values, self.notes = model, example, values, [note] if note else []

    def real(self, fn: Callable[[nn.Module, Example], T], device: torch.device | str = "cpu") -> T:
        """`fn` of the model with its values, and of the example. Values that wait, and the example with them, are put
        on `device` meanwhile. Rank 0 only."""
        if self.values is None:
            return fn(self.model, self.example)
        places, modules = places_of(self.model), list(self.model.modules())
        held = [(module, name, b) for module in modules for name, b in module._buffers.items() if b is not None]
        try:
            for waiting, value in self.values.items():
                there = value if value.device == torch.device(device) else _parameter(value.to(device), value)
                _put(places[waiting], there)
            for module, name, buffer in held:
                module._buffers[name] = buffer.to(device)
            return fn(self.model, tree_map_only(torch.Tensor, lambda leaf: leaf.to(device), self.example))
        finally:
            for waiting, where in places.items():
                _put(where, waiting)
            for module, name, buffer in held:
                module._buffers[name] = buffer

    def on_rank0(self, fn: Callable[[nn.Module, Example], T]) -> T:
        """`real(fn)` of rank 0, on every rank. Collective."""
        return comm.on_rank0(lambda: self.real(fn))

    def source(self, needed: bool = True) -> Callable[[str], torch.Tensor] | None:
        """Where the backend gets each parameter from, whole, once, if they wait (as in `Backend.wrap`). Local, but what
        is returned is collective. `needed`: False if other values are going to be read into the model: it begins with
        zeros then."""
        if self.values is None:
            return None
        if not needed:
            self.values.clear()
            return self._zeros
        return self._next

    def _zeros(self, name: str) -> torch.Tensor:
        parameter = self.model.get_parameter(name)
        return torch.zeros(parameter.shape, dtype=parameter.dtype, device=comm.device())

    def _next(self, name: str) -> torch.Tensor:
        assert self.values is not None
        value = self._zeros(name)
        if comm.rank() == 0:
            value.copy_(self.values.pop(self.model.get_parameter(name)).detach())
        return comm.broadcast(value)


def begin(modules: Build, loaded: Build, placed: Callable[[nn.Module], nn.Module], example: Example) -> Initial:
    """The parameters wait, unless the model does not run without them. `modules()` builds it, `loaded()` with the
    weights that it begins with, both on the CPU; `placed` brings it to the device. Collective: what fails on rank 0 is
    raised on every rank."""
    made: list[nn.Module] = []

    def make() -> tuple[list[str], str]:
        made.append(loaded())
        why = _why_whole(made[0], example)
        return inventory(made[0]), why

    bare = skeleton(modules) if comm.rank() != 0 else None  # while rank 0 is busy
    wanted, why = comm.on_rank0(make)
    if why:
        whole = placed(made[0] if made else loaded())
        return Initial(whole, example, note=f"every rank builds the whole model: without weights {why}")
    model = made[0] if made else bare if bare is not None and inventory(bare) == wanted else modules()
    comm.check_order("modules, parameters and buffers of the model", inventory(model))
    _spread(model)
    return Initial(model, example, _taken_out(model))


def skeleton(build: Build) -> nn.Module | None:
    """The model on the meta device, if that is possible. Local."""
    try:
        with torch.device("meta"), _Made() as made:
            model = build()
    except Exception:  # on the CPU it says why, if it fails there too
        return None
    return None if made.hidden(model) else model


def inventory(model: nn.Module) -> list[str]:
    """All that ranks must have alike to hold parts of one model: modules, parameters and who shares them, buffers,
    tensors among attributes. Local."""
    first = {id(p): name for name, p in model.named_parameters()}
    modules = [f"{name}: {type(module).__name__}" for name, module in model.named_modules()]
    parameters = [
        f"{name} is {first[id(p)]} {list(p.shape)} {p.dtype} {p.requires_grad}"
        for name, p in model.named_parameters(remove_duplicate=False)
    ]
    tensors = [f"{name} {list(t.shape)} {t.dtype}" for name, t in model.named_buffers()]
    kept = [f"attribute {name} {list(t.shape)} {t.dtype}" for _, name, t in _attributes(model)]
    return [*modules, *parameters, *tensors, *kept]


def places_of(model: nn.Module) -> dict[nn.Parameter, Places]:
    """Where each parameter is kept, under all of its names. Local."""
    found: dict[nn.Parameter, Places] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(parameter, []).append((module, name))
    return found


def _why_whole(model: nn.Module, example: Example) -> str:
    """ "" if a model runs without the values of its parameters, as all that looks at it will run it; else what it says.
    The model stays as it is."""
    values = _taken_out(model)
    try:
        with weightless(model), untouched(model):
            args, kwargs = tree_map_only(torch.Tensor, lambda leaf: leaf.cpu(), example)
            model(*args, **kwargs)
    except Exception as error:
        return f"it fails with {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    finally:
        places = places_of(model)
        for waiting, value in values.items():
            _put(places[waiting], value)
    return ""


class _Made(TorchDispatchMode):
    """Remembers all tensors that are made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.made += [weakref.ref(leaf) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        return result

    def hidden(self, model: nn.Module) -> bool:
        """Whether one still lives that is no parameter, buffer or attribute of a module, so that nobody could give it
        values."""
        gc.collect()
        known = {id(t) for t in (*model.parameters(), *model.buffers(), *(t for _, _, t in _attributes(model)))}
        return any((tensor := ref()) is not None and id(tensor) not in known for ref in self.made)


def _attributes(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    """Tensors that modules keep and that are neither parameters nor buffers."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield module, name, value


@torch.no_grad()
def _spread(model: nn.Module) -> None:
    """Give every rank rank 0's buffers, on its device, and attributes. Collective."""

    def sent(tensor: torch.Tensor) -> torch.Tensor:
        there = tensor.detach() if comm.rank() == 0 else torch.empty_like(tensor, device=comm.device())
        return comm.broadcast(there.to(comm.device()).contiguous())

    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = sent(buffer)
    for module, name, tensor in [*_attributes(model)]:
        value = sent(tensor).cpu()
        if comm.rank() != 0:
            vars(module)[name] = value


def _taken_out(model: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
    """Put meta tensors in the place of parameters. Returns on rank 0 {what stands there: what stood there}. Local."""
    values: dict[nn.Parameter, nn.Parameter] = {}
    for parameter, where in places_of(model).items():
        if not parameter.is_meta:
            new = _parameter(torch.empty_like(parameter, device="meta"), parameter)
            _put(where, new)
            values[new] = parameter
    return values if comm.rank() == 0 else {}


def _parameter(value: torch.Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(value.detach(), requires_grad=like.requires_grad)


def _put(places: Places, parameter: nn.Parameter) -> None:
    for module, name in places:
        setattr(module, name, parameter)  # recurrent layers keep another list of theirs
