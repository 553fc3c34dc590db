"""Shrinking a model by a plan: slices of parameters and buffers in the user's own modules, and repaired integers.

Needs nothing but the plan, so every rank does it alone, and so does a freshly built model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dist_compress.errors import UserError
from dist_compress.speedup.graph_forward import install, programs
from dist_compress.speedup.model_config import has_field, set_field
from dist_compress.speedup.modules import exchange, replacement_of
from dist_compress.speedup.plan import Plan
from dist_compress.speedup.resize import apply_rules, check_rules
from dist_compress.tracing.unwrap import unwrapped
from dist_compress.tracing.walk import modules_of

Modules = Mapping[str, nn.Module]  # by all their names


def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """Shrink `model` in place and return it. Local, the same on every rank.

    Modules are the same objects; parameters are new `Parameter`s (dtype, device, requires_grad and ties as before),
    so optimizers and wrappers have to be built anew. Raises UserError when the plan is of another model or was applied
    before; the model is then as it was. Of what torch.compile or DDP wrapped, the module inside is returned.
    """
    model = unwrapped(model)
    modules = modules_of(model)
    owners = {fqn: _owner(modules, fqn) for fqn in plan.keep}
    old = {fqn: _tensor(fqn, *owners[fqn]) for fqn in plan.keep}
    for fqn, tensor in old.items():
        _check_shape(fqn, tensor, plan)
    biases = {fqn: _bias(modules, fqn, value, plan) for fqn, value in plan.bias.items()}
    numbers = [(*_owner(modules, fqn), value) for fqn, value in plan.attrs.items()]
    swaps = [(_module(modules, fqn), swap) for fqn, swap in plan.swaps.items()]
    for _, swap in swaps:
        replacement_of(swap)
    check_rules(modules, plan, _slice)
    config = _config(model, plan)
    graphs = programs(model, plan)
    new: dict[int, torch.Tensor] = {}
    for fqn, dims in plan.keep.items():
        if id(old[fqn]) not in new:
            new[id(old[fqn])] = _replacement(old[fqn], _slice(old[fqn].detach(), dims))
    # Everything is checked and made: from here on nothing fails.
    for fqn, (owner, name) in owners.items():
        _set(owner, name, new[id(old[fqn])])
    for fqn, bias in biases.items():
        owner, name = _owner(modules, fqn)
        setattr(owner, name, bias)
    for owner, name, value in numbers:
        _set(owner, name, value)
    for module, swap in swaps:
        exchange(module, swap)
    for name, value in plan.config.items():
        set_field(config, name, value)
    apply_rules(modules, plan)
    install(model, plan, graphs)
    return model


def apply_to_state(plan: Plan, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """{parameter fqn: tensor shaped like it} sliced like the parameters; other tensors (step counters) as they are.

    For optimizer moments and saved checkpoints. Local. A folded bias keeps its old value here: set it from
    `plan.bias` where the state holds weights. Raises UserError for tensors that are not of the plan's model.
    """
    result = dict(state)
    for fqn, tensor in state.items():
        if fqn in plan.keep and tensor.dim():
            _check_shape(fqn, tensor, plan)
            result[fqn] = _slice(tensor, plan.keep[fqn])
    return result


def _owner(modules: Modules, fqn: str) -> tuple[nn.Module, str]:
    path, _, name = fqn.rpartition(".")
    owner = _module(modules, path)
    if not hasattr(owner, name):
        raise _mismatch(fqn, "does not exist here")
    return owner, name


def _module(modules: Modules, fqn: str) -> nn.Module:
    if fqn not in modules:
        raise _mismatch(fqn, "does not exist here")
    return modules[fqn]


def _set(owner: nn.Module, name: str, value: object) -> None:
    """`setattr`, without the search of `nn.Module` for what the name may be where that is known."""
    places: list[Any] = [place for place in (vars(owner), owner._parameters, owner._buffers) if name in place]
    if len(places) == 1 and type(owner).__setattr__ is nn.Module.__setattr__:
        places[0][name] = value
    else:
        setattr(owner, name, value)


def _tensor(fqn: str, owner: nn.Module, name: str) -> torch.Tensor:
    tensor = getattr(owner, name)
    if not isinstance(tensor, torch.Tensor):
        raise _mismatch(fqn, f"is {type(tensor).__name__} here")
    return tensor


def _config(model: nn.Module, plan: Plan) -> object:
    config = getattr(model, "config", None)
    for name in plan.config:
        if not has_field(config, name):
            raise _mismatch(f"config.{name}", "does not exist here")
    return config


def _mismatch(fqn: str, what: str) -> UserError:
    return UserError(
        f"The speedup plan does not fit this model: {fqn!r} {what}. "
        "Apply a plan once, to the architecture it was made for, before anything is shrunk."
    )


def _check_shape(fqn: str, tensor: torch.Tensor, plan: Plan) -> None:
    """Raises UserError unless `tensor` is as it was when the plan was made."""
    shape = tuple(tensor.shape)
    if fqn in plan.shapes and shape != tuple(plan.shapes[fqn]):
        raise _mismatch(fqn, f"has shape {shape}, the plan is for {tuple(plan.shapes[fqn])}")
    for dim, index in plan.keep[fqn].items():
        if dim >= len(shape) or int(index.max()) >= shape[dim]:
            raise _mismatch(fqn, f"has shape {shape}, too small for the plan's dim {dim}")


def _slice(tensor: torch.Tensor, dims: Mapping[int, torch.Tensor]) -> torch.Tensor:
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    channels_last = channels_last and not tensor.is_contiguous()
    for dim, index in dims.items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor.contiguous(memory_format=torch.channels_last) if channels_last else tensor


def _bias(modules: Modules, fqn: str, value: torch.Tensor, plan: Plan) -> nn.Parameter:
    """The new parameter that holds the folded value."""
    owner, name = _owner(modules, fqn)
    old = getattr(owner, name)
    if old is not None:
        kept = plan.keep.get(fqn, {})
        expected = tuple(len(kept[d]) if d in kept else n for d, n in enumerate(_tensor(fqn, owner, name).shape))
        if tuple(value.shape) != expected:
            raise _mismatch(fqn, f"has shape {tuple(old.shape)}, which is not that of the plan's value")
    like = _tensor(fqn, owner, "weight" if old is None else name)
    return nn.Parameter(value.to(device=like.device, dtype=like.dtype).clone(), requires_grad=like.requires_grad)


def _replacement(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
        for name, mark in vars(old).items():  # what users and frameworks hang on parameters
            setattr(new, name, mark)
    return new
