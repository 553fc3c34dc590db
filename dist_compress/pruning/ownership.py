"""Which rank decides what. Every block of weights and every set of units is decided by one rank, its owner.

Where every rank holds a whole parameter, each owns an equal share of it. Where it is sharded, the owner is who holds
the weights, so that next to nothing moves; where a row of blocks or a pattern straddles ranks, one of those that hold a
part of it. All of it is arithmetic on the layout: the same answer on every rank, and no communication.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dist_compress import comm
from dist_compress.blocks import Blocks
from dist_compress.exchange import segments_of, within
from dist_compress.layout import Layout, Run
from dist_compress.target import Member


@dataclass(frozen=True)
class Shares:
    """Of one tensor of blocks, in slabs (see `Blocks.slab`): (first, number) of them, for every rank."""

    owned: list[list[Run]]
    held: list[list[Run]]  # of which the rank holds any weight; what it owns is among them


def shares(blocks: Blocks, name: str, turn: int, layout: Layout) -> Shares:
    """`turn`: number of the tensor; ranks take turns with what cannot be divided."""
    slab, holdings = blocks.slab, layout.holdings(name)
    size, num = len(holdings), blocks.num * blocks.size // slab
    if layout.is_whole(name):
        owned: list[list[Run]] = [[] for _ in range(size)]
        for i in range(size):
            start, end = num * i // size, num * (i + 1) // size
            owned[(i + turn) % size] += [(start, end - start)] * (end > start)
        return Shares(owned, [[(0, num)] for _ in range(size)])
    segments = segments_of(holdings)
    owned = [[] for _ in range(size)]
    done = 0  # slabs that have an owner
    for i, segment in enumerate(segments):
        if -(-segment.start // slab) > done:  # one that began before this segment
            ranks = {r for s in within(segments, done * slab, (done + 1) * slab) for r in s.ranks}
            owned[sorted(ranks)[(done + turn) % len(ranks)]].append((done, 1))
            done += 1
        if segment.end // slab > done:
            owned[segment.ranks[(i + turn) % len(segment.ranks)]].append((done, segment.end // slab - done))
            done = segment.end // slab
    assert done == num
    return Shares(owned, [_joined([(a // slab, -(-(a + n) // slab)) for a, n in runs if n]) for runs in holdings])


def _joined(ranges: Sequence[tuple[int, int]]) -> list[Run]:
    """Runs of the union of ranges [start, end), in order."""
    out: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return [(start, end - start) for start, end in out]


def balanced(weights: Mapping[int, int], num_ranks: int) -> dict[int, int]:
    """An owner for each key: the heaviest first, each to the rank that has least so far."""
    load = [0] * num_ranks
    owner = {}
    for key in sorted(weights, key=lambda k: (-weights[k], k)):
        owner[key] = min(range(num_ranks), key=lambda r: (load[r], r))
        load[owner[key]] += weights[key]
    return owner


def local_member(layout: Layout, member: Member) -> Member | None:
    """A member by the places of its parameter as this rank holds it, one by one; None for a sharded matrix. Local."""
    if layout.is_whole(member.fqn):
        return member
    if len(layout.shape(member.fqn)) != 1:
        return None
    at, places = 0, []
    index = member.index.flatten()
    for first, length in layout.runs(member.fqn, comm.rank()):
        places.append(index[(index >= first) & (index < first + length)] - first + at)
        at += length
    return Member(member.fqn, 0, torch.cat([index[:0], *places])[:, None], member.role)
