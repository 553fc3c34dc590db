"""Copies of a model that share its tensors, or have others in their place."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def copied(model: nn.Module, tensors: Mapping[int, torch.Tensor]) -> nn.Module:
    """`copy.deepcopy(model, tensors)` in a fraction of its time: what torch's layers hold need not be searched.

    tensors: {id of each parameter and buffer: what the copy has in its place}.
    """
    memo: dict[int, Any] = {**scripted(model), **tensors}
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


def scripted(model: nn.Module) -> dict[int, Any]:
    """Scripted functions that modules hold: they have no state, and deepcopy refuses them."""
    held = (value for module in model.modules() for value in vars(module).values())
    return {id(value): value for value in held if isinstance(value, torch.jit.ScriptFunction)}
