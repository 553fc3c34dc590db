"""Single ops by the names of their dims: transforms, samplers, complex views, windows."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dist_compress.speedup import sets
from dist_compress.speedup.labelled import Dims, Labelled, Names
from dist_compress.speedup.rule import Rule, Seen, union
from dist_compress.speedup.structure import Structure
from dist_compress.tracing import Op, Ref, Trace


def _plain(num_dims: int) -> Dims:
    return tuple(f"d{d}" for d in range(num_dims))


class Transform(Labelled):
    """Fourier transforms: over `dim`."""

    def names(self, op: Op, trace: Trace) -> Names | None:
        num_dims = len(trace.info(op.inputs[0]).shape)
        mixed = {d % num_dims for d in op.arg("dim")}
        dims = tuple(None if d in mixed else name for d, name in enumerate(_plain(num_dims)))
        return Names((dims,), (dims,))

    def sources(self, op: Op) -> tuple[Ref, ...]:
        return op.inputs


class Triangle(Labelled):
    """tril, triu: which elements become zero depends on the place in the last two dims."""

    why = "zeroes by the place in it"

    def names(self, op: Op, trace: Trace) -> Names | None:
        plain = _plain(len(trace.info(op.inputs[0]).shape))
        dims = (*plain[:-2], *(f"!{name}" for name in plain[-2:]))
        return Names((dims,), (dims,))

    def sources(self, op: Op) -> tuple[Ref, ...]:
        return op.inputs


class ComplexView(Labelled):
    """view_as_real adds a last dim of size 2, view_as_complex takes it away."""

    why = "holds real and imaginary parts"

    def names(self, op: Op, trace: Trace) -> Names | None:
        plain = _plain(min(len(trace.info(ref).shape) for ref in (op.inputs[0], op.out)))
        pair = (*plain, None)
        return Names((plain,), (pair,)) if op.name == "view_as_real" else Names((pair,), (plain,))

    def sources(self, op: Op) -> tuple[Ref, ...]:
        return op.inputs


class Sample(Labelled):
    """grid_sampler: x [n, c, space], grid [n, places, coordinates]."""

    why = "samples it at positions that are data"

    def names(self, op: Op, trace: Trace) -> Names | None:
        num_places = len(trace.info(op.inputs[0]).shape) - 2
        places = tuple(f"s{d}" for d in range(num_places))
        return Names((("n", "c", *(None,) * num_places), ("n", *places, None)), (("n", "c", *places),))

    def sources(self, op: Op) -> tuple[Ref, ...]:
        return op.inputs[:1]


class Regions(Labelled):
    """torchvision's roi_align and roi_pool: x [n, c, h, w], boxes [k, 5]."""

    why = "is cut out at positions that are data"

    def names(self, op: Op, trace: Trace) -> Names | None:
        out: Dims = ("k", "c", None, None)
        return Names(((None, "c", None, None), ("k", None)), (out,) * len(op.outputs))

    def sources(self, op: Op) -> tuple[Ref, ...]:
        return op.inputs[:1]


class EmbeddingBag(Labelled):
    """weight [rows, features] summed by bags of indices."""

    why = "looks it up by index"

    def names(self, op: Op, trace: Trace) -> Names | None:
        inputs = [(None,) * len(trace.info(ref).shape) for ref in op.inputs]
        outputs = [() if ref is None else (None,) * len(trace.info(ref).shape) for ref in op.outputs]
        return Names((("!r", "f"), *inputs[1:]), ((None, "f"), *outputs[1:]))

    def link(self, op: Op, s: Structure) -> None:
        super().link(op, s)
        s.role(op.inputs[0], 1, "producer")

    def sources(self, op: Op) -> tuple[Ref, ...]:
        return op.inputs[:1]


class Distance(Labelled):
    """_cdist_forward: x [*, p, k], y [*, r, k]."""

    why = "measures distances along it"

    def names(self, op: Op, trace: Trace) -> Names | None:
        lead = _plain(len(trace.info(op.inputs[0]).shape) - 2)
        return Names(((*lead, "p", None), (*lead, "r", None)), ((*lead, "p", "r"),))


class Unfold(Rule):
    """im2col [n, c, h, w] -> [n, c * window, places], and col2im, its transpose: channels move with their windows."""

    def link(self, op: Op, s: Structure) -> None:
        image, columns = self._sides(op)
        if len(s.dims(image)) != 4:
            return super().link(op, s)
        n, c, *space = s.dims(image)
        n_columns, wide, places = s.dims(columns)
        s.same(n, n_columns)
        window = s.new(s.sizes[wide] // s.sizes[c])
        for var in (*space, window, places):
            s.pin(var, "slides over it", op)
        s.box([wide], [c, window], op)

    def _sides(self, op: Op) -> tuple[Ref, Ref]:
        return (op.inputs[0], op.out) if op.name == "im2col" else (op.out, op.inputs[0])

    def _to_columns(self, s: torch.Tensor, op: Op, f) -> torch.Tensor:
        image, columns = self._sides(op)
        s = sets.any_over(s, [2, 3]).reshape(s.shape[:2])
        window = f.shape(columns)[1] // f.shape(image)[1]
        return (s.repeat_interleave(window, 1) if s.size(1) > 1 else s).unsqueeze(2)

    def _to_image(self, s: torch.Tensor, op: Op, f) -> torch.Tensor:
        image, _ = self._sides(op)
        s = sets.any_over(s, [2])
        if s.size(1) > 1:
            s = s.reshape(s.size(0), f.shape(image)[1], -1).any(-1, keepdim=True)
        return s.reshape(*s.shape[:2], 1, 1)

    def _push(self, op: Op, f, s: torch.Tensor) -> torch.Tensor:
        return self._to_columns(s, op, f) if op.name == "im2col" else self._to_image(s, op, f)

    def taint(self, op: Op, f) -> list[torch.Tensor]:
        if len(f.shape(self._sides(op)[0])) != 4:
            return super().taint(op, f)
        return [self._push(op, f, f.tainted(op.inputs[0]))]

    def nonzero(self, op: Op, f) -> list[torch.Tensor]:
        if len(f.shape(self._sides(op)[0])) != 4:
            return super().nonzero(op, f)
        return [self._push(op, f, f.nonzero(op.inputs[0]))]

    def live(self, op: Op, f, seen: Seen) -> Iterable[tuple[Ref, torch.Tensor]]:
        if len(f.shape(self._sides(op)[0])) != 4:
            yield from super().live(op, f, seen)
        elif op.name == "im2col":
            yield op.inputs[0], self._to_image(union(seen), op, f)
        else:
            yield op.inputs[0], self._to_columns(union(seen), op, f)
