"""What a model answers to fresh inputs: how masked and shrunk model are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from dist_compress.speedup import verify
from dist_compress.speedup.cost import resize_batch

SIZES = (2, 5)  # of a batch


def probes(example: Any, seed: int) -> list[Any]:
    """Calls of a model: `example(size)`, on held-out samples, and noise like them, at two sizes of a batch. Local, the
    same on every rank."""
    generator, found = torch.Generator().manual_seed(seed), []
    for size in SIZES:
        real = example(size)
        found += [real, _noise_like(resize_batch(real, size), generator)]
    return found


@torch.no_grad()
def answers(model: nn.Module, calls: Sequence[Any]) -> list[Any]:
    """In evaluation mode. Collective if the model is sharded."""
    training = model.training
    model.eval()
    try:
        return [model(*args, **kwargs) for args, kwargs in calls]
    finally:
        model.train(training)


def difference(before: Sequence[Any], after: Sequence[Any]) -> float:
    """The largest max|after - before| / max|before|. Local."""
    return max(verify(a, b) for a, b in zip(before, after, strict=True))


def _noise_like(inputs: Any, generator: torch.Generator) -> Any:
    """Normal noise for every floating point tensor of a nest; everything else as it is."""

    def noise(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            return leaf
        return torch.randn(leaf.shape, generator=generator).to(leaf)

    return tree_map(noise, inputs)
