"""Exact distributed selection: which elements go, without any rank seeing all scores.

Elements of a group are ordered by (score bits, hash of the global index, global index), and the shortest prefix of the
order that reaches the target goes. All groups share the same few collectives (see `radix`). Bounds of modules share
them, too: what a prefix removes of each module is counted between its bounds, so the place where a group reaches its
target and the places where its modules reach their bounds are looked for side by side.

-inf: removed already, stays removed and counts. +inf: never removed. NaN: refused by module name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from dist_compress import comm
from dist_compress.errors import UserError
from dist_compress.pruning.radix import (
    KEPT,
    REMOVED,
    SCORE_DIGITS,
    Part,
    Query,
    Row,
    descend,
    parts_of,
    pieces,
    score_key,
    tie_key,
)


@dataclass
class Shard:
    """This rank's part of one module's scores; every element belongs to exactly one rank. May be empty."""

    module: str
    base: int  # global index of scores[0], below 2^48
    scores: torch.Tensor  # float32 [n]
    cost: int = 1  # of each element; the same in a whole module if that has bounds


@dataclass
class Group:
    """Elements that compete. All but `shards` is the same on every rank."""

    name: str
    target: int | Callable[[int], int]  # remove the shortest prefix of this cost, given the number below `limit`
    modules: Sequence[str]
    shards: Sequence[Shard]  # any order, any number of a module
    bounds: dict[str, tuple[int, int]] = field(default_factory=dict)  # module -> fewest, most elements removed
    unit: int = 1  # divides every cost, here and on the other ranks
    limit: float = -torch.inf
    source: str = ""  # where the scores come from, for errors


@dataclass
class _Census:
    """Of one module, over all ranks."""

    nan: int
    num_removed: int
    num_free: int  # may go, those removed already included
    cost_removed: int
    cost_free: int
    cost: int
    below: int  # scores below the limit of the group, those removed already included

    @classmethod
    def row(cls, shards: Sequence[Shard], keys: Sequence[torch.Tensor], limit: float) -> list[int]:
        out = [0] * 7
        for shard, key in zip(shards, keys, strict=True):
            nan = removed = free = below = 0
            for score, k in zip(pieces(shard.scores), pieces(key), strict=True):
                nan += int(score.isnan().count_nonzero())
                removed += int((k == REMOVED).count_nonzero())
                free += int((k < KEPT).count_nonzero())
                below += 0 if limit == -torch.inf else int((score < limit).count_nonzero())
            below = removed if limit == -torch.inf else below
            costs = [removed * shard.cost, free * shard.cost, len(key) * shard.cost]
            out = [a + b for a, b in zip(out, [nan, removed, free, *costs, below], strict=True)]
        return out

    @property
    def each(self) -> int:
        """The cost of an element of a module that has bounds."""
        return self.cost_free // self.num_free if self.num_free else 1

    def bounds(self, fewest: int, most: int) -> tuple[int, int]:
        """As far as they can be met."""
        return (min(max(fewest, self.num_removed), self.num_free), min(max(most, self.num_removed), self.num_free))


class _Search:
    """The queries of one group: where it reaches its target, and where its modules reach their bounds."""

    def __init__(self, group: Group) -> None:
        self.group, self.keys = group, [score_key(shard.scores) for shard in group.shards]
        self.row = {module: i for i, module in enumerate(group.bounds)}  # what has no bounds shares the last row
        own = [self.row.get(shard.module, len(self.row)) for shard in group.shards]
        elements = [(row, s.cost, s.base, k) for row, s, k in zip(own, group.shards, self.keys, strict=True)]
        self.main = Query(parts_of(elements), [Row() for _ in range(len(self.row) + 1)], group.unit)
        self.least, self.most = ({module: Query(self._parts(module)) for module in group.bounds} for _ in range(2))

    def _parts(self, module: str) -> list[Part]:
        pairs = zip(self.group.shards, self.keys, strict=True)
        return parts_of([(0, 1, shard.base, key) for shard, key in pairs if shard.module == module])

    def queries(self) -> list[Query]:
        return [self.main, *self.least.values(), *self.most.values()]

    def census(self) -> list[list[int]]:
        """A row for each module."""
        pairs = list(zip(self.group.shards, self.keys, strict=True))
        rows = []
        for module in self.group.modules:
            own = [(s, k) for s, k in pairs if s.module == module]
            rows.append(_Census.row([s for s, _ in own], [k for _, k in own], self.group.limit))
        return rows

    def ask(self, rows: Sequence[Sequence[int]]) -> None:
        """`rows`: those of all ranks. Raises UserError."""
        group = self.group
        census = {module: _Census(*row) for module, row in zip(group.modules, rows, strict=True)}
        for module, found in census.items():
            _refuse_nan(group.name, found.nan, module, group.source)
        removed = free = 0
        for module, found in census.items():
            low, high = found.cost_removed, found.cost_free
            if module in group.bounds:
                fewest, most = found.bounds(*group.bounds[module])
                self.least[module].ask(fewest if fewest > found.num_removed else 0)
                self.most[module].ask(most)
                if most == found.num_free:
                    self.most[module].done, self.most[module].limit = True, (KEPT, 0)
                low, high = fewest * found.each, most * found.each
                row = self.main.rows[self.row[module]]
                row.low, row.high = low, high
            removed, free = removed + low, free + high
        target = group.target if isinstance(group.target, int) else group.target(sum(c.below for c in census.values()))
        if target > free or (group.bounds and target < removed):
            raise UserError(
                f"{group.name}: a cost of {target} of {sum(c.cost for c in census.values())} is to be removed, but "
                f"min_sparse_ratio and max_sparse_ratio allow {removed} to {free} only. Change one of them."
            )
        self.main.ask(max(target, removed))

    def removed(self) -> list[torch.Tensor]:
        """For each shard, bool [n]."""
        out = []
        for shard, key in zip(self.group.shards, self.keys, strict=True):
            gone = _until(self.main.limit, key, shard)
            if shard.module in self.group.bounds:
                gone &= _until(self.most[shard.module].limit, key, shard)
                gone |= _until(self.least[shard.module].limit, key, shard) | (key == REMOVED)
            out.append(gone)
        return out


def select(
    groups: Sequence[Group],
    digits: Sequence[int] = SCORE_DIGITS,
    checked: Sequence[tuple[str, str, Sequence[torch.Tensor]]] = (),
    also: Sequence[torch.Tensor] = (),
) -> list[list[torch.Tensor]]:
    """What to remove: bool [n] for each shard of each group. Collective if there are any groups, or any of the rest.

    `checked`: name, source and scores of this rank that are only looked at for NaN. `also`: int64 tensors that are
    summed over the ranks on the way, in place. Raises UserError on every rank for NaN scores and for a target outside
    of what bounds and +inf allow.
    """
    searches = [_Search(group) for group in groups]
    rows = [search.census() for search in searches]
    nan = [sum(int(x.isnan().sum()) for x in scores) for *_, scores in checked]
    census = torch.tensor([n for own in rows for row in own for n in row] + nan, dtype=torch.int64)

    def begin() -> None:
        found = census.tolist()
        for (name, source, _), number in zip(checked, found[len(found) - len(nan) :], strict=True):
            _refuse_nan(name, number, name, source)
        for search, own in zip(searches, rows, strict=True):
            search.ask([[found.pop(0) for _ in row] for row in own])

    extra = [t for t in (census, *also) if t.numel()]
    device = next((s.scores.device for g in groups for s in g.shards), comm.device())
    descend([q for search in searches for q in search.queries()], digits, device, extra, begin)
    return [search.removed() for search in searches]


def _refuse_nan(group: str, number: int, module: str, source: str) -> None:
    if number:
        of = f"{f' ({source})' if source else ''}{f' of {module}' if module != group else ''}"
        raise UserError(
            f"{group}: {number} pruning scores{of} are NaN. Its weights or gradients have diverged; lower optim.lr or "
            "prune later."
        )


def _until(limit: tuple[int, int], key: torch.Tensor, shard: Shard) -> torch.Tensor:
    """bool [n]: (key, tie) <= limit, and not +inf."""
    removed = key < min(limit[0], KEPT)
    if limit[0] < KEPT:
        equal = (key == limit[0]).nonzero().flatten()
        removed[equal] = tie_key(shard.base + equal) <= limit[1]
    return removed
