"""A call of a model as data: its example moved and cut, its outputs as named tensors. Everything is local."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from dist_compress.sites import items

Call = tuple[tuple[Any, ...], dict[str, Any]]  # (args, kwargs)
OUTPUT = "output"  # the name of an output that is one tensor


def moved(example: Any, device: torch.device | str) -> Call:
    args, kwargs = example
    move = lambda x: x.to(device) if isinstance(x, torch.Tensor) else x  # noqa: E731
    return tree_map(move, tuple(args)), tree_map(move, dict(kwargs or {}))


def chunks(call: Call, size: int) -> Iterator[Call]:
    """The samples of a call, `size` at a time: tensors have them in dim 0, scalars go along."""
    num = next(leaf.shape[0] for leaf in tree_leaves(call) if isinstance(leaf, torch.Tensor) and leaf.dim())

    for first in range(0, num, size):
        cut = lambda x, i=first: x[i : i + size] if isinstance(x, torch.Tensor) and x.dim() else x  # noqa: E731
        yield tree_map(cut, call)


def named(output: Any) -> dict[str, torch.Tensor]:
    """The tensors of an output: {"output": tensor}, {"logits": ..., "hidden_states.0": ...}; what is no tensor, such
    as a cache, is left out."""
    if isinstance(output, torch.Tensor):
        return {OUTPUT: output}
    found: dict[str, torch.Tensor] = {}
    for key, value in items(output):
        tensors = named(value)
        found |= {key if name == OUTPUT else f"{key}.{name}": tensor for name, tensor in tensors.items()}
    return found


def outputs(model: nn.Module, call: Call) -> dict[str, torch.Tensor]:
    """What the model puts out in evaluation mode, on the CPU; the call is moved to where the model is."""
    args, kwargs = moved(call, next((p.device for p in model.parameters()), torch.device("cpu")))
    training = model.training
    try:
        with torch.no_grad():
            return {name: tensor.cpu() for name, tensor in named(model.eval()(*args, **kwargs)).items()}
    finally:
        model.train(training)


def main_output(tensors: Mapping[str, torch.Tensor]) -> str:
    """The name of the output that is compared by its largest entry."""
    return "logits" if "logits" in tensors else next(iter(tensors))
