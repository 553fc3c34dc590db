"""The global norm of gradients, with equal bits at any number of ranks and however they are spread over them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from dist_compress import comm
from dist_compress.layout import Layout


def total_norm(layout: Layout, names: Sequence[str], grads: Mapping[str, torch.Tensor]) -> float:
    """The L2 norm of all gradients together. Collective if any parameter is sharded: two, whatever their number.

    `names`: of all trained parameters, the same on every rank; `grads`: what this rank holds of their gradients. The
    squares of a tensor are added as integers, in units of its largest element: no order of summation shows. Infinite
    where a gradient is not finite.
    """
    device = comm.device()
    sharded = not all(layout.is_whole(name) for name in names)
    own = {name: grad for name, grad in grads.items() if grad.numel() and (not sharded or _counts(layout, name))}
    largest = torch.zeros(len(names), dtype=torch.float64, device=device)
    for i, name in enumerate(names):
        if name in own:
            largest[i] = own[name].detach().abs().max().double().nan_to_num(nan=math.inf)
    if sharded:
        comm.all_reduce(largest, "max")
    if not bool(largest.isfinite().all()):
        return math.inf
    exponents = torch.frexp(largest)[1].tolist()
    bits = [62 - max(layout.shape(name).numel() - 1, 0).bit_length() for name in names]
    sums = torch.zeros(len(names), dtype=torch.int64, device=device)
    for i, name in enumerate(names):
        if name in own:
            scaled = torch.ldexp(own[name].detach().double(), torch.tensor(-exponents[i], device=device))
            sums[i] = scaled.square_().mul_(2.0 ** bits[i]).round_().long().sum()
    if sharded:
        comm.all_reduce(sums)
    squares = [math.ldexp(n, 2 * e - b) for n, e, b in zip(sums.tolist(), exponents, bits, strict=True)]
    return math.sqrt(math.fsum(squares))


def _counts(layout: Layout, name: str) -> bool:
    """Whether this rank is the first of those that hold the same elements."""
    own = list(layout.runs(name, comm.rank()))
    return next(r for r in range(comm.world_size()) if list(layout.runs(name, r)) == own) == comm.rank()
