"""A model whose parameters have no values, not yet or not any more, runs all the same.

What comes of weights has a shape and a type, on the meta device; all else is computed: positions, masks, whatever code
looks at that no weight has made.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_map_only


def weightless(model: nn.Module, device: torch.device | str = "cpu") -> contextlib.AbstractContextManager[Any]:
    """Inside, `model` can be called if its parameters are meta tensors. Nothing changes for one that has values. Local.

    `device`: of what it is called with.
    """
    return _Weightless(device) if is_weightless(model) else contextlib.nullcontext()


def is_weightless(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


class _Weightless(TorchDispatchMode):
    def __init__(self, device: torch.device | str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if tree_any(lambda leaf: isinstance(leaf, torch.Tensor) and leaf.is_meta, (args, kwargs)):
            args, kwargs = tree_map_only(torch.Tensor, lambda t: t if t.is_meta else t.to("meta"), (args, kwargs))
            if kwargs.get("device") is not None:
                kwargs["device"] = torch.device("meta")
        elif _names_meta(kwargs) and not _says_nothing(func, kwargs):
            kwargs["device"] = torch.device(self.device)  # it goes to where the weights are, but is not made of them
        return func(*args, **kwargs)


def _says_nothing(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether it makes a tensor of no values, or of zeros, which a recurrent layer begins with: their device must be
    that of its input."""
    real = (kwargs.get("dtype") or torch.float32).is_floating_point
    return func in _EMPTY or func is torch.ops.aten.zeros.default and real


_EMPTY = (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default)


def _names_meta(kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "meta"
