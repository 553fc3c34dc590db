"""Brings parts of tensors that lie scattered over the ranks to the ranks that want them, in one collective.

Who holds what and who wants what is known to every rank, so nothing is sent but the elements themselves, and nothing
at all when every rank holds what it wants.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from dist_compress import comm
from dist_compress.layout import Run


@dataclass(frozen=True)
class Span:
    """Elements [start, end) of the tensor `name`, flattened."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Segment:
    """Elements [start, end) of a tensor and all ranks that hold them."""

    start: int
    end: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class _Held:
    """The runs of this rank by their first elements, and where each lies in the local tensor."""

    firsts: list[int]
    offsets: list[int]

    @classmethod
    def of(cls, runs: Sequence[Run]) -> _Held:
        offsets = accumulate((length for _, length in runs), initial=0)
        pairs = sorted((first, offset) for (first, _), offset in zip(runs, offsets, strict=False))
        return cls([first for first, _ in pairs], [offset for _, offset in pairs])

    def cut(self, flat: torch.Tensor, part: Span) -> torch.Tensor:
        """A view of a part, which lies in one run."""
        number = bisect_right(self.firsts, part.start) - 1
        start = self.offsets[number] + part.start - self.firsts[number]
        return flat[start : start + part.end - part.start]


class Exchange:
    """Built alike on every rank; building it is local."""

    def __init__(self, holdings: Mapping[str, Sequence[Sequence[Run]]], wants: Sequence[Sequence[Span]]) -> None:
        """`holdings`: for each tensor the runs of every rank, which together cover it. `wants[r]`: of rank r."""
        me, self.size = comm.rank(), len(wants)
        self.wants = list(wants[me])
        self.gives: list[list[Span]] = [[] for _ in wants]  # to each rank, this one included
        self.takes: list[list[tuple[int, Span]]] = [[] for _ in wants]  # from each rank: (number of the want, part)
        self.moves = False  # whether anything goes from one rank to another; the same on every rank
        self._held = {name: _Held.of(runs[me]) for name, runs in holdings.items()}
        segments = {name: segments_of(runs) for name, runs in holdings.items()}
        for rank, spans in enumerate(wants):
            for number, span in enumerate(spans):
                for segment in within(segments[span.name], span.start, span.end):
                    part = Span(span.name, segment.start, segment.end)
                    giver = rank if rank in segment.ranks else segment.ranks[0]
                    self.moves |= giver != rank
                    if giver == me:
                        self.gives[rank].append(part)
                    if rank == me:
                        self.takes[giver].append((number, part))

    def pick(self, read: Callable[[str], torch.Tensor], names: Callable[[str], bool] = lambda name: True) -> Picked:
        """Views of all parts that this rank gives of the tensors `names` is true for. Local.

        `read(name)`: what this rank holds of a tensor, flat, in the order of its runs.
        """
        parts: dict[str, dict[Span, None]] = {}
        for part in [part for parts in self.gives for part in parts if names(part.name)]:
            parts.setdefault(part.name, {})[part] = None
        picked = {}
        for name, mine in parts.items():
            flat = read(name)
            picked |= {part: self._held[name].cut(flat, part) for part in mine}
        return picked

    def move(self, picked: Picked, like: Callable[[str], torch.Tensor], packed: bool = False) -> list[torch.Tensor]:
        """What this rank wants, flat. Collective unless nothing moves.

        `like(name)` has the dtype and device of a tensor; `packed`: they are bool and travel as bits.
        """
        me = comm.rank()
        received: list[list[torch.Tensor]] = [[] for _ in range(self.size)]
        received[me] = [picked[part] for _, part in self.takes[me]]
        if self.moves:
            send = [[picked[p] for p in parts] if r != me else [] for r, parts in enumerate(self.gives)]
            take = [[p for _, p in parts] if r != me else [] for r, parts in enumerate(self.takes)]
            kinds = [[(p.end - p.start, like(p.name)) for p in parts] for parts in take]
            device = next((t.device for parts in send for t in parts), comm.device())
            coded = [_encode(parts, packed, device) for parts in send]
            got = comm.all_to_all(coded, [_num_bytes(parts, packed) for parts in kinds])
            for rank in range(self.size):
                if rank != me:
                    received[rank] = _decode(got[rank], kinds[rank], packed)
        parts: list[list[tuple[int, torch.Tensor]]] = [[] for _ in self.wants]
        for takes, tensors in zip(self.takes, received, strict=True):
            for (number, part), tensor in zip(takes, tensors, strict=True):
                parts[number].append((part.start, tensor))
        return [_joined(found, like(span.name)) for span, found in zip(self.wants, parts, strict=True)]


Picked = dict[Span, torch.Tensor]


def segments_of(holdings: Sequence[Sequence[Run]]) -> list[Segment]:
    """A tensor cut where its holders change, in order."""
    events: dict[int, list[tuple[int, bool]]] = {}
    for rank, runs in enumerate(holdings):
        for first, length in runs:
            if length:
                events.setdefault(first, []).append((rank, True))
                events.setdefault(first + length, []).append((rank, False))
    places = sorted(events)
    found: list[Segment] = []
    holders: set[int] = set()
    for start, end in zip(places, places[1:], strict=False):
        for rank, begins in sorted(events[start], key=lambda event: event[1]):  # those that end, first
            (holders.add if begins else holders.discard)(rank)
        assert holders, f"nobody holds elements {start} to {end}"
        found.append(Segment(start, end, tuple(sorted(holders))))
    return found


def within(segments: Sequence[Segment], start: int, end: int) -> list[Segment]:
    """The segments, in order, cut to [start, end)."""
    found = []
    for number in range(max(bisect_right(segments, start, key=lambda s: s.start) - 1, 0), len(segments)):
        segment = segments[number]
        if segment.start >= end:
            break
        low, high = max(segment.start, start), min(segment.end, end)
        if low < high:
            found.append(Segment(low, high, segment.ranks))
    return found


def _joined(parts: list[tuple[int, torch.Tensor]], like: torch.Tensor) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0][1]
    ordered = [tensor for _, tensor in sorted(parts, key=lambda item: item[0])]
    return torch.cat(ordered) if ordered else like.new_empty(0)


def _encode(tensors: Sequence[torch.Tensor], packed: bool, device: torch.device) -> torch.Tensor:
    if packed:
        return pack(torch.cat([torch.zeros(0, dtype=torch.bool, device=device), *tensors]))
    raw = [t.contiguous().view(torch.uint8) for t in tensors if len(t)]
    return torch.cat([torch.zeros(0, dtype=torch.uint8, device=device), *raw])


def _num_bytes(kinds: Sequence[tuple[int, torch.Tensor]], packed: bool) -> int:
    if packed:
        return -(-sum(count for count, _ in kinds) // 8)
    return sum(count * like.element_size() for count, like in kinds)


def _decode(raw: torch.Tensor, kinds: Sequence[tuple[int, torch.Tensor]], packed: bool) -> list[torch.Tensor]:
    if packed:
        return list(unpack(raw, sum(count for count, _ in kinds)).split([count for count, _ in kinds]))
    parts = raw.split([count * like.element_size() for count, like in kinds])
    return [part.clone().view(like.dtype) for part, (_, like) in zip(parts, kinds, strict=True)]


def pack(bits: torch.Tensor) -> torch.Tensor:
    """bool [n] -> uint8 [ceil(n / 8)], the first bit lowest."""
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=bits.device)
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8))
    return (padded.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, num: int) -> torch.Tensor:
    """The inverse of `pack`."""
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed[:, None] & weights).ne(0).flatten()[:num]
