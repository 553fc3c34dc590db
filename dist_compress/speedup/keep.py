"""The least set of slices to keep: start from what is alive, grow by the constraints until nothing changes.

Keeps live in a finite lattice and every constraint only grows them, so the fixpoint is unique, whatever the order.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from typing import Any

import torch
from torch import nn

from dist_compress.speedup import sets
from dist_compress.speedup.facts import Facts
from dist_compress.speedup.rules import rule_of
from dist_compress.speedup.settings import Settings
from dist_compress.speedup.structure import Box, Link, Structure
from dist_compress.speedup.swaps import is_attention
from dist_compress.speedup.training_only import pin_training_inputs
from dist_compress.tracing import Op, Ref, Trace


def build(
    trace: Trace, model: nn.Module, args: Any, kwargs: Any, settings: Settings, kind: type[Structure] = Structure
) -> Structure:
    """The constraint system of a tape (with values) of `model(*args, **kwargs)`, with what cannot shrink pinned.

    The rules of norms read `settings.norm`. Raises UserError when a name in `settings` matches nothing.
    """
    s = kind(trace, settings)
    for s.op in _read(trace):
        rule_of(s.op).link(s.op, s)
    s.op = None
    for ref in trace.inputs:
        s.pin_all(ref, "is an input of the model")
    for ref in trace.outputs:
        s.pin_all(ref, "is an output of the model")
    fixed = {name for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention) and not is_attention(m)}
    for key, info in trace.tensors.items():
        if info.kind == "const":
            for var in s.dims(Ref(key)):
                s.pin(var, "is a tensor that python code holds")
        if info.kind == "param" and info.fqn.rpartition(".")[0] in fixed:
            for var in s.dims(Ref(key)):
                s.pin(var, "is inside a subclass of nn.MultiheadAttention, which takes its head size from its width")
    pin_training_inputs(s, model, args, kwargs)
    _pin_by_settings(s, model, settings)
    s.close()
    return s


def _read(trace: Trace) -> list[Op]:
    """The ops that the outputs need: averaged attention weights that nobody takes hold no head."""
    needed = {ref.id for ref in trace.outputs}
    found = []
    for op in reversed(trace.tape):
        if any(ref is not None and ref.id in needed for ref in op.outputs):
            needed.update(ref.id for ref in op.inputs)
            found.append(op)
    return found[::-1]


def _pin_by_settings(s: Structure, model: nn.Module, settings: Settings) -> None:
    kept = settings.kept_parameters(model)
    for key, info in s.trace.tensors.items():
        for fqn in info.all_fqns:
            if fqn in kept:
                s.pin_all(Ref(key), f"is kept by the setting keep={kept[fqn]!r}")
    barriers = settings.barrier_modules(model)
    for op in s.trace.tape if barriers else ():
        if op.module in barriers:
            for ref in (*op.inputs, *op.outputs):
                if ref is not None:
                    s.pin_all(ref, f"is kept by the setting barrier={barriers[op.module]!r}")


def pin_modules(s: Structure, modules: set[str]) -> dict[int, str]:
    """Pins (by representative) for everything that ops directly in `modules` touch."""
    pins: dict[int, str] = {}
    known = set(s.known())
    for op in s.trace.tape:
        if op.module in modules:
            for ref in (*op.inputs, *op.outputs):
                for var in s.dims(ref) if ref is not None and ref.id in known else ():
                    pins.setdefault(s.find(var), f"the code of {op.module or 'the model itself'} holds this size")
    return pins


class Keep:
    """Keep vectors per variable, with the reason why each position is kept."""

    def __init__(self, s: Structure, facts: Facts, extra_pins: dict[int, str], round_to: int = 1):
        self.structure, self.round_to = s, round_to
        self.reasons: list[str] = [""]
        self._reason_ids: dict[str, int] = {"": 0}
        roots = sorted({s.find(v) for v in range(len(s.parent))})
        self.kept = {v: torch.zeros(s.sizes[v], dtype=torch.bool) for v in roots}
        self.cause = {v: torch.zeros(s.sizes[v], dtype=torch.int32) for v in roots}
        self._constraints: dict[int, list[Link | Box]] = defaultdict(list)
        for link in s.links:
            for var in {link.a, link.b}:
                self._constraints[var].append(link)
        for box in s.boxes:
            for var in {*box.a, *box.b}:
                self._constraints[var].append(box)
        params = [Ref(key) for key in s.known() if s.trace.info(Ref(key)).kind == "param"]
        self._of_weights = sorted({var for ref in params for var in s.dims(ref)})
        self._queue: deque[Link | Box] = deque()
        self._seed(facts)
        for var, why in {**extra_pins, **s.pins}.items():
            self.grow(var, torch.ones(s.sizes[var], dtype=torch.bool), why)
        self._keep_unreached(facts)
        self.close()

    def _seed(self, facts: Facts) -> None:
        """What is alive on the tensors that depend on the input."""
        s = self.structure
        makers = {ref.id: op for op in s.trace.tape for ref in op.outputs if ref is not None}
        full: set[int] = set()
        for key in s.known():
            ref = Ref(key)
            if not facts.dependent(ref) or full.issuperset(s.dims(ref)):
                continue
            alive = facts.alive(ref)
            op = makers.get(key)
            where = f"{op.name} in {op.module or 'the model itself'}" if op is not None else "an input"
            if not bool(alive.any()):
                continue
            for d, var in enumerate(s.dims(ref)):
                if var in full:
                    continue
                if alive.size(d) == 1:
                    full.add(var)
                    vector = torch.ones(s.sizes[var], dtype=torch.bool)
                else:
                    vector = sets.any_over(alive, [o for o in range(alive.dim()) if o != d]).reshape(-1)
                self.grow(var, vector, f"is not zero after {where}")

        for ref, d in s.zeros_only:
            some = facts.nonzero(ref) & facts.observed(ref) if facts.dependent(ref) else facts.nonzero(ref)
            vector = sets.any_over(some, [o for o in range(some.dim()) if o != d % some.dim()]).reshape(-1)
            var = s.dims(ref)[d]
            self.grow(var, vector.expand(s.sizes[var]), "is summed over and not zero")

    def _keep_unreached(self, facts: Facts) -> None:
        """What no constraint ties to data stays: dims that only weights have, rows of a table beyond this input."""
        s = self.structure
        reached = {var for key in s.known() if facts.dependent(Ref(key)) for var in s.dims(Ref(key))}
        tied = self._tied_to(reached)
        for var in self.kept:
            if var in reached:
                continue
            unread = torch.ones(s.sizes[var], dtype=torch.bool)
            for constraint in self._constraints.get(var, ()) if var in tied else ():
                if isinstance(constraint, Box):
                    unread[:] = False
                    break
                for side, index in ((constraint.a, constraint.index_a), (constraint.b, constraint.index_b)):
                    if side == var:
                        unread[index] = False
            self.grow(var, unread, "is not computed with the input")

    def _tied_to(self, variables: set[int]) -> set[int]:
        """Those, and what a chain of constraints ties to them."""
        found, queue = set(variables), list(variables)
        while queue:
            for constraint in self._constraints.get(queue.pop(), ()):
                sides = (*constraint.a, *constraint.b) if isinstance(constraint, Box) else (constraint.a, constraint.b)
                fresh = set(sides) - found
                found |= fresh
                queue.extend(fresh)
        return found

    def size(self) -> int:
        """How many positions are kept."""
        return sum(int(kept.sum()) for kept in self.kept.values())

    def grow(self, var: int, vector: torch.Tensor, why: str) -> None:
        """Keep the positions of `vector` too."""
        fresh = vector & ~self.kept[var]
        if bool(fresh.any()):
            if why not in self._reason_ids:
                self._reason_ids[why] = len(self.reasons)
                self.reasons.append(why)
            self.cause[var][fresh] = self._reason_ids[why]
            self.kept[var] |= fresh
            self._queue.extend(self._constraints[var])

    def close(self) -> None:
        """Run to the fixpoint, with kept counts of weights rounded; of nothing the first position is kept."""
        self._drain()
        for var, kept in self.kept.items():
            if len(kept) and not bool(kept.any()):
                first = torch.zeros_like(kept)
                first[0] = True
                self.grow(var, first, "is the last slice left of its dim")
                self._drain()
        rounded = [var for var in self._of_weights if self._multiple(var) > 1]
        while any([self._round(var) for var in rounded]):
            pass  # what one dim grew by may have grown another

    def _multiple(self, var: int) -> int:
        return math.lcm(self.round_to, self.structure.multiples.get(var, 1))

    def _round(self, var: int) -> bool:
        """Keep dead positions of a dim, the first ones, until the kept count is a multiple or the size."""
        kept, grown = self.kept[var], False
        multiple = self._multiple(var)
        while (missing := min(-int(kept.sum()) % multiple, int((~kept).sum()))) > 0:
            count = 1 if self._constraints[var] else missing  # one brings more where dims are split or joined
            more = torch.zeros_like(kept)
            more[(~kept).nonzero().flatten()[:count]] = True
            self.grow(var, more, f"rounds its dim up to a multiple of {multiple}")
            self._drain()
            grown = True
        return grown

    def _drain(self) -> None:
        while self._queue:
            constraint = self._queue.popleft()
            if isinstance(constraint, Link):
                self._close_link(constraint)
            else:
                self._close_box(constraint)

    def _close_link(self, link: Link) -> None:
        one, other = (link.a, link.index_a), (link.b, link.index_b)
        for (a, ia), (b, ib) in ((one, other), (other, one)):
            fresh = self.kept[b][ib] & ~self.kept[a][ia]
            if bool(fresh.any()):
                self.cause[a][ia[fresh]] = self.cause[b][ib[fresh]]
                self.kept[a][ia[fresh]] = True
                self._queue.extend(self._constraints[a])

    def _close_box(self, box: Box) -> None:
        kept_a = [self.kept[v] for v in box.a]
        kept_b = [self.kept[v] for v in box.b]
        if all(bool(k.all()) for k in (*kept_a, *kept_b)):
            return
        elements, image = sets.outer(kept_a), sets.outer(kept_b)
        if box.source is None:
            elements = elements | image
            image = elements
        else:
            sources = box.source[image]
            elements[sources[sources >= 0]] = True
            image = elements[box.source.clamp(min=0)] & (box.source >= 0)
        for variables, grid in ((box.a, elements), (box.b, image)):
            sizes = [self.structure.sizes[v] for v in variables]
            for var, vector in zip(variables, sets.sides(grid, sizes), strict=True):
                self.grow(var, vector, box.reason)
