"""Bilinear ops: matmuls and convolutions (grouped, depthwise, transposed), as boolean matmuls over channels."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dist_compress.speedup import sets
from dist_compress.speedup.rule import Rule, Seen, union
from dist_compress.speedup.structure import Contraction, Structure
from dist_compress.tracing import Op, Ref


class Matmul(Rule):
    """mm, bmm, addmm, baddbmm: [*, m, k] @ [*, k, n] + bias."""

    def operands(self, op: Op) -> tuple[Ref, Ref, Ref | None]:
        """(a, b, bias)."""
        if op.name in ("addmm", "baddbmm"):
            return op.inputs[1], op.inputs[2], op.inputs[0]
        return op.inputs[0], op.inputs[1], None

    def link(self, op: Op, s: Structure) -> None:
        a, b, bias = self.operands(op)
        da, db, out = s.dims(a), s.dims(b), s.dims(op.out)
        s.same(out[-2], da[-2])
        s.same(out[-1], db[-1])
        s.same(da[-1], db[-2])
        if len(out) == 3:
            s.same(out[0], da[0])
            s.same(out[0], db[0])
        for ref, result, contracted in ((a, -2, -1), (b, -1, -2)):
            rank = len(s.dims(ref))
            s.role(ref, rank + result, "producer")
            s.role(ref, rank + contracted, "consumer")
        if bias is not None:
            for d, var in enumerate(reversed(s.dims(bias))):
                if s.sizes[var] == s.sizes[out[-1 - d]]:
                    s.same(out[-1 - d], var)
                s.role(bias, len(s.dims(bias)) - 1 - d, "producer")
        s.contractions.append(Contraction(op, a, b, da[-1], (*out, da[-1]), len(out) - 1))

    def taint(self, op: Op, f) -> list[torch.Tensor]:
        a, b, bias = self.operands(op)
        total = _or(
            (f.tainted(a), not sets.is_none(f.tainted(a)), lambda x: sets.matmul(x, f.nonzero(b))),
            (f.tainted(b), not sets.is_none(f.tainted(b)), lambda x: sets.matmul(f.nonzero(a), x)),
            rank=len(f.shape(op.out)),
        )
        return [total if bias is None else total | f.tainted(bias)]

    def nonzero(self, op: Op, f) -> list[torch.Tensor]:
        a, b, bias = self.operands(op)
        total = sets.matmul(f.nonzero(a), f.nonzero(b))
        return [total if bias is None else total | f.nonzero(bias)]

    def live(self, op: Op, f, seen: Seen) -> Iterable[tuple[Ref, torch.Tensor]]:
        a, b, bias = self.operands(op)
        if f.dependent(a):
            yield a, sets.fit(sets.matmul(union(seen), f.nonzero(b).mT), f.shape(a))
        if f.dependent(b):
            yield b, sets.fit(sets.matmul(f.nonzero(a).mT, union(seen)), f.shape(b))
        if bias is not None:
            yield bias, sets.fit(union(seen), f.shape(bias))


class Convolution(Rule):
    """aten.convolution. Channels are seen as (groups, channels of a group) on each side."""

    def link(self, op: Op, s: Structure) -> None:
        x, w, out = op.inputs[0], op.inputs[1], op.out
        dx, dw, do = s.dims(x), s.dims(w), s.dims(out)
        s.same(do[0], dx[0])
        for var in (*dx[2:], *dw[2:], *do[2:]):
            s.pin(var, "slides over it", op)
        num_groups, transposed = op.arg("groups"), op.arg("transposed")
        result, contracted = (1, 0) if transposed else (0, 1)
        s.role(w, result, "producer")
        s.role(w, contracted, "consumer")
        groups = None
        if num_groups == 1:
            s.same(do[1], dw[result])
            s.same(dx[1], dw[contracted])
            factors = (dx[1], do[1])
        else:
            groups, factors = self._link_groups(op, s, num_groups, transposed)
        if len(op.inputs) > 2:
            s.same(do[1], s.dims(op.inputs[2])[0])
            s.role(op.inputs[2], 0, "producer")
        s.contractions.append(Contraction(op, x, w, dx[1], factors, 1, groups, contracted_dim=1))

    def _link_groups(self, op: Op, s: Structure, num_groups: int, transposed: bool) -> tuple[int, tuple[int, ...]]:
        x, w, out = s.dims(op.inputs[0])[1], s.dims(op.inputs[1]), s.dims(op.out)[1]
        group = s.new(num_groups)
        within_x, within_out = s.new(s.sizes[x] // num_groups), s.new(s.sizes[out] // num_groups)
        s.box([x], [group, within_x], op)
        s.box([out], [group, within_out], op)
        first, second = (within_x, within_out) if transposed else (within_out, within_x)
        s.box([w[0]], [group, first], op)
        s.same(second, w[1])
        s.role(op.inputs[1], 0, "producer")
        if s.sizes[within_x] == 1:
            s.roles[(op.inputs[1].id, 0)] = "producer"
        return group, (group, within_x, within_out)

    def _weight(self, s: torch.Tensor, op: Op, f) -> torch.Tensor:
        """The set of the weight as [groups, out of a group, in of a group], of which each may be 1."""
        if s.numel() == 1:
            return s.view(1, 1, 1)
        s = sets.any_over(s, range(2, s.dim()))
        transposed = op.arg("transposed")
        if s.size(0) > 1:
            g, o, i = self._sizes(op, f)
            s = s.reshape(g, i if transposed else o, s.size(1))
        else:
            s = s.reshape(1, 1, s.size(1))
        return s.mT if transposed else s

    def _sizes(self, op: Op, f) -> tuple[int, int, int]:
        """(groups, outputs of a group, inputs of a group)."""
        g = op.arg("groups")
        return g, f.shape(op.out)[1] // g, f.shape(op.inputs[0])[1] // g

    def _channels(self, s: torch.Tensor, num_groups: int) -> torch.Tensor:
        """The set of data as [groups, channels of a group]."""
        if s.numel() == 1:
            return s.view(1, 1)
        s = sets.any_over(s, [0, *range(2, s.dim())])
        return s.reshape(num_groups, -1) if s.numel() > 1 else s.view(1, 1)

    def _spread(self, s: torch.Tensor, wide: tuple[int, int], rank: int) -> torch.Tensor:
        """[groups, channels of a group] back to the rank of the data."""
        if s.numel() > 1:
            s = s.expand(wide)
        return s.reshape([1, -1] + [1] * (rank - 2))

    def taint(self, op: Op, f) -> list[torch.Tensor]:
        x, w = op.inputs[0], op.inputs[1]
        if f.masks is not None and len(op.inputs) == 2 and not f.dependent(w) and f.tainted(x) is f.nonzero(x):
            return [f.nonzero(op.out)]  # the same elements
        return self._reached(op, f, [(f.tainted(x), f.nonzero(w)), (f.nonzero(x), f.tainted(w))], f.tainted)

    def nonzero(self, op: Op, f) -> list[torch.Tensor]:
        return self._reached(op, f, [(f.nonzero(op.inputs[0]), f.nonzero(op.inputs[1]))], f.nonzero)

    def _reached(self, op: Op, f, pairs: list[tuple[torch.Tensor, torch.Tensor]], of_bias) -> list[torch.Tensor]:
        """Outputs that see an element of both sets of a pair (data, weight), or one of the bias."""
        g, o, _ = self._sizes(op, f)
        total = sets.uniform(2, False)
        for data, weight in pairs:
            if not sets.is_none(data) and not sets.is_none(weight):
                seen = sets.matmul(self._weight(weight, op, f), self._channels(data, g)[..., None])[..., 0]
                total = seen if sets.is_none(total) else total | seen
        total = self._spread(total, (g, o), len(f.shape(op.out)))
        if len(op.inputs) > 2:
            bias = of_bias(op.inputs[2])
            total = total | bias.reshape([1, -1] + [1] * (total.dim() - 2))
        return [total]

    def live(self, op: Op, f, seen: Seen) -> Iterable[tuple[Ref, torch.Tensor]]:
        x, w = op.inputs[0], op.inputs[1]
        g, _, i = self._sizes(op, f)
        observed = self._channels(union(seen), g)
        if f.dependent(x):
            s = sets.matmul(observed[:, None], self._weight(f.nonzero(w), op, f))[:, 0]
            yield x, self._spread(s, (g, i), len(f.shape(x)))
        for ref in op.inputs[1:]:
            yield ref, sets.uniform(len(f.shape(ref)), True)


def _or(*parts, rank: int) -> torch.Tensor:
    """Union of fn(set) over the parts (set, whether it holds anything, fn)."""
    total = sets.uniform(rank, False)
    for s, some, fn in parts:
        if bool(some):
            total = total | fn(s)
    return total
