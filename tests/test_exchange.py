"""Every rank gets exactly what it wants, from whoever holds it, in one collective or none."""

from __future__ import annotations

import pytest
import torch
from sharded_nets import dealt

from dist_compress import comm
from dist_compress.exchange import Exchange, Segment, Span, pack, segments_of, unpack, within

SIZES = {"a": 97, "b": 13, "c": 1, "bits": 50}


def value(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(name) + SIZES[name])
    if name == "bits":
        return torch.rand(50, generator=generator) > 0.5
    return torch.randn(SIZES[name], generator=generator).to(torch.bfloat16 if name == "b" else torch.float32)


def wanted(rank: int, size: int, names: tuple[str, ...]) -> list[Span]:
    spans = [Span(name, SIZES[name] * rank // size, SIZES[name] * (rank + 1) // size) for name in names]
    return [*spans, Span(names[0], 0, SIZES[names[0]])] if rank == size - 1 else spans  # one wants all of it, too


def moved(names: tuple[str, ...], replicated: bool) -> tuple[bool, dict[str, int], int]:
    size, me = comm.world_size(), comm.rank()
    holdings = {
        name: [[(0, SIZES[name])] if replicated else dealt(SIZES[name], 13, r, size) for r in range(size)]
        for name in names
    }

    def read(name: str) -> torch.Tensor:
        return torch.cat([value(name)[:0], *(value(name)[a : a + n] for a, n in holdings[name][me])])

    exchange = Exchange(holdings, [wanted(r, size, names) for r in range(size)])
    comm.calls.clear()
    sent = []
    original = comm.all_to_all
    comm.all_to_all = lambda send, receive: (sent.append(sum(len(t) for t in send)), original(send, receive))[1]
    try:
        found = exchange.move(exchange.pick(read), read, packed=names == ("bits",))
    finally:
        comm.all_to_all = original
    right = all(
        torch.equal(t, value(s.name)[s.start : s.end]) and t.dtype == value(s.name).dtype
        for s, t in zip(exchange.wants, found, strict=True)
    )
    return right and len(found) == len(exchange.wants), dict(comm.calls), sum(sent)


@pytest.mark.parametrize("names", [("a", "b", "c"), ("bits",)])
def test_everyone_gets_what_it_wants(ranks, names):
    for size in (1, 2, 3, 4):
        for right, calls, sent in ranks(size, moved, names, False):
            assert right and calls == ({"all_to_all": 1} if size > 1 else {})
            assert names != ("bits",) or sent <= 50 * 2 // 8 + size


def test_nothing_is_sent_where_everyone_holds_everything(ranks):
    for size in (1, 3):
        for right, calls, _ in ranks(size, moved, ("a", "b", "c"), True):
            assert right and calls == {}


def test_segments_change_where_holders_change():
    found = segments_of([[(0, 4), (8, 2)], [(4, 4)], [(2, 4), (3, 0)], []])
    assert found == [Segment(0, 2, (0,)), Segment(2, 4, (0, 2)), Segment(4, 6, (1, 2)), Segment(6, 8, (1,))] + [
        Segment(8, 10, (0,))
    ]
    assert within(found, 3, 7) == [Segment(3, 4, (0, 2)), Segment(4, 6, (1, 2)), Segment(6, 7, (1,))]
    assert within(found, 4, 4) == []
    with pytest.raises(AssertionError, match="nobody holds elements 2 to 3"):
        segments_of([[(0, 2)], [(3, 1)]])


def test_bits_survive_packing():
    for num in (0, 1, 8, 17, 1000):
        bits = torch.arange(num) % 3 == 0
        assert len(pack(bits)) == -(-num // 8) and torch.equal(unpack(pack(bits), num), bits)
