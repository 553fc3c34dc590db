"""Shrinking a model by a plan: slices of parameters and buffers in the user's own modules, and repaired integers.

Needs nothing but the plan, so every rank does it alone, and so does a freshly built model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from dist_compress.errors import UserError
from dist_compress.speedup.plan import Plan


def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """Shrink `model` in place and return it. Local, the same on every rank.

    Modules are the same objects; parameters are new `Parameter`s (dtype, device, requires_grad and ties as before),
    so optimizers and wrappers have to be built anew. Raises UserError when the plan is of another model.
    """
    owners = {fqn: _owner(model, fqn) for fqn in plan.keep}
    old = {fqn: _tensor(fqn, *owners[fqn]) for fqn in plan.keep}  # all of them before the first changes: ties
    new: dict[int, torch.Tensor] = {}
    for fqn, dims in plan.keep.items():
        if id(old[fqn]) not in new:
            new[id(old[fqn])] = _replacement(old[fqn], _slice(fqn, old[fqn].detach(), dims))
    for fqn, (owner, name) in owners.items():
        setattr(owner, name, new[id(old[fqn])])
    for fqn, value in plan.bias.items():
        owner, name = _owner(model, fqn)
        like = getattr(owner, name)
        like = _tensor(fqn, owner, "weight") if like is None else like
        bias = value.to(device=like.device, dtype=like.dtype)
        setattr(owner, name, nn.Parameter(bias.clone(), requires_grad=like.requires_grad))
    for fqn, value in plan.attrs.items():
        owner, name = _owner(model, fqn)
        setattr(owner, name, value)
    return model


def apply_to_state(plan: Plan, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """{parameter fqn: tensor shaped like it} sliced like the parameters; other tensors (step counters) as they are.

    For optimizer moments and saved checkpoints. Local. A folded bias keeps its old value here: set it from
    `plan.bias` where the state holds weights.
    """
    return {
        fqn: _slice(fqn, tensor, plan.keep[fqn]) if fqn in plan.keep and tensor.dim() else tensor
        for fqn, tensor in state.items()
    }


def _owner(model: nn.Module, fqn: str) -> tuple[nn.Module, str]:
    path, _, name = fqn.rpartition(".")
    try:
        owner = model.get_submodule(path)
        getattr(owner, name)
    except AttributeError:
        raise _mismatch(fqn, "does not exist here") from None
    return owner, name


def _tensor(fqn: str, owner: nn.Module, name: str) -> torch.Tensor:
    tensor = getattr(owner, name)
    if not isinstance(tensor, torch.Tensor):
        raise _mismatch(fqn, f"is {type(tensor).__name__} here")
    return tensor


def _mismatch(fqn: str, what: str) -> UserError:
    return UserError(
        f"The speedup plan does not fit this model: {fqn!r} {what}. "
        "Apply a plan to the architecture it was made for, before anything is shrunk."
    )


def _slice(fqn: str, tensor: torch.Tensor, dims: Mapping[int, torch.Tensor]) -> torch.Tensor:
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    channels_last = channels_last and not tensor.is_contiguous()
    for dim, index in dims.items():
        if dim >= tensor.dim() or int(index.max()) >= tensor.size(dim):
            raise _mismatch(fqn, f"has shape {tuple(tensor.shape)}, too small for the plan's dim {dim}")
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor.contiguous(memory_format=torch.channels_last) if channels_last else tensor


def _replacement(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
        for name, mark in vars(old).items():  # what users and frameworks hang on parameters
            setattr(new, name, mark)
    return new
