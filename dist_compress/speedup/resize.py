"""What `apply` leaves to the user's rules of module classes: `resize` in place, or `replace` by another module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import nn

from dist_compress.errors import UserError
from dist_compress.speedup.custom import rule_of_module
from dist_compress.speedup.plan import Plan

Slice = Callable[[torch.Tensor, dict[int, torch.Tensor]], torch.Tensor]


def check_rules(modules: Mapping[str, nn.Module], plan: Plan, cut: Slice) -> None:
    """Run each rule on a copy of its module first, so that what fails there leaves the model as it was. Local.

    modules: by all their names. cut: slices a parameter. Raises UserError for a class without a rule here, and what
    `resize` and `replace` raise.
    """
    for fqn, keep in plan.resized.items():
        module = modules.get(fqn)
        if module is None:
            raise UserError(f"The speedup plan does not fit this model: module {fqn!r} does not exist here.")
        rule = rule_of_module(module)
        if rule is None or (rule.resize is None and rule.replace is None):
            raise UserError(
                f"The plan resizes module {fqn!r} by a rule that was registered for its class; "
                f"call register_op({type(module).__name__}, ...) before the plan is applied."
            )
        trial = copy.deepcopy(module)
        for name, parameter in list(trial.named_parameters()):
            dims = plan.keep.get(f"{fqn}.{name}".lstrip("."))
            if dims:
                owner = trial.get_submodule(name.rpartition(".")[0])
                setattr(owner, name.rpartition(".")[2], nn.Parameter(cut(parameter.detach(), dims)))
        if rule.resize is not None:
            rule.resize(trial, keep)
        elif rule.replace is not None and not isinstance(rule.replace(trial, keep), nn.Module):
            raise UserError(f"replace() of the rule of {type(module).__name__} must return a module.")


def apply_rules(modules: Mapping[str, nn.Module], plan: Plan) -> None:
    """Resize or replace, once everything is sliced; a replacement takes every place of the module. Local."""
    for fqn, keep in plan.resized.items():
        module = modules[fqn]
        rule = rule_of_module(module)
        assert rule is not None
        if rule.resize is not None:
            rule.resize(module, keep)
        if rule.replace is not None:
            made = rule.replace(module, keep)
            made.train(module.training)
            for name, other in modules.items():
                if other is module and name:
                    setattr(modules[name.rpartition(".")[0]], name.rpartition(".")[2], made)
