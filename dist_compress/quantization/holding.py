"""What one rank holds of a sharded parameter, and how the blocks that share a scale lie in it.

Scales are whole on every rank; what a rank holds may be rows, runs that begin and end inside a row, or nothing. Here a
scale is cut to it, and extents and sums over blocks are taken as far as this rank sees them: the maximum, or the sum,
over the ranks is that of the block. An element that several ranks hold is summed by the first of them.

Extents have no order. A sum has the bits it has on one rank if all of its block is held by one rank and consecutive
there, else those up to the rounding of float64 (of float32 numbers of one size, a few thousand have an exact sum).
Everything is local.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from dist_compress import comm
from dist_compress.exchange import segments_of, within
from dist_compress.layout import Layout
from dist_compress.quantization.granularity import Granularity, block_numbers, spread


@dataclass(frozen=True)
class _Piece:
    """Elements one after the other: of `num` blocks from `block` on, `width` each."""

    start: int  # in what this rank holds, flattened
    block: int
    num: int
    width: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """[num, width], a view."""
        return flat[self.start : self.start + self.num * self.width].view(self.num, self.width)

    @property
    def blocks(self) -> slice:
        return slice(self.block, self.block + self.num)


class Holding:
    """Of the parameter `name`, for as long as the model is wrapped as it is."""

    def __init__(self, layout: Layout, name: str, granularity: Granularity) -> None:
        self.layout, self.name, self.granularity = layout, name, granularity
        self.shape, me = layout.shape(name), comm.rank()
        self.num_blocks = math.prod(granularity.scale_shape(self.shape))
        runs = [(first, length) for first, length in layout.runs(name, me) if length]
        self.rows = _rows(layout.local(name).shape, self.shape, runs)
        size = _consecutive(granularity.sizes(self.shape), self.shape)
        segments, at = segments_of(layout.holdings(name)), 0
        held, counted = [], []  # (place in the local tensor, first element, number of elements)
        for first, length in runs:
            held.append((at, first, length))
            mine = [(s.start, s.end) for s in within(segments, first, first + length) if s.ranks[0] == me]
            counted += [(at + start - first, start, end - start) for start, end in _joined(mine)]
            at += length
        self.counted = counted
        self.pieces = None if size is None else _pieces(held, size)
        self.summed = None if size is None else _pieces(counted, size)

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of a tensor that broadcasts to the whole parameter what broadcasts to what this rank holds."""
        if tensor.numel() == 1:
            return tensor.reshape(1)
        if self.rows and tensor.dim() == len(self.shape):
            return tensor[slice(*self.rows)] if len(tensor) > 1 else tensor
        return self.layout.part(self.name, tensor)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Of a scale, in the shape of all scales, what broadcasts to what this rank holds."""
        if values.numel() > 1 and self.rows and len(values) == self.shape[0]:
            shape = (self.rows[1] - self.rows[0], *self.shape[1:])
            return spread(values[slice(*self.rows)], shape, self.granularity)
        if values.numel() > 1 and self.pieces is not None:
            flat = values.reshape(-1)
            parts = [flat[piece.blocks].repeat_interleave(piece.width) for piece in self.pieces]
            return torch.cat([flat[:0], *parts]).view(self.layout.local(self.name).shape)
        return self.cut(spread(values, self.shape, self.granularity))

    def extent(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Smallest and largest value of each block, [blocks], of a tensor in the shape of what this rank holds; inf and
        -inf where it holds nothing."""
        flat = x.reshape(-1)
        low, high = (flat.new_full((self.num_blocks,), v) for v in (math.inf, -math.inf))
        if self.pieces is None:
            numbers = self._numbers()
            return low.scatter_reduce(0, numbers, flat, "amin"), high.scatter_reduce(0, numbers, flat, "amax")
        for piece in self.pieces:
            rows, here = piece.of(flat), piece.blocks
            low[here], high[here] = torch.minimum(low[here], rows.amin(1)), torch.maximum(high[here], rows.amax(1))
        return low, high

    def sums(self, x: torch.Tensor) -> torch.Tensor:
        """float64 [blocks] of what this rank has to count."""
        flat = x.reshape(-1)
        out = torch.zeros(self.num_blocks, dtype=torch.float64, device=flat.device)
        if self.summed is None:
            numbers = self._numbers()
            for start, _, length in self.counted:
                here = slice(start, start + length)
                out.index_add_(0, numbers[here], flat[here].double())
            return out
        for piece in self.summed:
            out[piece.blocks] += piece.of(flat).double().sum(1)
        return out

    def _numbers(self) -> torch.Tensor:
        """int64: the block of each element that this rank holds."""
        numbers = block_numbers(self.shape, self.granularity)
        return self.layout.part(self.name, numbers).reshape(-1).long().to(self.layout.local(self.name).device)


def _rows(local: Sequence[int], shape: Sequence[int], runs: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Which rows of the parameter the local tensor is, if it is rows."""
    if len(local) != len(shape) or tuple(local[1:]) != tuple(shape[1:]) or len(runs) > 1:
        return None
    start = runs[0][0] // math.prod(shape[1:]) if runs else 0
    return start, start + local[0]


def _consecutive(sizes: Sequence[int], shape: Sequence[int]) -> int | None:
    """The number of elements of a block, if these follow each other in every block."""
    cut = next((d for d, size in enumerate(sizes) if size > 1), len(sizes))
    return math.prod(sizes) if tuple(sizes[cut + 1 :]) == tuple(shape[cut + 1 :]) else None


def _pieces(runs: Iterable[tuple[int, int, int]], size: int) -> list[_Piece]:
    found = []
    for start, first, length in runs:
        end = first + length
        while first < end:
            block, inside = divmod(first, size)
            whole = (end - first) // size if inside == 0 else 0
            piece = _Piece(start, block, max(whole, 1), size if whole else min(size - inside, end - first))
            found.append(piece)
            start, first = start + piece.num * piece.width, first + piece.num * piece.width
    return found


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges [start, end) in order, those that touch as one."""
    out: list[tuple[int, int]] = []
    for start, end in ranges:
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], end)
        else:
            out.append((start, end))
    return out
