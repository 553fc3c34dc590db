"""Ops that mix along some dims and leave the others alone: norms, softmax, reductions, pooling, embeddings."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dist_compress.speedup import sets
from dist_compress.speedup.rule import Rule, Seen, rank
from dist_compress.speedup.structure import Structure
from dist_compress.tracing import Op, Ref

_ZERO_OF_ZEROS = frozenset("mean sum amax amin max min var std prod any linalg_vector_norm norm".split())

# What these make of one number depends on how often it is there.
_COUNTING = frozenset("sum prod cumsum cumprod linalg_vector_norm norm".split())
_COUNTING_ZEROS = frozenset("_softmax _log_softmax _safe_softmax logsumexp logcumsumexp".split())


class Dimwise(Rule):
    """Mixes along `special(op, rank)` of its first tensor; these dims are kept whole."""

    why = "mixes along it"

    def special(self, op: Op, num_dims: int) -> set[int]:
        dims = op.arg("dim")
        if dims is None or dims == []:
            return set(range(num_dims))
        dims = [dims] if isinstance(dims, int) else dims
        return {d % num_dims for d in dims}

    def link(self, op: Op, s: Structure) -> None:
        x = op.inputs[0]
        own = s.dims(x)
        special = self.special(op, len(own))
        for d in special:
            self.link_special(own[d], d, op, s)
        for out in op.outputs:
            if out is None:
                continue
            dims = s.dims(out)
            kept = [d for d in range(len(own)) if d not in special]
            places = kept if len(dims) == len(own) else range(len(kept))
            for d, place in zip(kept, places, strict=True):
                if s.sizes[own[d]] == s.sizes[dims[place]]:
                    s.same(own[d], dims[place])
            for place in set(range(len(dims))) - set(places):
                s.pin(dims[place], self.why, op)
        for ref in op.inputs[1:]:
            self.link_affine(ref, op, s)

    def link_special(self, var: int, d: int, op: Op, s: Structure) -> None:
        s.pin(var, self.why, op)

    def link_affine(self, ref: Ref, op: Op, s: Structure) -> None:
        s.pin_all(ref, self.why, op)

    def taint(self, op: Op, f) -> list[torch.Tensor]:
        x = op.inputs[0]
        special = self.special(op, len(f.shape(x)))
        s = sets.any_over(f.tainted(x) | self._size_dependent(op, f, special), sorted(special))
        if not all(sets.is_none(f.tainted(ref)) for ref in op.inputs[1:]):
            s = sets.uniform(s.dim(), True)
        return self._outputs(s, special, op, f)

    def _size_dependent(self, op: Op, f, special: set[int]) -> torch.Tensor:
        """Constants of which the op makes something else where inputs have more tokens or pixels."""
        x = op.inputs[0]
        if op.name in _COUNTING_ZEROS:
            return sets.uniform(len(f.shape(x)), True)
        constants = f.constants(x)
        if not bool(constants.any()):
            return constants
        value = f.value(x)
        if value is None or op.name in _COUNTING:
            return constants
        first = value
        for dim in special:
            first = first.narrow(dim, 0, 1)
        uneven = (value != first).cpu()
        return constants & sets.restrict(sets.any_over(uneven, sorted(special)), constants)

    def _outputs(self, s: torch.Tensor, special: set[int], op: Op, f) -> list[torch.Tensor]:
        """The set of each output, with or without the special dims, which are uniform."""
        dropped = s.reshape([n for d, n in enumerate(s.shape) if d not in special])
        return [s if rank(ref, f) == s.dim() else dropped for ref in op.outputs]

    def _over_special(self, op: Op, f) -> list[torch.Tensor]:
        """What is not zero where f(0) is 0 along the special dims; of further outputs (positions) all."""
        s = f.nonzero(op.inputs[0])
        special = self.special(op, s.dim())
        first = self._outputs(sets.any_over(s, sorted(special)), special, op, f)[:1]
        return first + super().nonzero(op, f)[1:]

    def live(self, op: Op, f, seen: Seen) -> Iterable[tuple[Ref, torch.Tensor]]:
        shape = f.shape(op.inputs[0])
        special = self.special(op, len(shape))
        for s in seen:
            if s is not None and s.dim() < len(shape):
                for d in sorted(special):
                    s = s.unsqueeze(d)
            if s is not None:
                yield op.inputs[0], sets.any_over(s, sorted(special))
        for ref in op.inputs[1:]:
            yield ref, sets.uniform(len(f.shape(ref)), True)


class Window(Dimwise):
    """Pooling and interpolation over the last dims: "2d" in the name says how many."""

    why = "slides over it"

    def special(self, op: Op, num_dims: int) -> set[int]:
        spatial = next((n for n in (1, 2, 3) if f"{n}d" in op.name), num_dims - 2)
        return set(range(num_dims - spatial, num_dims))

    def nonzero(self, op: Op, f) -> list[torch.Tensor]:
        return self._over_special(op, f)


class LayerNorm(Dimwise):
    why = "normalises over it"

    def _size_dependent(self, op: Op, f, special: set[int]) -> torch.Tensor:
        return torch.tensor(False)  # the model holds the size of these dims

    def special(self, op: Op, num_dims: int) -> set[int]:
        return set(range(num_dims - len(op.arg("normalized_shape")), num_dims))

    def nonzero(self, op: Op, f) -> list[torch.Tensor]:
        affine = [op.arg(name) for name in ("weight", "bias")]
        if affine[0] is None:
            return super().nonzero(op, f)
        s = f.nonzero(affine[0])
        if affine[1] is not None:
            s = s | f.nonzero(affine[1])
        s = s.reshape((1,) * (rank(op.out, f) - s.dim()) + tuple(s.shape))
        return [s] + [sets.uniform(rank(ref, f), True) for ref in op.outputs[1:]]

    def link_affine(self, ref: Ref, op: Op, s: Structure) -> None:
        own, dims = s.dims(op.inputs[0]), s.dims(ref)
        for d, var in enumerate(dims):
            s.same(own[len(own) - len(dims) + d], var)
            s.role(ref, d, "affine")


class ChannelNorm(Rule):
    """Mixes what `_mixed` says, then scales each channel (dim 1) by a weight, whose zeros cut."""

    def _mixed(self, s: torch.Tensor, op: Op) -> torch.Tensor:
        return s

    def nonzero(self, op: Op, f) -> list[torch.Tensor]:
        s = self._scale(op, f, rank(op.out, f))
        if op.arg("bias") is not None:
            s = s | f.nonzero(op.arg("bias")).reshape([1, -1] + [1] * (s.dim() - 2))
        return [s] + [sets.uniform(rank(ref, f), True) for ref in op.outputs[1:]]

    def _scale(self, op: Op, f, num_dims: int) -> torch.Tensor:
        weight = op.arg("weight")
        known = torch.tensor([True]) if weight is None else f.nonzero(weight)
        return known.reshape([1, -1] + [1] * (num_dims - 2))

    def taint(self, op: Op, f) -> list[torch.Tensor]:
        s = self._mixed(f.tainted(op.inputs[0]), op)
        s = s & self._scale(op, f, s.dim())
        return [s] + [sets.uniform(rank(ref, f), True) for ref in op.outputs[1:]]

    def live(self, op: Op, f, seen: Seen) -> Iterable[tuple[Ref, torch.Tensor]]:
        if seen[0] is not None:
            s = seen[0] & self._scale(op, f, seen[0].dim())
            yield op.inputs[0], self._mixed(s, op)


class BatchNorm(ChannelNorm):
    """In eval an affine map per channel; with batch statistics it mixes over everything but channels."""

    def link(self, op: Op, s: Structure) -> None:
        x, out = op.inputs[0], op.out
        for a, b in zip(s.dims(x), s.dims(out), strict=True):
            s.same(a, b)
        for ref in op.inputs[1:]:
            s.same(s.dims(x)[1], s.dims(ref)[0])
            s.role(ref, 0, "affine")
        if op.arg("training"):
            for d in range(len(s.dims(x))):
                if d != 1:
                    s.pin(s.dims(x)[d], "takes statistics over it", op)

    def _mixed(self, s: torch.Tensor, op: Op) -> torch.Tensor:
        return sets.any_over(s, [d for d in range(s.dim()) if d != 1]) if op.arg("training") else s


class GroupNorm(ChannelNorm):
    """Whole groups may go; within a group everything is kept."""

    def link(self, op: Op, s: Structure) -> None:
        x = op.inputs[0]
        dims = s.dims(x)
        for a, b in zip(dims, s.dims(op.out), strict=True):
            s.same(a, b)
        groups = op.arg("group")
        group, within = s.new(groups), s.new(s.sizes[dims[1]] // groups)
        s.pin(within, "normalises over it", op)
        s.box([dims[1]], [group, within], op)
        for var in dims[2:]:
            s.pin(var, "normalises over it", op)
        for ref in op.inputs[1:]:
            s.same(dims[1], s.dims(ref)[0])
            s.role(ref, 0, "affine")
            s.whole_groups[ref.id] = group
        s.whole_groups[op.out.id] = group

    def _mixed(self, s: torch.Tensor, op: Op) -> torch.Tensor:
        s = sets.any_over(s, range(2, s.dim()))
        if s.size(1) == 1:
            return s
        groups = op.arg("group")
        wide = s.reshape(s.size(0), groups, -1)
        return wide.any(-1, keepdim=True).expand_as(wide).reshape(s.shape)


class Embedding(Rule):
    """weight[indices]: the columns of the table are the features; its rows are all kept."""

    def link(self, op: Op, s: Structure) -> None:
        weight, indices = op.inputs[0], op.inputs[1]
        rows, features = s.dims(weight)
        dims = s.dims(op.out)
        s.same(dims[-1], features)
        for a, b in zip(s.dims(indices), dims[:-1], strict=True):
            s.same(b, a)
        s.pin(rows, "looks it up by index", op)
        s.role(weight, 1, "producer")

    def taint(self, op: Op, f) -> list[torch.Tensor]:
        weight, indices = op.inputs[0], op.inputs[1]
        features = sets.any_over(f.nonzero(weight), [0]).reshape(-1)
        s = f.tainted(indices).unsqueeze(-1) & features
        return [s | sets.any_over(f.tainted(weight), [0]).reshape(-1)]

    def nonzero(self, op: Op, f) -> list[torch.Tensor]:
        features = sets.any_over(f.nonzero(op.inputs[0]), [0])
        return [features.reshape([1] * (rank(op.out, f) - 1) + [-1])]

    def live(self, op: Op, f, seen: Seen) -> Iterable[tuple[Ref, torch.Tensor]]:
        for ref in op.inputs:
            yield ref, sets.uniform(len(f.shape(ref)), True)


class Reduction(Dimwise):
    """mean, sum, amax, ...: the reduced dims are kept whole."""

    why = "reduces over it"

    def nonzero(self, op: Op, f) -> list[torch.Tensor]:
        return self._over_special(op, f) if op.name in _ZERO_OF_ZEROS else super().nonzero(op, f)


class Sum(Reduction):
    """Slices of zeros add nothing, so they may go from the dims that are summed over; norms of order > 0 likewise."""

    def link_special(self, var: int, d: int, op: Op, s: Structure) -> None:
        order = op.arg("ord", op.arg("p", 2))
        if order is None or isinstance(order, int | float) and order > 0:
            s.zeros_only.append((op.inputs[0], d))
        else:
            super().link_special(var, d, op, s)


class Softmax(Dimwise):
    why = "normalises over it"
