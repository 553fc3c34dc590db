"""What an op without a rule does to slices, found by running it on a few tensors; what cannot be shown is a barrier.

First whether it only moves elements: it commutes with every relabelling of them. Then which slices of the result see
which slices of an operand, by a binary code of NaNs and of changes; where that is one to one, whether the op on some
slices gives those slices of the op: statistics over a dim fail there. No proof, so every plan is verified.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload

from dist_compress.speedup.execute import execute
from dist_compress.speedup.labelled import Labelled, Names, take
from dist_compress.speedup.one_liners import Movement
from dist_compress.speedup.rule import Rule, Seen
from dist_compress.speedup.structure import Structure
from dist_compress.tracing import Op, Ref, Trace
from dist_compress.tracing.tape import map_tensors

_MAX_ELEMENTS = 2**21  # of all operands: a larger op is not probed
_NUM_SETS = 3
_REMOTE = ("c10d", "dist", "rpc", "symm_mem", "prim", "profiler", "higher_order")  # parts of namespaces
_TAGS = (
    torch.Tag.nondeterministic_seeded,
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.inplace_view,
)
_Lists = list[list[str | None]]  # names per dim, per tensor
_known: dict[Any, Rule] = {}


class Probed(Rule):
    """Asks the probe, once per op, shapes and plain arguments."""

    def link(self, op: Op, s: Structure) -> None:
        probe(op, s.trace).link(op, s)

    def taint(self, op: Op, f) -> list[torch.Tensor]:
        return probe(op, f.trace).taint(op, f)

    def nonzero(self, op: Op, f) -> list[torch.Tensor]:
        return probe(op, f.trace).nonzero(op, f)

    def live(self, op: Op, f, seen: Seen) -> Iterable[tuple[Ref, torch.Tensor]]:
        return probe(op, f.trace).live(op, f, seen)


class _Found(Labelled):
    """The names that the probe found."""

    why = "mixes along it, as probing shows"

    def __init__(self, names: Names):
        self.found = names

    def names(self, op: Op, trace: Trace) -> Names:
        return self.found


def probe(op: Op, trace: Trace) -> Rule:
    """The rule of an op that no list has. Local."""
    if not op.inputs or not _may_run(op, trace):
        return Rule()
    infos = [trace.info(ref) for ref in op.inputs]
    plain = repr(map_tensors((op.args, op.kwargs), lambda ref: op.inputs.index(ref)))
    key = (op.target, plain, tuple((info.shape, info.dtype) for info in infos))
    if key not in _known:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _known[key] = _probe(op, trace)
    return _known[key]


def _may_run(op: Op, trace: Trace) -> bool:
    """Nothing in place, random, of a size that is data, remote or on the meta device; nothing large."""
    if not isinstance(op.target, OpOverload) or op.target._schema.is_mutable:
        return False
    if any(tag in op.target.tags for tag in _TAGS):
        return False
    if any(part in op.target._schema.name.split("::")[0] for part in _REMOTE):
        return False
    if any(ref is None for ref in op.outputs) or not op.outputs or len(set(op.inputs)) < len(op.inputs):
        return False
    if trace.on_meta:
        return False
    infos = [trace.info(ref) for ref in op.inputs]
    integers = [ref for ref in op.inputs if not trace.info(ref).dtype.is_floating_point]
    sizes = sum(torch.Size(info.shape).numel() for info in infos)
    return sizes <= _MAX_ELEMENTS and sizes > 0 and all(ref.id in trace.values for ref in integers)


def _probe(op: Op, trace: Trace) -> Rule:
    names = None
    for dtype in (torch.float64, None):
        try:
            run = _Runs(op, trace, dtype)
            if run.moves():
                return Movement()
            names = run.names()
        except Exception:  # the op refuses the dtype or the values: nothing is shown
            continue
        break
    return Rule() if names is None else _Found(names)


class _Runs:
    """Draws of the operands and what the op makes of them."""

    def __init__(self, op: Op, trace: Trace, dtype: torch.dtype | None):
        self.op = op
        self.infos = [trace.info(ref) for ref in op.inputs]
        self.float = [i for i, info in enumerate(self.infos) if info.dtype.is_floating_point]
        self.dtypes = [dtype if dtype and i in self.float else info.dtype for i, info in enumerate(self.infos)]
        self.fixed = {i: trace.values[r.id].cpu() for i, r in enumerate(op.inputs) if i not in self.float}
        self.tolerance = 1e-9 if dtype is torch.float64 else 1e-4
        self.out_shapes = [trace.info(ref).shape for ref in op.outputs if ref is not None]

    def draw(self, positive: bool) -> list[torch.Tensor]:
        made = []
        for i, info in enumerate(self.infos):
            if i in self.fixed:
                made.append(self.fixed[i])
            else:
                value = torch.rand(info.shape) * 0.9 + 0.05 if positive else torch.randn(info.shape)
                made.append(value.to(self.dtypes[i]))
        return made

    def run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [out.clone() for out in execute(self.op, [t.clone() for t in tensors])]

    def moves(self) -> bool:
        """One operand, and op(relabel(ids)) = relabel(op(ids)) for a random signed relabelling; 0 may be added."""
        if len(self.infos) != 1 or not self.float:
            return False
        count = torch.Size(self.infos[0].shape).numel()
        if self.dtypes[0] is not torch.float64 and count > 1000:  # ids must be exact
            return False
        labels = torch.cat([torch.zeros(1), (torch.randperm(count) + 1) * (torch.randint(0, 2, (count,)) * 2 - 1)])
        ids = torch.arange(1, count + 1).view(self.infos[0].shape)
        for out, moved in zip(
            self.run([ids.to(self.dtypes[0])]), self.run([labels[ids].to(self.dtypes[0])]), strict=True
        ):
            places = out.round().long()
            if out.dtype != self.dtypes[0] or not torch.equal(places.to(out.dtype), out):
                return False
            if bool((places.abs() > count).any()):
                return False
            if not torch.equal((labels[places.abs()] * places.sign()).to(out.dtype), moved):
                return False
        return True

    def names(self) -> Names | None:
        draws = []
        for positive in (False, True):
            tensors = self.draw(positive)
            outs = self.run(tensors)
            if [tuple(out.shape) for out in outs] != self.out_shapes:
                return None
            if any(not torch.equal(a, b) for a, b in zip(outs, self.run(tensors), strict=True) if a.isfinite().all()):
                return None  # not a function of its arguments
            if all(bool(out.isfinite().all()) for out in outs):
                draws.append((tensors, outs))
        if not draws:
            return None
        inputs: _Lists = [[None] * len(info.shape) for info in self.infos]
        outputs: _Lists = [[None] * len(shape) for shape in self.out_shapes]
        for i in self.float:
            for d, size in enumerate(self.infos[i].shape):
                if size > 1:
                    self._name(i, d, draws, inputs, outputs)
        for name in sorted({n for dims in inputs for n in dims if n is not None}):
            if not self._commutes([name], draws, inputs, outputs):
                for dims in (*inputs, *outputs):
                    dims[:] = [None if n == name else n for n in dims]
        left = sorted({n for dims in inputs for n in dims if n is not None})
        if not left or not self._commutes(left, draws, inputs, outputs):
            return None
        return Names(tuple(map(tuple, inputs)), tuple(map(tuple, outputs)))

    def _name(self, i: int, d: int, draws: Any, inputs: _Lists, outputs: _Lists) -> None:
        """Name dim d of operand i after the dims of the results whose slices see only the same slice of it."""
        size = self.infos[i].shape[d]
        index = torch.arange(size)
        pairs = [(k, o) for k, shape in enumerate(self.out_shapes) for o in range(len(shape))]
        found = {(k, o) for k, o in pairs if self.out_shapes[k][o] == size}
        seen = {pair: torch.zeros(size, dtype=torch.bool) for pair in found}
        for bit in range((size - 1).bit_length()):
            for side in (0, 1):
                chosen = (index >> bit) % 2 == side
                for (tensors, outs), (k, o) in itertools.product(draws, pairs):
                    if (k, o) in found:
                        hit = self._hits(i, d, chosen, tensors, outs, k, o)
                        seen[k, o] |= hit
                        if bool((hit & ~chosen).any()):
                            found.discard((k, o))
        found = {pair for pair in found if bool(seen[pair].all())}
        for k in {k for k, _ in found}:
            places = [o for kk, o in found if kk == k]
            if len(places) == 1:
                name = outputs[k][places[0]] or inputs[i][d] or f"o{k}d{places[0]}"
                outputs[k][places[0]] = inputs[i][d] = name

    def _hits(self, i: int, d: int, chosen: torch.Tensor, tensors: Any, outs: Any, k: int, o: int) -> torch.Tensor:
        """Which slices along dim o of result k see the chosen slices along dim d of operand i."""
        mask = chosen.view([-1 if e == d else 1 for e in range(tensors[i].dim())])
        total = torch.zeros(outs[k].shape, dtype=torch.bool)
        for other in (torch.full_like(tensors[i], float("nan")), torch.rand_like(tensors[i]) + 0.5):
            changed = list(tensors)
            changed[i] = torch.where(mask, other, tensors[i])
            total |= self.run(changed)[k] != outs[k]
        return total.any(dim=[e for e in range(total.dim()) if e != o]) if total.dim() > 1 else total

    def _commutes(self, names: list[str], draws: Any, inputs: _Lists, outputs: _Lists) -> bool:
        """Whether the op on random slices along all of `names` gives these slices of the op."""
        sizes = {n: self.infos[i].shape[d] for i, dims in enumerate(inputs) for d, n in enumerate(dims) if n}
        for tensors, outs in draws:
            for _ in range(_NUM_SETS):
                kept = {n: torch.randperm(sizes[n])[: max(1, sizes[n] // 2)].sort().values for n in names}
                small = [take(t, dims, kept) for t, dims in zip(tensors, inputs, strict=True)]
                try:
                    made = self.run(small)
                except Exception:
                    return False
                for out, dims, new in zip(outs, outputs, made, strict=True):
                    expected = take(out, dims, kept)
                    scale = float(expected.abs().max()) if expected.numel() else 0.0
                    if new.shape != expected.shape or new.dtype != expected.dtype:
                        return False
                    if float((new - expected).abs().max()) > self.tolerance * max(scale, 1e-30):
                        return False
        return True
