"""The least set of slices to keep: start from what is alive, grow by the constraints until nothing changes.

Keeps live in a finite lattice and every constraint only grows them, so the fixpoint is unique, whatever the order.
"""

from __future__ import annotations

import math
from collections import deque
from itertools import accumulate

import torch

from dist_compress.speedup import sets
from dist_compress.speedup.facts import Facts
from dist_compress.speedup.structure import Box, Link, Structure
from dist_compress.tracing import Ref

_Seed = tuple[int, torch.Tensor | None, str]  # variable, positions to keep (None: all), why


class Keep:
    """Keep vectors per variable, with the reason why each position is kept."""

    def __init__(self, s: Structure, facts: Facts, extra_pins: dict[int, str], round_to: int = 1):
        self.structure, self.round_to = s, round_to
        self.reasons: list[str] = [""]
        self._reason_ids: dict[str, int] = {"": 0}
        roots = s.roots()
        sizes = [s.sizes[v] for v in roots]
        total = sum(sizes)
        self._kept, self._cause = torch.zeros(total, dtype=torch.bool), torch.zeros(total, dtype=torch.int32)
        self.kept = dict(zip(roots, self._kept.split(sizes), strict=True))
        self.cause = dict(zip(roots, self._cause.split(sizes), strict=True))
        self._counts: dict[int, int] | None = None
        self._full: set[int] = set()  # variables known to be kept whole
        self._constraints: list[Link | Box] = [*s.links, *s.boxes]
        self._of: dict[int, list[int]] = {v: [] for v in roots}  # variable -> the constraints that it is in
        for i, constraint in enumerate(self._constraints):
            for var in set(_variables(constraint)):
                self._of[var].append(i)
        self._queue = deque(range(len(self._constraints)))
        self._queued = [True] * len(self._constraints)
        full: set[int] = set()
        seeds = self._alive(facts, full)
        for var, why in (*extra_pins.items(), *s.pins.items()):
            if var not in full:
                full.add(var)
                seeds.append((var, None, why))
        seeds += self._unreached(facts, full)
        self._sow(seeds, dict(zip(roots, accumulate(sizes, initial=0), strict=False)))
        self.close()

    def _alive(self, facts: Facts, full: set[int]) -> list[_Seed]:
        """What is alive on the tensors that depend on the input; adds variables that are kept whole to `full`."""
        s = self.structure
        makers = {ref.id: op for op in s.trace.tape for ref in op.outputs if ref is not None}
        seeds: list[_Seed] = []
        for key in s.known():
            ref, dims = Ref(key), s.dims(Ref(key))
            if not facts.dependent(ref) or full.issuperset(dims):
                continue
            alive = facts.alive(ref)
            if not bool(alive if alive.numel() == 1 else alive.any()):
                continue
            op = makers.get(key)
            where = f"{op.name} in {op.module or 'the model itself'}" if op is not None else "an input"
            for d, var in enumerate(dims):
                if var in full:
                    continue
                vector = None
                if alive.size(d) == 1:
                    full.add(var)
                else:
                    vector = sets.any_over(alive, [o for o in range(alive.dim()) if o != d]).reshape(-1)
                seeds.append((var, vector, f"is not zero after {where}"))
        for ref, d in s.zeros_only:
            some = facts.nonzero(ref) & facts.observed(ref) if facts.dependent(ref) else facts.nonzero(ref)
            vector = sets.any_over(some, [o for o in range(some.dim()) if o != d % some.dim()]).reshape(-1)
            var = s.dims(ref)[d]
            seeds.append((var, vector.expand(s.sizes[var]), "is summed over and not zero"))
        return seeds

    def _unreached(self, facts: Facts, full: set[int]) -> list[_Seed]:
        """What no constraint ties to data stays: dims that only weights have, rows of a table beyond this input."""
        s = self.structure
        reached = {var for key in s.known() if facts.dependent(Ref(key)) for var in s.dims(Ref(key))}
        rest = [var for var in self.kept if var not in reached and var not in full]
        tied = self._tied_to(reached) if rest else reached
        seeds: list[_Seed] = []
        for var in rest:
            unread = torch.ones(s.sizes[var], dtype=torch.bool)
            for i in self._of[var] if var in tied else ():
                constraint = self._constraints[i]
                if isinstance(constraint, Box):
                    unread[:] = False
                    break
                for side, index in ((constraint.a, constraint.index_a), (constraint.b, constraint.index_b)):
                    if side == var:
                        unread[index] = False
            seeds.append((var, unread, "is not computed with the input"))
        return seeds

    def _tied_to(self, variables: set[int]) -> set[int]:
        """Those, and what a chain of constraints ties to them."""
        found, queue = set(variables), list(variables)
        while queue:
            for i in self._of[queue.pop()]:
                fresh = set(_variables(self._constraints[i])) - found
                found |= fresh
                queue.extend(fresh)
        return found

    def _sow(self, seeds: list[_Seed], starts: dict[int, int]) -> None:
        """Keep what the seeds say, all at once; the first one that keeps a position is its cause.

        starts: where each variable begins in the flat vectors.
        """
        if not seeds:
            return
        sizes = [self.structure.sizes[var] for var, _, _ in seeds]
        whole = torch.ones(max(sizes), dtype=torch.bool)
        ids = torch.tensor([*(self._reason(why) for _, _, why in seeds), 0], dtype=torch.int32)
        order = torch.arange(len(seeds)).repeat_interleave(torch.tensor(sizes))
        before = accumulate(sizes, initial=0)
        shift = torch.tensor([starts[var] - done for (var, _, _), done in zip(seeds, before, strict=False)])
        position = torch.arange(len(order)) + shift[order]
        wanted = torch.cat([whole[:n] if v is None else v for n, (_, v, _) in zip(sizes, seeds, strict=True)])
        first = torch.full(self._kept.shape, len(seeds))
        first.scatter_reduce_(0, position[wanted], order[wanted], "amin")
        self._kept.copy_(first < len(seeds))
        self._cause.copy_(ids[first])

    def _reason(self, why: str) -> int:
        """The place of a reason in `reasons`."""
        known = self._reason_ids.get(why)
        if known is None:
            known = self._reason_ids[why] = len(self.reasons)
            self.reasons.append(why)
        return known

    def counts(self) -> dict[int, int]:
        """How many positions of each variable are kept."""
        if self._counts is None:
            ends = torch.tensor([len(kept) for kept in self.kept.values()]).cumsum(0)
            upto = torch.cat([torch.zeros(1, dtype=torch.int64), self._kept.cumsum(0)])[ends]
            each = torch.diff(upto, prepend=torch.zeros(1, dtype=torch.int64)).tolist()
            self._counts = dict(zip(self.kept, each, strict=True))
        return self._counts

    def shrunk(self) -> set[int]:
        """The variables of which something goes."""
        return {var for var, count in self.counts().items() if count < self.structure.sizes[var]}

    def size(self) -> int:
        """How many positions are kept."""
        return sum(self.counts().values())

    def grow(self, var: int, vector: torch.Tensor, why: str) -> None:
        """Keep the positions of `vector` too."""
        if var in self._full:
            return
        fresh = vector & ~self.kept[var]
        if bool(fresh.any()):
            self.cause[var].masked_fill_(fresh, self._reason(why))
            self.kept[var].logical_or_(fresh)
            self._grown(var)

    def _grown(self, var: int) -> None:
        self._counts = None
        for i in self._of[var]:
            if not self._queued[i]:
                self._queued[i] = True
                self._queue.append(i)

    def _is_full(self, var: int) -> bool:
        if var not in self._full and bool(self.kept[var].all()):
            self._full.add(var)
        return var in self._full

    def close(self) -> None:
        """Run to the fixpoint, with kept counts of weights rounded; of nothing the first position is kept."""
        self._drain()
        for var in [v for v, count in self.counts().items() if count == 0 and self.structure.sizes[v] > 0]:
            first = torch.zeros_like(self.kept[var])
            first[0] = not bool(self.kept[var].any())  # another one may have brought some
            self.grow(var, first, "is the last slice left of its dim")
            self._drain()
        rounded = self._rounded()
        while any([self._round(var) for var in rounded]):
            pass  # what one dim grew by may have grown another

    def _rounded(self) -> list[int]:
        """The variables of weights of which multiples are kept."""
        s = self.structure
        if self.round_to == 1 and not s.multiples:
            return []
        params = [Ref(key) for key in s.known() if s.trace.info(Ref(key)).kind == "param"]
        return [v for v in sorted({v for ref in params for v in s.dims(ref)}) if self._multiple(v) > 1]

    def _multiple(self, var: int) -> int:
        return math.lcm(self.round_to, self.structure.multiples.get(var, 1))

    def _round(self, var: int) -> bool:
        """Keep dead positions of a dim, the first ones, until the kept count is a multiple or the size."""
        kept, grown = self.kept[var], False
        multiple = self._multiple(var)
        while (missing := min(-int(kept.sum()) % multiple, int((~kept).sum()))) > 0:
            count = 1 if self._of[var] else missing  # one brings more where dims are split or joined
            more = torch.zeros_like(kept)
            more[(~kept).nonzero().flatten()[:count]] = True
            self.grow(var, more, f"rounds its dim up to a multiple of {multiple}")
            self._drain()
            grown = True
        return grown

    def _drain(self) -> None:
        while self._queue:
            i = self._queue.popleft()
            self._queued[i] = False
            constraint = self._constraints[i]
            if isinstance(constraint, Link):
                self._close_link(constraint)
            else:
                self._close_box(constraint)

    def _close_link(self, link: Link) -> None:
        part_a, part_b = link.parts
        one, other = self.kept[link.a][part_a], self.kept[link.b][part_b]
        if torch.equal(one, other):
            return
        cause_a, cause_b = self.cause[link.a], self.cause[link.b]
        for var, kept, cause, part, news in (
            (link.a, one, cause_a, part_a, (other, cause_b[part_b])),
            (link.b, other, cause_b, part_b, (one, cause_a[part_a])),
        ):
            fresh = news[0] & ~kept
            if bool(fresh.any()):
                index = torch.arange(len(self.kept[var]))[part][fresh]
                cause[index] = news[1][fresh]
                self.kept[var][index] = True
                self._grown(var)

    def _close_box(self, box: Box) -> None:
        if all(map(self._is_full, (*box.a, *box.b))):
            return
        elements, image = (sets.outer([self.kept[v] for v in side]) for side in (box.a, box.b))
        if box.source is None:
            elements = elements | image
            image = elements
        else:
            sources, elements = box.source[image], elements.clone()
            elements[sources[sources >= 0]] = True
            image = elements[box.source.clamp(min=0)] & (box.source >= 0)
        for variables, grid in ((box.a, elements), (box.b, image)):
            sizes = [self.structure.sizes[v] for v in variables]
            for var, vector in zip(variables, sets.sides(grid, sizes), strict=True):
                self.grow(var, vector, box.reason)


def _variables(constraint: Link | Box) -> tuple[int, ...]:
    return (*constraint.a, *constraint.b) if isinstance(constraint, Box) else (constraint.a, constraint.b)
