"""Masks as data: {parameter fqn: bool tensor broadcastable to it, True = keep}."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping

import torch
from torch import nn

from dist_compress.errors import UserError
from dist_compress.tracing.copies import copied, scripted, tensors_of
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


def duplicate(model: nn.Module) -> nn.Module:
    """A deep copy that shares nothing. Local. Computed tensors in modules, which deepcopy refuses, become values."""
    return copy.deepcopy(model, {**scripted(model), **_computed(model)})


def _computed(model: nn.Module) -> dict[int, torch.Tensor]:
    held = (value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor))
    return {id(t): t.detach().clone() for t in held if not t.is_leaf}
