"""Masks as data: {parameter fqn: bool tensor broadcastable to it, True = keep}."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dist_compress.errors import UserError
from dist_compress.tracing.walk import modules_of, parameters_of

Masks = Mapping[str, torch.Tensor]


def check_masks(model: nn.Module, masks: Masks) -> dict[str, torch.Tensor]:
    """The masks on the CPU with the rank of their parameters. Raises UserError for names, types and shapes."""
    parameters = parameters_of(modules_of(model))
    checked = {}
    for fqn, mask in masks.items():
        if fqn not in parameters:
            near = difflib.get_close_matches(fqn, parameters, n=3, cutoff=0.5)
            raise UserError(
                f"masks: {fqn!r} is no parameter of this model. "
                + (f"Near matches: {', '.join(near)}." if near else "Use names of named_parameters().")
            )
        shape = parameters[fqn].shape
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
            what = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise UserError(f"masks: the mask of {fqn!r} is {what}; it must be a bool tensor, True = keep.")
        wide = (1,) * (len(shape) - mask.dim()) + tuple(mask.shape)
        if len(wide) != len(shape) or any(m not in (1, n) for m, n in zip(wide, shape, strict=True)):
            raise UserError(
                f"masks: the mask of {fqn!r} has shape {tuple(mask.shape)}, not broadcastable to {tuple(shape)}."
            )
        checked[fqn] = mask.detach().cpu().reshape(wide)
    return checked


def masked(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> nn.Module:
    """A copy of `model` with its masked parameters multiplied by their masks; it shares all other tensors."""
    shared = tensors_of(model)
    for fqn, mask in masks.items():
        parameter = model.get_parameter(fqn)
        known = shared[id(parameter)]  # a tied parameter may have a mask under each of its names
        value = known.detach() * mask.to(known.device)
        shared[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    return copied(model, shared)


def copied(model: nn.Module, tensors: Mapping[int, torch.Tensor]) -> nn.Module:
    """`copy.deepcopy(model, tensors)` in a fraction of its time: what torch's layers hold need not be searched.

    tensors: {id of each parameter and buffer: what the copy has in its place}.
    """
    memo: dict[int, Any] = {**_scripted(model), **tensors}
    for module in model.modules():
        if type(module).__module__.startswith("torch.nn.modules.") and _is_flat(module):
            memo[id(module)] = _twin(module, tensors)
    return copy.deepcopy(model, memo)


_STATE = frozenset(vars(nn.Module())) - {"training"}  # what every module has


def _is_flat(module: nn.Module) -> bool:
    """Whether it holds parameters, buffers and plain values alone: no submodule, no hook."""
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            continue
        if value if name in _STATE else not _is_plain(value):
            return False
    return True


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (int, float, str))


def _twin(module: nn.Module, tensors: Mapping[int, torch.Tensor]) -> nn.Module:
    twin = module.__new__(type(module))
    own: dict[str, Any] = vars(module).copy()
    own.update({name: v.copy() for name, v in own.items() if isinstance(v, (dict, list, set))})
    for kind in ("_parameters", "_buffers"):
        own[kind] = {name: tensors.get(id(tensor), tensor) for name, tensor in own[kind].items()}
    vars(twin).update(own)
    return twin


def tensors_of(model: nn.Module) -> dict[int, torch.Tensor]:
    """The memo of a deepcopy that copies no tensor: parameters, buffers, and what modules hold as plain attributes.

    The latter may have been computed (the weight of an old weight norm), which deepcopy refuses.
    """
    plain = (value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor))
    return {id(t): t for t in (*model.parameters(), *model.buffers(), *plain)}


def on_meta(model: nn.Module) -> nn.Module:
    """A copy without values: all its tensors are on the meta device. Local."""
    return copied(model, {key: _meta_twin(tensor) for key, tensor in tensors_of(model).items()})


def _meta_twin(tensor: torch.Tensor) -> torch.Tensor:
    twin = torch.empty_like(tensor, device="meta")
    return nn.Parameter(twin, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin


def duplicate(model: nn.Module) -> nn.Module:
    """A deep copy that shares nothing. Local. Computed tensors in modules, which deepcopy refuses, become values."""
    return copy.deepcopy(model, {**_scripted(model), **_computed(model)})


def _scripted(model: nn.Module) -> dict[int, Any]:
    """Scripted functions that modules hold: they have no state, and deepcopy refuses them."""
    held = (value for module in model.modules() for value in vars(module).values())
    return {id(value): value for value in held if isinstance(value, torch.jit.ScriptFunction)}


def _computed(model: nn.Module) -> dict[int, torch.Tensor]:
    held = (value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor))
    return {id(t): t.detach().clone() for t in held if not t.is_leaf}
