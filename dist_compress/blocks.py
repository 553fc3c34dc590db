"""Granularity: how a parameter is cut into what is decided as one, and back.

A list such as [4, 4] cuts the last dims into tiles; -1 stands for a whole dim. A list that is shorter than the
parameter has dims is filled up with 1 in front; `[[4], back, -1]` says otherwise. `element` is the block of one. `N:M`
keeps N of each M consecutive weights along the input dim.

    [4, 4]          on [8, 16]        -> 2 x 4 blocks of 16 weights
    [1, -1]         on [8, 16]        -> 8 rows
    [1, 1, -1, -1]  on [8, 16, 3, 3]  -> 128 filters of 9 weights
    [[1], back, -1] on [8, 16, 3, 3]  -> 8 blocks of 144 weights
    2:4             on [8, 16, 3, 3]  -> 2 of each 4 neighbours along dim 1 stay
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dist_compress.errors import UserError

Granularity = str | list[Any]
NAMES = ("default", "out_channel", "in_channel", "per_channel", "element")
CHANNELS_LAST = ("Linear", "Bilinear", "LayerNorm", "RMSNorm", "Embedding", "EmbeddingBag", "Conv1D")
CHANNELS_FIRST = (
    "Conv1d", "ConvTranspose1d", "BatchNorm", "SyncBatchNorm", "InstanceNorm", "GroupNorm", "MaxPool", "AvgPool",
    "AdaptiveMaxPool", "AdaptiveAvgPool", "LPPool", "Dropout1d", "PReLU", "Upsample",
)  # fmt: skip
OUT_DIM_1 = ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Embedding", "Conv1D")  # the last: transformers'


def parse(value: Any, key: str) -> Granularity:
    """The value of a `granularity` key, checked as far as the parameter does not matter. Raises UserError."""
    if isinstance(value, str) and (value in NAMES or (is_pattern(value) and 0 < int(value.split(":")[0]))):
        n, _, m = value.partition(":")
        if m and int(n) >= int(m):
            raise UserError(f"{key}={value!r}: N:M keeps N of each M weights, so N must be below M, as in '2:4'.")
        return value
    if isinstance(value, list) and value:
        kernel, mode, pad = value if isinstance(value[0], list) and len(value) == 3 else (value, "front", 1)
        if _is_kernel(kernel) and mode in ("front", "back") and _is_kernel([pad]):
            return value
    hint = " Quote it in YAML, which reads 2:4 as a number." if isinstance(value, int) else ""
    raise UserError(
        f"{key}={value!r}: allowed are {', '.join(NAMES)}, block sizes such as [4, 4] or [1, -1], "
        f"[sizes, front or back, padding] and N:M such as '2:4'.{hint}"
    )


def _is_kernel(value: Any) -> bool:
    """A list of sizes, each a positive integer or -1."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(k, int) and not isinstance(k, bool) and (k > 0 or k == -1) for k in value)


def is_pattern(granularity: Granularity) -> bool:
    return isinstance(granularity, str) and re.fullmatch(r"\d+:\d+", granularity) is not None


def channel_dim(kind: str, num_dims: int, granularity: str) -> int:
    """The dim of a parameter of a module of class `kind` that out_channel or in_channel is about."""
    out = int(kind in OUT_DIM_1 and num_dims > 1)
    return 1 - out if granularity == "in_channel" else out


def activation_dim(kind: str, num_dims: int) -> int:
    """The channel dim of what goes into or comes out of a module of class `kind`; dim 0 holds the samples.

    The last one for layers that work on it (Linear, LayerNorm, Embedding, ...), and for others if there are three, as
    in [samples, tokens, features]; dim 1 for convolutions, their norms and pools, and wherever else.
    """
    if kind in CHANNELS_LAST:
        return num_dims - 1
    return 2 if num_dims == 3 and not kind.startswith(CHANNELS_FIRST) else 1


@dataclass(frozen=True)
class Blocks:
    """A parameter of `shape` as `num` blocks of `sizes`, in the order in which they lie in the parameter.

    `last`: the dim that runs fastest instead of the last one (single weights only). `group`: so many consecutive
    blocks are decided together and owned by one rank.
    """

    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    last: int = -1
    group: int = 1

    @classmethod
    def of(cls, granularity: Granularity, shape: Sequence[int], kind: str, what: str) -> Blocks:
        """The blocks of a parameter of a module of class `kind`. `what` names target and key in messages."""
        if is_pattern(granularity):
            size = int(str(granularity).split(":")[1])
            dim = channel_dim(kind, len(shape), "in_channel")
            if len(shape) < 2:
                raise UserError(f"{what} goes along the input dim, which a parameter of one dimension does not have.")
            _check_divides(shape, dim, size, what)
            return cls(tuple(shape), (1,) * len(shape), dim, size)
        sizes = _sizes(granularity, len(shape), what)
        for dim, size in enumerate(sizes):
            if size > 0:
                _check_divides(shape, dim, size, what)
        return cls(tuple(shape), tuple(n if k == -1 else k for n, k in zip(shape, sizes, strict=True)))

    @classmethod
    def in_rows(cls, shape: Sequence[int], kind: str) -> Blocks:
        """Single weights of a layer of class `kind`, those of one output decided together."""
        dim = channel_dim(kind, len(shape), "in_channel")
        out = channel_dim(kind, len(shape), "out_channel")
        return cls(tuple(shape), (1,) * len(shape), dim, math.prod(shape) // shape[out])

    @property
    def num(self) -> int:
        return math.prod(self.shape) // self.size

    @property
    def size(self) -> int:
        """Weights of a block."""
        return math.prod(self.sizes)

    @property
    def slab(self) -> int:
        """Weights of the smallest contiguous part of the parameter that holds whole decisions. Slab i has the weights
        from i * slab on, and the i-th slab // size of the blocks."""
        return self.slabs(1).num * self.size

    def slabs(self, num: int) -> Blocks:
        """`num` consecutive slabs as a tensor of their own; it has as many of its own."""
        last = self.last % max(len(self.shape), 1)
        if last < len(self.shape) - 1:  # a pattern across what lies between
            return Blocks((num, *self.shape[last:]), (1,) * (len(self.shape) - last + 1), 1, self.group)
        cut = next((dim for dim, size in enumerate(self.sizes) if size > 1), last)  # before it lie whole slabs
        sizes = self.sizes[cut:] or (1,)
        return Blocks((num * sizes[0] * self.group, *self.shape[cut + 1 :]), sizes, -1, self.group)

    def covers_rows(self, dim: int) -> bool:
        """Each block is everything at some places of `dim`: what of a bias belongs to it is dead with it."""
        whole = [k == n for k, n in zip(self.sizes, self.shape, strict=True)]
        return len(self.shape) > 1 and all(w for d, w in enumerate(whole) if d != dim)

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """[num, weights of a block], a copy unless the blocks are single weights in their own order."""
        if self.size == 1:
            return tensor.movedim(self.last, -1).reshape(-1, 1)
        cut = tensor.reshape([x for n, k in zip(self.shape, self.sizes, strict=True) for x in (n // k, k)])
        dims = range(0, 2 * len(self.shape), 2)
        return cut.permute(*dims, *(d + 1 for d in dims)).reshape(self.num, self.size)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """[num] -> the shape of the parameter; the inverse of `rows` for what is equal inside of each block."""
        if self.size == 1:
            moved = list(self.shape or (1,))
            moved.append(moved.pop(self.last))
            return values.view(moved).movedim(-1, self.last).view(self.shape)
        grid = values.view([n // k for n, k in zip(self.shape, self.sizes, strict=True)])
        for dim, size in enumerate(self.sizes):
            grid = grid.repeat_interleave(size, dim)
        return grid


def _sizes(granularity: Granularity, num_dims: int, what: str) -> list[int]:
    if granularity == "element":
        return [1] * num_dims
    assert isinstance(granularity, list)
    kernel, mode, pad = granularity if isinstance(granularity[0], list) else (granularity, "front", 1)
    if len(kernel) > num_dims:
        raise UserError(f"{what} has {len(kernel)} sizes, but the parameter has {num_dims} dimensions.")
    padding = [pad] * (num_dims - len(kernel))
    return [*padding, *kernel] if mode == "front" else [*kernel, *padding]


def _check_divides(shape: Sequence[int], dim: int, size: int, what: str) -> None:
    if shape[dim] % size:
        raise UserError(f"{what}: dimension {dim} has size {shape[dim]}, which is no multiple of {size}.")
