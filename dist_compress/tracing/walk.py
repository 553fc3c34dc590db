"""The modules of a model and what they hold, by all their names: as `named_modules` and the like, in less time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """{fqn: module} in the order of `named_modules(remove_duplicate=False)`."""
    found = {"": model}
    _add_children(model, "", found)
    return found


def _add_children(module: nn.Module, prefix: str, found: dict[str, nn.Module]) -> None:
    for own, child in module._modules.items():
        if child is not None:
            name = prefix + own
            found[name] = child
            if child._modules:
                _add_children(child, name + ".", found)


def each_module(model: nn.Module) -> dict[nn.Module, str]:
    """{module: its first fqn} in the order of `named_modules()`."""
    found: dict[nn.Module, str] = {}
    for name, module in modules_of(model).items():
        found.setdefault(module, name)
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
