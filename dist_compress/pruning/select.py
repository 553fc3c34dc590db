"""Exact distributed selection: which elements go, without any rank seeing all scores.

The order of all elements of a group is strict and free of the world size: ascending by

    (score bits, 15 hash bits of the global index, global index)

Radix select walks this order digit by digit (11 + 11 + 10 bits of the float pattern, then 11 a time of the
tie key). A pass costs one int64 histogram all-reduce for all queries together; sums of integers have no
order, so the result has equal bits at any number of ranks. It ends as soon as a bin is used up exactly,
usually within 3 passes.

-inf: removed already, stays removed and counts. +inf: never removed. NaN: refused by module name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dist_compress import comm
from dist_compress.errors import UserError
from dist_compress.hashing import splitmix64

SCORE_DIGITS = (11, 11, 10)
TIE_DIGIT = 11
HASH_BITS = 15
LOWEST = -(2**31)
REMOVED = LOWEST + 0x007FFFFF  # the key of -inf
KEPT = LOWEST + 0xFF800000  # the key of +inf


@dataclass
class Shard:
    """This rank's part of one module's scores; every element belongs to exactly one rank. May be empty."""

    module: str
    base: int  # global index of scores[0], below 2^48
    scores: torch.Tensor  # float32 [n]
    cost: int | torch.Tensor = 1  # of each element: an int, or int64 [n]


@dataclass
class Group:
    """Elements that compete. All but `shards` is the same on every rank."""

    name: str
    target: int  # remove the shortest prefix with at least this cost
    modules: Sequence[str]
    shards: Sequence[Shard]  # any order, any number of a module
    bounds: dict[str, tuple[int, int]] = field(default_factory=dict)  # module -> fewest, most elements removed
    unit: int = 1  # divides every cost, here and on the other ranks


@dataclass
class _Query:
    """Find the first element of the order at which the cost of all elements up to it reaches `need`."""

    need: int
    shards: Sequence[Shard]
    keys: Sequence[torch.Tensor]  # of each shard, int32 [n]
    alive: torch.Tensor  # keys, later numbers, of the elements that share the prefix found so far
    cost: int | torch.Tensor  # of these
    prefix: int = 0
    done: bool = False
    limit: tuple[int, int] = (LOWEST, -1)  # removed are those with (key, tie) <= limit

    def narrow(self, mask: torch.Tensor) -> None:
        self.alive = self.alive[mask]
        self.cost = self.cost if isinstance(self.cost, int) else self.cost[mask]

    def ties(self) -> torch.Tensor:
        """Global numbers int64 of the elements whose key is that of the limit, in the order of `alive`."""
        equal = [s.base + (k == self.limit[0]).nonzero().flatten() for s, k in zip(self.shards, self.keys, strict=True)]
        return torch.cat([torch.zeros(0, dtype=torch.int64, device=self.alive.device), *equal])


@dataclass
class _Census:
    """Of one module, over all ranks."""

    nan: int
    num_removed: int
    num_free: int  # may go, those removed already included
    cost_removed: int
    cost_free: int
    cost: int


def score_key(scores: torch.Tensor) -> torch.Tensor:
    """float32 [n] -> int32 [n] in the same order; -0 equals +0."""
    bits = (scores.float() + 0.0).contiguous().view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def tie_key(index: torch.Tensor, index_bits: int = 48) -> torch.Tensor:
    """Global index int64 [n] -> 15 hash bits above the index: equal scores go all over the model, not from
    its start."""
    return ((splitmix64(index) & (2**HASH_BITS - 1)) << index_bits) | index


def select(groups: Sequence[Group], digits: Sequence[int] = SCORE_DIGITS) -> list[list[torch.Tensor]]:
    """What to remove: bool [n] for each shard of each group. Collective.

    Raises UserError on every rank for NaN scores and for a target outside of what bounds and +inf allow.
    """
    if not groups:
        return []
    keys = [[score_key(shard.scores) for shard in group.shards] for group in groups]
    census = _take_census(groups, keys)
    if any(group.bounds for group in groups):
        keys = _apply_bounds(groups, keys, census, digits)
        census = _take_census(groups, keys)
    queries = []
    for group, group_keys, modules in zip(groups, keys, census, strict=True):
        free, removed = sum(m.cost_free for m in modules), sum(m.cost_removed for m in modules)
        if group.target > free or (group.bounds and group.target < removed):
            raise UserError(
                f"{group.name}: a cost of {group.target} of {sum(m.cost for m in modules)} is to be removed, but "
                f"min_sparse_ratio and max_sparse_ratio allow {removed} to {free} only. Change one of them."
            )
        queries.append(_query(max(group.target, removed), group.shards, group_keys, group.unit))
    _radix(queries, digits)
    return [
        [_removed(query.limit, k, shard) for k, shard in zip(group_keys, group.shards, strict=True)]
        for query, group, group_keys in zip(queries, groups, keys, strict=True)
    ]


def _take_census(groups: Sequence[Group], keys: list[list[torch.Tensor]]) -> list[list[_Census]]:
    """One row per module and group. Collective."""
    rows = {(g, m): [0] * 6 for g, group in enumerate(groups) for m in group.modules}
    for g, (group, group_keys) in enumerate(zip(groups, keys, strict=True)):
        for shard, key in zip(group.shards, group_keys, strict=True):
            removed, free = key == REMOVED, key < KEPT
            counts = [shard.scores.isnan().sum(), removed.sum(), free.sum()]
            if isinstance(shard.cost, int):
                counts += [counts[1] * shard.cost, counts[2] * shard.cost, len(key) * shard.cost]
            else:
                counts += [shard.cost[removed].sum(), shard.cost[free].sum(), shard.cost.sum()]
            row = rows[g, shard.module]
            rows[g, shard.module] = [a + int(b) for a, b in zip(row, counts, strict=True)]
    table = torch.tensor(list(rows.values()), dtype=torch.int64, device=_device(groups))
    comm.all_reduce(table)
    census: list[list[_Census]] = [[] for _ in groups]
    for (g, module), row in zip(rows, table.tolist(), strict=True):
        census[g].append(_Census(*row))
        if row[0]:
            raise UserError(
                f"{groups[g].name}: {row[0]} pruning scores of {module} are NaN. Its weights or gradients have "
                "diverged; lower optim.lr or prune later."
            )
    return census


def _apply_bounds(
    groups: Sequence[Group],
    keys: list[list[torch.Tensor]],
    census: list[list[_Census]],
    digits: Sequence[int],
) -> list[list[torch.Tensor]]:
    """Keys in which the elements a module must lose are -inf and those it must keep +inf. Collective.

    One global select over such keys equals clamping every module's count between its bounds.
    """
    queries: list[_Query] = []
    where: list[tuple[int, str]] = []
    for g, group in enumerate(groups):
        for module, stats in zip(group.modules, census[g], strict=True):
            if module not in group.bounds:
                continue
            mine = [i for i, shard in enumerate(group.shards) if shard.module == module]
            shards = [Shard(module, group.shards[i].base, group.shards[i].scores) for i in mine]
            for bound in group.bounds[module]:
                need = min(max(bound, stats.num_removed), stats.num_free)
                queries.append(_query(need, shards, [keys[g][i] for i in mine]))
            where.append((g, module))
    _radix(queries, digits)
    bounded = [list(group_keys) for group_keys in keys]
    for (g, module), low, high in zip(where, queries[::2], queries[1::2], strict=True):
        for i, shard in enumerate(groups[g].shards):
            if shard.module == module:
                key = bounded[g][i]
                must, may = _removed(low.limit, key, shard), _removed(high.limit, key, shard)
                bounded[g][i] = torch.where(must, REMOVED, torch.where(may, key, KEPT))
    return bounded


def _query(need: int, shards: Sequence[Shard], keys: Sequence[torch.Tensor], unit: int = 1) -> _Query:
    """`need` is rounded up to what costs can add up to, so that a bin may be used up exactly."""
    device = keys[0].device if keys else torch.device("cpu")
    alive = keys[0] if len(keys) == 1 else torch.cat([torch.zeros(0, dtype=torch.int32, device=device), *keys])
    costs = {s.cost for s in shards if isinstance(s.cost, int)}
    cost: int | torch.Tensor
    if len(costs) <= 1 and all(isinstance(s.cost, int) for s in shards):
        cost = costs.pop() if costs else unit
    else:
        full = [torch.ones_like(k, dtype=torch.int64) * s.cost for s, k in zip(shards, keys, strict=True)]
        cost = torch.cat([torch.zeros(0, dtype=torch.int64, device=device), *full])
    return _Query(-(-need // unit) * unit, shards, keys, alive, cost, done=need == 0)


def _radix(queries: list[_Query], digits: Sequence[int]) -> None:
    """Set `limit` of every query. Collective; its collectives depend on reduced values alone."""
    left = 32
    for bits in digits:
        left -= bits
        if all(q.done for q in queries):
            return
        flip = 2 ** (bits - 1) if left + bits == 32 else 0  # of the sign: negative keys come first
        digit = [((q.alive >> left) & (2**bits - 1)) ^ flip for q in queries]
        for q in _descend(queries, digit, bits):
            q.limit = (LOWEST + ((q.prefix + 1) << left) - 1, 2**63 - 1)
    assert left == 0
    if all(q.done for q in queries):
        return
    largest = torch.tensor([max((s.base + len(s.scores) - 1 for q in queries for s in q.shards), default=0)])
    index_bits = int(comm.all_reduce(largest.to(queries[0].alive.device), "max")).bit_length()
    for q in queries:
        if not q.done:
            q.limit, q.prefix = (LOWEST + q.prefix, -1), 0
            q.alive = q.ties()
    left = HASH_BITS + index_bits
    while not all(q.done for q in queries):
        bits = min(TIE_DIGIT, left)
        left -= bits
        digit = [(tie_key(q.alive.long(), index_bits) >> left) & (2**bits - 1) for q in queries]
        for q in _descend(queries, digit, bits, last=left == 0):
            last = ((q.prefix + 1) << left) - 1  # move the hash bits to where tie_key has them by default
            q.limit = (q.limit[0], ((last >> index_bits) << 48) | (last & (2**index_bits - 1)))


def _descend(queries: list[_Query], digits: list[torch.Tensor], bits: int, last: bool = False) -> list[_Query]:
    """One digit: `digits[q]` are those of the alive. Returns the queries it settles; `last` settles all.
    Collective."""
    histogram = torch.stack([_histogram(q, d, 2**bits) for q, d in zip(queries, digits, strict=True)])
    comm.all_reduce(histogram)
    sums = histogram.cumsum(1)
    need = torch.tensor([[q.need] for q in queries], device=sums.device)
    found = torch.searchsorted(sums, need).clamp_(max=2**bits - 1)
    taken, size = sums.gather(1, found).flatten().tolist(), histogram.gather(1, found).flatten().tolist()
    settled = []
    for i, q in enumerate(queries):
        if q.done:
            continue
        d = int(found[i])
        q.need -= taken[i] - size[i]
        q.prefix = (q.prefix << bits) | d
        q.narrow(digits[i] == d)
        if last or q.need == size[i]:
            q.done = True
            settled.append(q)
    return settled


def _histogram(query: _Query, digit: torch.Tensor, bins: int) -> torch.Tensor:
    if query.done:
        return torch.zeros(bins, dtype=torch.int64, device=digit.device)
    if isinstance(query.cost, int):
        return torch.bincount(digit, minlength=bins) * query.cost
    return torch.zeros(bins, dtype=torch.int64, device=digit.device).index_add_(0, digit, query.cost)


def _removed(limit: tuple[int, int], key: torch.Tensor, shard: Shard) -> torch.Tensor:
    """bool [n]: (key, tie) <= limit, and not +inf."""
    removed = key < min(limit[0], KEPT)
    if limit[0] < KEPT:
        equal = (key == limit[0]).nonzero().flatten()
        removed[equal] = tie_key(shard.base + equal) <= limit[1]
    return removed


def _device(groups: Sequence[Group]) -> torch.device:
    return next((s.scores.device for g in groups for s in g.shards), torch.device("cpu"))
