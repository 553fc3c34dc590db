"""Inputs nobody has planned with: the example shuffled, and the same in another batch size."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from dist_compress.tracing.untouched import untouched

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def variants(inputs: Inputs, seed: int = 0) -> Iterator[tuple[str, Inputs]]:
    """(what it is, args and kwargs): the example, two fresh inputs like it, and one of another batch size. Local.

    A model may refuse any but the first: shuffled boxes are no boxes, and a program may hold its batch size.
    """
    generator = torch.Generator().manual_seed(seed)
    yield "the example", inputs
    for _ in range(2):
        yield "fresh values", redrawn(inputs, generator)
    sizes = [leaf.shape[0] for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    if sizes:
        yield f"batch size {sizes[0] + 2}", redrawn(with_batch(inputs, sizes[0] + 2), generator)


def redrawn(inputs: Any, generator: torch.Generator) -> Any:
    """Every tensor of a nest with its values in another order, so that they stay in their range.

    A constant float tensor gets noise. As they are: bool tensors, floats that are not all finite (masks that are added
    to scores), integers that are all 0 or 1 (masks, types of tokens).
    """

    def redraw(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.is_meta or leaf.numel() < 2 or leaf.dtype == torch.bool:
            return leaf
        if leaf.is_floating_point():
            if not bool(leaf.isfinite().all()):
                return leaf
            if bool((leaf == leaf.flatten()[0]).all()):
                return leaf + torch.randn(leaf.shape, generator=generator).to(leaf)
        elif bool(((leaf == 0) | (leaf == 1)).all()):
            return leaf
        order = torch.randperm(leaf.numel(), generator=generator).to(leaf.device)
        return leaf.detach().flatten()[order].view(leaf.shape)

    return tree_map(redraw, inputs)


def with_batch(inputs: Any, size: int) -> Any:
    """Every tensor of a nest whose dim 0 is that of the first one, with `size` samples, repeated or dropped."""
    sizes = [leaf.shape[0] for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.dim()]

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.dim() == 0 or leaf.shape[0] != sizes[0]:
            return leaf
        return leaf[torch.arange(size, device=leaf.device) % sizes[0]]

    return tree_map(resize, inputs)


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    """Every floating point tensor of a nest in `dtype`."""

    def convert(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    return tree_map(convert, inputs)


def run(model: nn.Module, inputs: Inputs) -> Any:
    """The output in evaluation mode; what draws random numbers draws the same every time. Caches among the inputs are
    copied first; the model, its buffers and the random state stay as they were. Local."""
    args, kwargs = copy.deepcopy(inputs)
    with untouched(model):
        torch.manual_seed(0)
        return model(*args, **kwargs)
