"""Which slices of sharded parameters are all zeros: what a plan is made of, without any rank holding a parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dist_compress import comm
from dist_compress.layout import Layout, Run

_CHUNK = 1 << 22  # elements looked at at once


@torch.no_grad()
def slice_masks(layout: Layout, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """{parameter: bool on the CPU, False in every slice along a dim that is all zeros, of size 1 along the others}, for
    those that have such slices. Collective: one, whatever the number of parameters; the same on every rank."""
    found = [_nonzero(layout, name) for name in names]
    flat = comm.all_reduce(torch.cat([torch.zeros(1, dtype=torch.uint8, device=comm.device()), *found]), "max")[1:]
    masks = {}
    for name, vector in zip(names, flat.cpu().bool().split([len(v) for v in found]), strict=True):
        shape = layout.shape(name)
        dims = vector.split(list(shape))
        mask = torch.ones([1] * len(shape), dtype=torch.bool)
        for d, some in enumerate(dims):
            if not bool(some.all()):
                mask = mask & some.view([-1 if e == d else 1 for e in range(len(shape))])
        if not bool(mask.all()):
            masks[name] = mask
    return masks


def _nonzero(layout: Layout, name: str) -> torch.Tensor:
    """uint8 [sum of the sizes of all dims]: where this rank holds anything but zeros. Local."""
    shape, local = layout.shape(name), layout.local(name).reshape(-1)
    dims = [torch.zeros(size, dtype=torch.uint8, device=local.device) for size in shape]
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    at = 0
    for first, length in _chunks(layout.runs(name, comm.rank())):
        places = local[at : at + length].nonzero().flatten() + first
        for vector, stride in zip(dims, strides, strict=True):
            vector[(places // stride) % len(vector)] = 1
        at += length
    return torch.cat([local.new_zeros(0, dtype=torch.uint8), *dims])


def _chunks(runs: Sequence[Run]) -> list[Run]:
    return [(at, min(_CHUNK, first + n - at)) for first, n in runs for at in range(first, first + n, _CHUNK)]
