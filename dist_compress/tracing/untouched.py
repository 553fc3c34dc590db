"""The model as it is, whatever is run on it: what a look at a model puts back."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from dist_compress.tracing.walk import buffers_of, modules_of, parameters_of


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no fused attention, nothing compiled.

    Flags, buffers, RNG and attributes of modules that hold tensors (results that they keep) are restored at the end.
    """
    named = modules_of(model)
    modules = list(dict.fromkeys(named.values()))
    training = [module for module in modules if module.training]
    attributes = [vars(module).copy() for module in modules]
    buffers = [(buffer, buffer.detach().clone()) for buffer in buffers_of(named).values()]
    devices = {p.device.index for p in parameters_of(named).values() if p.device.type == "cuda"}
    try:
        for module in training:  # not model.eval(), which exported modules refuse
            module.training = False
        rng = torch.random.fork_rng(devices=[d for d in devices if d is not None])
        with rng, torch.no_grad(), plain_attention(), sdpa_kernel(SDPBackend.MATH), _eager(modules):
            yield
    finally:
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)
        for module in modules:
            if module.training:
                module.training = False
        for module in training:
            module.training = True
        for module, saved in zip(modules, attributes, strict=True):
            _restore_tensors(vars(module), saved)


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """nn.MultiheadAttention and the layers around it by their own operators, not by one fused kernel."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _restore_tensors(current: dict[str, Any], saved: dict[str, Any]) -> None:
    """Puts back what `current` has got since `saved` was copied from it, where that holds tensors."""
    if len(current) == len(saved) and all(map(operator.is_, current.values(), saved.values())):
        return
    for name, value in list(current.items()):
        if value is not saved.get(name) and any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value)):
            if name in saved:
                current[name] = saved[name]
            else:
                del current[name]


def _eager(modules: list[nn.Module]) -> contextlib.AbstractContextManager[Any]:
    compiled = (type(m).__name__ == "OptimizedModule" or m._compiled_call_impl is not None for m in modules)
    return torch.compiler.set_stance("force_eager") if any(compiled) else contextlib.nullcontext()
