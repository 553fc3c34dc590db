"""The modules of a model and what they hold, by all their names: as `named_modules` and the like, in less time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """{fqn: module} in the order of `named_modules(remove_duplicate=False)`."""
    found: dict[str, nn.Module] = {}
    stack = [("", model)]
    while stack:
        name, module = stack.pop()
        found[name] = module
        prefix = f"{name}." if name else ""
        children = [(prefix + own, child) for own, child in module._modules.items() if child is not None]
        stack.extend(reversed(children))
    return found


def parameters_of(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """{fqn: parameter} in the order of `named_parameters(remove_duplicate=False)`."""
    return {
        f"{name}.{own}" if name else own: parameter
        for name, module in modules.items()
        for own, parameter in module._parameters.items()
        if parameter is not None
    }


def buffers_of(modules: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """{fqn: buffer} in the order of `named_buffers(remove_duplicate=False)`."""
    return {
        f"{name}.{own}" if name else own: buffer
        for name, module in modules.items()
        for own, buffer in module._buffers.items()
        if buffer is not None
    }
