"""Granularity: what of a tensor shares one scale. Frozen types; each says how it cuts a shape into blocks.

    type                        shape             scale shape
    PerTensor()                 [8, 16, 3, 3]     [1]
    PerChannel(dim=0)           [8, 16, 3, 3]     [8, 1, 1, 1]
    PerChannel(dim=1)           [32, 16, 7, 7]    [1, 16, 1, 1]
    PerGroup(size=4)            [8, 16]           [8, 4]         groups of 4 along the last dim
    PerToken()                  [2, 5, 16]        [2, 5, 1]      computed anew for each input
    PerBlock((4, 4))            [8, 16]           [2, 4]         tiles over the last dims
    PerBlock((1, -1))           [8, 16]           [8, 1]         -1: the whole dim

A scale has as many dims as its tensor, one entry for each block; that of a whole tensor fits any number of dims.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dist_compress.errors import UserError


@dataclass(frozen=True)
class Granularity:
    """The base: `sizes` of a block for a shape."""

    def sizes(self, shape: Sequence[int]) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def dynamic(self) -> bool:
        """The scale is computed from the tensor at hand, and nothing is observed."""
        return False

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(n // k for n, k in zip(shape, self.sizes(shape), strict=True))

    def check(self, shape: Sequence[int], what: str) -> None:
        """Raise UserError, which begins with `what`, unless the blocks fit into `shape`."""
        for dim, (n, k) in enumerate(zip(shape, self.sizes(shape), strict=True)):
            if n % k:
                raise UserError(
                    f"{what}: dimension {dim} has size {n}, which is no multiple of {k}. Choose a size that divides "
                    "it, or another granularity for this target."
                )


@dataclass(frozen=True)
class PerTensor(Granularity):
    def sizes(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape)

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (1,)


@dataclass(frozen=True)
class PerChannel(Granularity):
    dim: int

    def sizes(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(1 if d == self.dim % len(shape) else n for d, n in enumerate(shape))


@dataclass(frozen=True)
class PerGroup(Granularity):
    size: int

    def sizes(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (*(1 for _ in shape[:-1]), self.size)


@dataclass(frozen=True)
class PerToken(Granularity):
    @property
    def dynamic(self) -> bool:
        return True

    def sizes(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (*(1 for _ in shape[:-1]), shape[-1])


@dataclass(frozen=True)
class PerBlock(Granularity):
    block: tuple[int, ...]

    def sizes(self, shape: Sequence[int]) -> tuple[int, ...]:
        kernel = (*(1 for _ in range(len(shape) - len(self.block))), *self.block)
        return tuple(n if k == -1 else k for n, k in zip(shape, kernel, strict=True))


def rows(x: torch.Tensor, granularity: Granularity) -> torch.Tensor:
    """[blocks, elements of a block] of a tensor, the blocks in the order of the flattened scale."""
    sizes = granularity.sizes(x.shape)
    if math.prod(sizes) == x.numel():
        return x.reshape(1, -1)
    cut = x.reshape([v for n, k in zip(x.shape, sizes, strict=True) for v in (n // k, k)])
    dims = range(0, 2 * x.dim(), 2)
    return cut.permute(*dims, *(d + 1 for d in dims)).reshape(-1, math.prod(sizes))


def extent(x: torch.Tensor, granularity: Granularity) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value of each block, [blocks]. Nothing is moved, and of a whole tensor any memory format
    will do: torch.aminmax of `rows` takes 20 times as long."""
    sizes = granularity.sizes(x.shape)
    if math.prod(sizes) == x.numel():
        return x.amin().view(1), x.amax().view(1)
    cut = x.reshape([v for n, k in zip(x.shape, sizes, strict=True) for v in (n // k, k)])
    within = tuple(range(1, 2 * x.dim(), 2))
    return cut.amin(within).flatten(), cut.amax(within).flatten()


def spread(scale: torch.Tensor, shape: Sequence[int], granularity: Granularity) -> torch.Tensor:
    """The scale, of the shape `scale_shape`, in a shape that broadcasts to the tensor's."""
    if scale.shape == (1,):
        return scale
    for dim, (n, k) in enumerate(zip(shape, granularity.sizes(shape), strict=True)):
        if k not in (1, n):
            scale = scale.repeat_interleave(k, dim)
    return scale


def block_numbers(shape: Sequence[int], granularity: Granularity) -> torch.Tensor:
    """int32, of `shape` (expanded): the block that each element is in, counted as in the flattened scale."""
    scale_shape = granularity.scale_shape(shape)
    numbers = torch.arange(math.prod(scale_shape), dtype=torch.int32).view(scale_shape)
    return spread(numbers, shape, granularity).expand(tuple(shape))


def carried(values: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """[blocks] of a tensor that was cut, from `values`, an entry for each block that it had. `members`: int64 [blocks,
    elements of one], the block that each element was in. Where these were several, a mean; what is no floating point
    number, of the first of them."""
    values = values.flatten()
    first = values[members[:, 0]]
    if not values.is_floating_point() or not bool((several := mixed(members)).any()):
        return first
    return torch.where(several, values.double()[members].mean(1).to(values.dtype), first)


def mixed(members: torch.Tensor) -> torch.Tensor:
    """bool [blocks]: the elements of a block come from several."""
    return (members != members[:, :1]).any(1)
