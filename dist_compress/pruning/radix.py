"""The strict order of all elements, and the walk to the places in it that queries ask for.

    (score bits, 15 hash bits of the global index, global index), ascending

Radix select walks this order digit by digit, 11 + 11 + 10 bits of the float pattern. A pass costs one int64 all-reduce
for all queries together; sums of integers have no order, so the result has equal bits at any number of ranks. A query
ends when a bin is used up exactly, usually within these 3 passes. What then still ties at the last score is gathered,
at most GATHERED elements in one collective; more are first thinned by further digits of the tie key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from dist_compress import comm
from dist_compress.hashing import splitmix64

SCORE_DIGITS = (11, 11, 10)
HASH_BITS, INDEX_BITS = 15, 48
TIE_DIGIT = 11
GATHERED = 65_536
LOWEST = -(2**31)
REMOVED = LOWEST + 0x007FFFFF  # the key of -inf
KEPT = LOWEST + 0xFF800000  # the key of +inf
ALL = 2**62  # more than any cost
PIECE = 2**17  # elements that a CPU works on at a time: what is computed of them on the way stays in its cache


def pieces(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """A tensor [n], cut for a CPU; whole for anything else."""
    return tensor.split(PIECE) if tensor.device.type == "cpu" else (tensor,)


def score_key(scores: torch.Tensor) -> torch.Tensor:
    """float32 [n] -> int32 [n] in the same order; -0 equals +0."""
    scores = scores.float().contiguous()
    keys = torch.empty_like(scores, dtype=torch.int32)
    for score, key in zip(pieces(scores), pieces(keys), strict=True):
        bits = (score + 0.0).view(torch.int32)
        torch.bitwise_xor(bits, (bits >> 31) & 0x7FFFFFFF, out=key)
    return keys


def tie_key(index: torch.Tensor) -> torch.Tensor:
    """Global index int64 [n] -> 15 hash bits above the index: equal scores go all over the model, not from
    its start."""
    return ((splitmix64(index) & (2**HASH_BITS - 1)) << INDEX_BITS) | index


@dataclass
class Row:
    """Elements of a query that are counted together, whose cost counts from `low` to `high` at the most."""

    low: int = 0
    high: int = ALL
    below: int = 0  # their cost in the order before the prefix found so far

    def counted(self, cost: torch.Tensor) -> torch.Tensor:
        return cost.clamp(self.low, self.high)


@dataclass
class Part:
    """This rank's elements of one row that have the same cost."""

    row: int
    cost: int
    bases: list[int]  # global index of the first element of each tensor of keys
    keys: list[torch.Tensor]  # int32
    alive: torch.Tensor  # keys, later tie keys, of the elements that share the prefix found so far


@dataclass
class Query:
    """Find the first element of the order at which what is counted of all elements up to it reaches `need`. All but
    `parts` is the same on every rank."""

    parts: list[Part]
    rows: list[Row] = field(default_factory=lambda: [Row()])
    unit: int = 1  # divides every cost
    need: int = 0
    done: bool = False
    limit: tuple[int, int] = (LOWEST, -1)  # the element that was found and all before it have (key, tie) <= limit
    prefix: int = 0
    num_ties: int = 0  # at most so many elements of all ranks share the prefix

    def ask(self, need: int) -> None:
        """`need` is rounded up to what costs can add up to, so that a bin may be used up exactly."""
        self.need = -(-need // self.unit) * self.unit
        self.done = self.need <= sum(row.low for row in self.rows)

    def counted_below(self) -> int:
        return sum(min(max(row.below, row.low), row.high) for row in self.rows)


def parts_of(elements: Sequence[tuple[int, int, int, torch.Tensor]]) -> list[Part]:
    """From (row, cost, global index of the first, keys) of each tensor of elements."""
    found: dict[tuple[int, int], tuple[list[int], list[torch.Tensor]]] = {}
    for row, cost, base, keys in elements:
        bases, tensors = found.setdefault((row, cost), ([], []))
        bases.append(base)
        tensors.append(keys)
    return [
        Part(row, cost, bases, tensors, tensors[0] if len(tensors) == 1 else torch.cat(tensors))
        for (row, cost), (bases, tensors) in found.items()
    ]


def descend(
    queries: Sequence[Query],
    digits: Sequence[int],
    device: torch.device,
    also: Sequence[torch.Tensor],
    begin: Callable[[], None],
) -> None:
    """Set `limit` of every query. Collective; its collectives depend on reduced values alone.

    `also`: int64 tensors that the first collective sums over the ranks as well, in place; then `begin` says what the
    queries ask for.
    """
    left = 32
    for number, bits in enumerate(digits):
        left -= bits
        flip = 0 if number else 2 ** (bits - 1)  # of the sign: negative keys come first

        def digit(alive: torch.Tensor, left: int = left, bits: int = bits, flip: int = flip) -> torch.Tensor:
            return ((alive >> left) & (2**bits - 1)) ^ flip

        for q in _pass(queries, digit, bits, device, also if number == 0 else (), None if number else begin):
            q.limit = (LOWEST + ((q.prefix + 1) << left) - 1, 2**63 - 1)
    assert left == 0
    _break_ties(queries, device)


def _break_ties(queries: Sequence[Query], device: torch.device) -> None:
    """Collective if any query is not done."""
    for q in [q for q in queries if not q.done]:
        q.limit, q.prefix = (LOWEST + q.prefix, -1), 0
        for part in q.parts:
            equal = zip(part.bases, part.keys, strict=True)
            part.alive = torch.cat([tie_key(base + (k == q.limit[0]).nonzero().flatten()) for base, k in equal])
    left = HASH_BITS + INDEX_BITS
    while sum(q.num_ties for q in queries if not q.done) > GATHERED and left:
        bits = min(TIE_DIGIT, left)
        left -= bits

        def digit(alive: torch.Tensor, left: int = left, bits: int = bits) -> torch.Tensor:
            return (alive >> left) & (2**bits - 1)

        for q in _pass(queries, digit, bits, device):
            q.limit = (q.limit[0], ((q.prefix + 1) << left) - 1)
    tied = [q for q in queries if not q.done]
    if not tied:
        return
    padded = []
    for q in tied:
        same = [torch.stack([p.alive, *(torch.full_like(p.alive, x) for x in (p.row, p.cost))], 1) for p in q.parts]
        own = torch.cat([torch.zeros(0, 3, dtype=torch.int64, device=device), *same])
        padded.append(torch.nn.functional.pad(own, (0, 0, 0, q.num_ties - len(own)), value=-1))
    mine = torch.cat(padded)
    for q, found in zip(tied, comm.all_gather(mine).cpu().split([q.num_ties for q in tied], 1), strict=True):
        _settle(q, found[found[..., 0] >= 0])


def _settle(query: Query, found: torch.Tensor) -> None:
    """`found`: [n, 3], tie key, row and cost of all elements that are left. Local."""
    tie, row, cost = found[found[:, 0].argsort()].unbind(1)
    gain = torch.zeros_like(cost)
    for number in row.unique().tolist():
        own, mine = query.rows[number], row == number
        before = torch.tensor([own.below])
        gain[mine] = own.counted(own.below + cost[mine].cumsum(0)).diff(prepend=own.counted(before))
    sums = query.counted_below() + gain.cumsum(0)
    query.limit = (query.limit[0], int(tie[int(torch.searchsorted(sums, query.need))]))
    query.done = True


def _pass(
    queries: Sequence[Query],
    digit: Callable[[torch.Tensor], torch.Tensor],
    bits: int,
    device: torch.device,
    also: Sequence[torch.Tensor] = (),
    begin: Callable[[], None] | None = None,
) -> list[Query]:
    """One digit of the alive. Returns the queries it settles. Collective if any query is not done or there is
    `also`."""
    asked = [q for q in queries if not q.done]
    if not asked and not also:
        return []
    tables = [_histogram(q, digit, 2**bits, device) for q in asked]
    flat = torch.cat([*(t.flatten() for t in tables), *(t.flatten().to(device) for t in also)])
    sums = comm.all_reduce(flat).split([*(t.numel() for t in tables), *(t.numel() for t in also)])
    for t, total in zip(also, sums[len(tables) :], strict=True):
        t.copy_(total.view(t.shape))
    if begin is not None:
        begin()
    asking = [i for i, q in enumerate(asked) if not q.done]
    if not asking:
        return []
    rows = [(number, row) for number, i in enumerate(asking) for row in asked[i].rows]
    table = torch.cat([sums[i] for i in asking]).cpu().view(len(rows), 2**bits)
    query_of = torch.tensor([number for number, _ in rows])
    low, high, below = (torch.tensor([getattr(row, k) for _, row in rows])[:, None] for k in ("low", "high", "below"))
    cost = below + table.cumsum(1)
    counted = torch.zeros(len(asking), 2**bits, dtype=torch.int64).index_add_(0, query_of, cost.clamp(low, high))
    place = torch.searchsorted(counted, torch.tensor([[asked[i].need] for i in asking]))
    sizes, until = (t.gather(1, place[query_of]).flatten() for t in (table, cost))
    for (_, row), before in zip(rows, (until - sizes).tolist(), strict=True):
        row.below = before
    reached = counted.gather(1, place).flatten().tolist()
    ties = torch.zeros(len(asking), dtype=torch.int64).index_add_(0, query_of, sizes).tolist()
    settled = []
    for number, i in enumerate(asking):
        q, d = asked[i], int(place[number])
        q.prefix, q.num_ties = (q.prefix << bits) | d, ties[number] // asked[i].unit
        if q.need == reached[number]:
            q.done = True
            settled.append(q)
        else:
            for part in q.parts:
                part.alive = torch.cat([piece[digit(piece) == d] for piece in pieces(part.alive)])
    return settled


def _histogram(
    query: Query, digit: Callable[[torch.Tensor], torch.Tensor], bins: int, device: torch.device
) -> torch.Tensor:
    """int64 [rows, bins]: the cost of this rank's elements."""
    table = torch.zeros(len(query.rows), bins, dtype=torch.int64, device=device)
    for part in query.parts:
        for piece in pieces(part.alive):
            table[part.row] += torch.bincount(digit(piece), minlength=bins) * part.cost
    return table
