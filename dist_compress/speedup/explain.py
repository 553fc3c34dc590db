"""Why a slice stays: the chain of ops from it to what forced it.

Which op tied which dims is recorded by building the constraint system once more, so plans pay nothing for it. From the
slices that were asked for, the shortest way along these ties leads to a dim that is pinned or still alive there.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dist_compress.speedup import sets
from dist_compress.speedup.capture import Capture, captured
from dist_compress.speedup.constraints import build
from dist_compress.speedup.facts import Facts
from dist_compress.speedup.masking import Masks, check_masks
from dist_compress.speedup.planning import plan
from dist_compress.speedup.propagation import propagate
from dist_compress.speedup.settings import Settings
from dist_compress.speedup.structure import Structure
from dist_compress.target import UnitGroup
from dist_compress.tracing import Op, Ref, Trace


@dataclass(frozen=True)
class Why:
    """Slices of a parameter that stay, and what forced them."""

    fqn: str
    dim: int
    count: int
    steps: tuple[str, ...]  # ops from the slices to the cause, such as "add in layer1.0"
    reason: str

    def __str__(self) -> str:
        return f"{self.fqn} dim {self.dim}: {self.count} kept <- " + " <- ".join((*self.steps, self.reason))


def explain(
    model: nn.Module | Capture,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    masks: Masks | None = None,
    round_to: int = 1,
    norm: str = "keep",
    keep: Iterable[str] = (),
    barrier: Iterable[str] = (),
) -> list[Why]:
    """For every weight whose slices are zero, or masked, but have to stay: how many, and the chain of ops that forced
    them. Rank 0 only. The arguments are those of `plan`; the model stays as it was."""
    given = captured(model, args, kwargs, {"norm": norm, "keep": tuple(keep), "barrier": tuple(barrier)})
    made = plan(given, masks=masks, round_to=round_to)
    if not made.blocked:
        return []
    asked = check_masks(given.model, masks or {})
    for fqn, parameter in given.model.named_parameters():
        nonzero = parameter.detach().cpu() != 0 if not parameter.is_meta else torch.tensor(True)
        if not bool(nonzero.all()):
            asked[fqn] = asked[fqn] & nonzero if fqn in asked else nonzero
    ties = Ties(given)
    facts = propagate(given.trace, asked)
    found: list[Why] = []
    for fqn, dim in dict.fromkeys((b.fqn, b.dim) for b in made.blocked):
        mask = asked[fqn]
        alive = sets.any_over(mask, [d for d in range(mask.dim()) if d != dim]).reshape(-1)
        parameter = given.model.get_parameter(fqn)
        waiting = ~alive.expand(parameter.shape[dim]).clone()
        gone = torch.ones_like(waiting)
        gone[made.keep.get(fqn, {}).get(dim, torch.arange(len(gone)))] = False
        waiting &= ~gone
        why = ties.chains(fqn, dim, waiting, facts)
        rest = int(waiting.sum()) - sum(w.count for w in why)
        reasons = [b.reason for b in made.blocked if (b.fqn, b.dim) == (fqn, dim)]
        found += why
        if rest > 0:  # kept by what no op ties: rounding, the last slice, a number in python code
            found.append(Why(fqn, dim, rest, (), reasons[-1]))
    return found


def explain_group(ties: Ties, group: UnitGroup) -> Why | None:
    """The chain from a blocked group of units to what blocks it; None where no op pins it."""
    first = group.members[0]
    wanted = torch.zeros(ties.size(first.fqn, first.dim), dtype=torch.bool)
    wanted[first.index.flatten()] = True
    return next(iter(ties.chains(first.fqn, first.dim, wanted, None)), None)


class _Recording(Structure):
    """A constraint system that notes which op made each tie. `own`: the variables of each tensor before they merged."""

    def __init__(self, trace: Trace, settings: Settings) -> None:
        super().__init__(trace, settings)
        self.ties: dict[int, list[_Tie]] = defaultdict(list)
        self.pinned: dict[int, tuple[str, Op | None]] = {}
        self.own: dict[int, list[int]] = {}

    def same(self, a: int, b: int) -> None:
        tie = _Tie((a,), (b,), self.op)
        self.ties[a].append(tie)
        self.ties[b].append(tie)
        super().same(a, b)

    def link(self, a: int, index_a: torch.Tensor, b: int, index_b: torch.Tensor) -> None:
        tie = _Tie((a,), (b,), self.op, (index_a, index_b))
        self.ties[a].append(tie)
        self.ties[b].append(tie)
        super().link(a, index_a, b, index_b)

    def box(self, a: Sequence[int], b: Sequence[int], op: Op, source: torch.Tensor | None = None) -> None:
        a, b = [v for v in a if self.sizes[v] != 1], [v for v in b if self.sizes[v] != 1]
        if source is not None or len(a) != 1 or len(b) != 1:
            tie = _Tie(tuple(a), tuple(b), op, source=source)
            for var in {*a, *b}:
                self.ties[var].append(tie)
        super().box(a, b, op, source)

    def pin(self, var: int, why: str, op: Op | None = None) -> None:
        self.pinned.setdefault(var, (why, op))
        super().pin(var, why, op)

    def close(self) -> None:
        self.own = {key: list(dims) for key, dims in self._dims.items()}
        super().close()


@dataclass(frozen=True, eq=False)
class _Tie:
    a: tuple[int, ...]
    b: tuple[int, ...]
    op: Op | None
    index: tuple[torch.Tensor, torch.Tensor] | None = None
    source: torch.Tensor | None = None

    def across(self, var: int, wanted: torch.Tensor, sizes: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """(variable on the other side, positions that the wanted ones of `var` are tied to)."""
        for mine, theirs, forward in ((self.a, self.b, True), (self.b, self.a, False)):
            if var not in mine:
                continue
            if self.index is not None:
                here, there = self.index if forward else self.index[::-1]
                out = torch.zeros(sizes[theirs[0]], dtype=torch.bool)
                out[there[wanted[here]]] = True
                yield theirs[0], out
            elif len(mine) == len(theirs) == 1 and self.source is None:
                yield theirs[0], wanted
            else:
                grid = sets.outer([wanted if v == var else torch.ones(sizes[v], dtype=torch.bool) for v in mine])
                if self.source is not None and forward:
                    grid = grid[self.source.clamp(min=0)] & (self.source >= 0)
                elif self.source is not None:
                    back = torch.zeros(torch.Size([sizes[v] for v in theirs]).numel(), dtype=torch.bool)
                    back[self.source[grid & (self.source >= 0)]] = True
                    grid = back
                for other, side in zip(theirs, sets.sides(grid, [sizes[v] for v in theirs]), strict=True):
                    if not bool(side.all()) or bool(grid.all()):  # dims along which nothing was asked tell nothing
                        yield other, side


@dataclass
class Ties:
    """The recorded ties of a capture."""

    given: Capture
    recording: _Recording = field(init=False)
    _tensors: dict[int, tuple[Ref, int]] = field(init=False)  # variable -> a tensor and its dim

    def __post_init__(self) -> None:
        given = self.given
        made = build(given.trace, given.model, given.args, given.kwargs, given.settings, _Recording)
        assert isinstance(made, _Recording)
        self.recording = made
        self._tensors = {var: (Ref(key), d) for key, dims in made.own.items() for d, var in enumerate(dims)}
        self._makers = {ref.id: op for op in given.trace.tape for ref in op.outputs if ref is not None}
        infos = given.trace.tensors
        self._params = {fqn: Ref(key) for key in made.own for fqn in infos[key].all_fqns}

    def size(self, fqn: str, dim: int) -> int:
        return self.given.trace.info(self._params[fqn]).shape[dim]

    def chains(self, fqn: str, dim: int, wanted: torch.Tensor, facts: Facts | None) -> list[Why]:
        """What keeps the wanted positions of a parameter's dim, each position counted once; [] where no op does."""
        found, left = [], wanted.clone()
        start = self.recording.own[self._params[fqn].id][dim]
        while bool(left.any()):
            hit = self._search(start, left, facts)
            if hit is None:
                break
            origins, steps, reason = hit
            found.append(Why(fqn, dim, int(origins.sum()), steps, reason))
            left &= ~origins
        return found

    def _search(
        self, start: int, wanted: torch.Tensor, facts: Facts | None
    ) -> tuple[torch.Tensor, tuple[str, ...], str] | None:
        """Breadth first; (positions at the start that the cause keeps, ops on the way, the cause)."""
        s = self.recording
        queue: deque[tuple[int, torch.Tensor, tuple[_Tie, ...]]] = deque([(start, wanted, ())])
        seen = {start: wanted.clone()}
        while queue:
            var, positions, way = queue.popleft()
            cause = self._cause(var, positions, facts)
            if cause is not None:
                reason, held, last = cause
                steps = [text for text in (*map(_say, way), last) if text]
                steps = tuple(t for i, t in enumerate(steps) if i == 0 or t != steps[i - 1])
                return self._origins(start, wanted, var, held, way), steps, reason
            for tie in s.ties.get(var, ()):
                for other, mapped in tie.across(var, positions, s.sizes):
                    fresh = mapped & ~seen[other] if other in seen else mapped
                    if bool(fresh.any()):
                        seen[other] = seen[other] | fresh if other in seen else fresh
                        queue.append((other, fresh, (*way, tie)))
        return None

    def _origins(
        self, start: int, wanted: torch.Tensor, var: int, held: torch.Tensor, way: tuple[_Tie, ...]
    ) -> torch.Tensor:
        """The wanted positions at the start of the way that lead to the held ones at its end."""
        reach = {var: held}
        for tie in reversed(way):
            back: dict[int, torch.Tensor] = {}
            for there, positions in reach.items():
                for here, mapped in tie.across(there, positions, self.recording.sizes):
                    back[here] = back[here] | mapped if here in back else mapped
            reach = back
        origins = reach.get(start, wanted) & wanted
        return origins if bool(origins.any()) else wanted

    def _cause(self, var: int, positions: torch.Tensor, facts: Facts | None) -> tuple[str, torch.Tensor, str] | None:
        """(why positions of this dim stay, which, the op if it is not yet on the way)."""
        if var in self.recording.pinned:
            why, op = self.recording.pinned[var]
            return (f"{_say_op(op)} {why}" if op is not None else why), positions, ""
        if facts is None or var not in self._tensors:
            return None
        ref, dim = self._tensors[var]
        if not facts.dependent(ref):
            return None
        held = _alive(facts, ref, dim, len(positions)) & positions
        if not bool(held.any()):
            return None
        op = self._makers.get(ref.id)
        other = self._alive_operand(op, dim, held, facts) if op is not None else ""
        return f"it is not zero{other}", held, _say_op(op) if op is not None else "an input of the model"

    def _alive_operand(self, op: Op, dim: int, held: torch.Tensor, facts: Facts) -> str:
        """Which operand of the op is alive in the same place, where the op takes several."""
        inputs = [ref for ref in op.inputs if facts.dependent(ref)]
        rank = len(facts.shape(op.out))
        for ref in inputs if len(inputs) > 1 else ():
            maker, own = self._makers.get(ref.id), dim - rank + len(facts.shape(ref))
            if maker is None or own < 0 or facts.shape(ref)[own] != len(held):
                continue
            if bool((_alive(facts, ref, own, len(held)) & held).any()):
                return f", as its operand from {_say_op(maker)} is alive"
        return ""


def _alive(facts: Facts, ref: Ref, dim: int, size: int) -> torch.Tensor:
    alive = facts.alive(ref)
    return sets.any_over(alive, [d for d in range(alive.dim()) if d != dim]).reshape(-1).expand(size)


def _say(tie: _Tie) -> str:
    return _say_op(tie.op) if tie.op is not None else ""


def _say_op(op: Op) -> str:
    return f"{op.name} in {op.module or 'the model itself'}"
