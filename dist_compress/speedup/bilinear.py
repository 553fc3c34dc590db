"""Bilinear ops told by the names of their dims: einsum-like products of two tensors, whatever their layout."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterable

import torch

from dist_compress.speedup import sets
from dist_compress.speedup.labelled import Dims, Labelled, Names, project
from dist_compress.speedup.rule import Seen, rank, union
from dist_compress.speedup.structure import Contraction, Structure
from dist_compress.tracing import Op, Ref, Trace


class Bilinear(Labelled):
    """out = sum, over the names that only the operands have, of data * weight, + bias.

    Dims without a name are kept whole. `exact`: the op is the einsum of its names, so that constants may fold.
    """

    why = "slides over it"
    exact = True

    def operands(self, op: Op) -> tuple[Ref, Ref, Ref | None]:
        """(data, weight, bias)."""
        return op.inputs[0], op.inputs[1], op.inputs[2] if len(op.inputs) > 2 else None

    def _own(self, op: Op, names: Names) -> dict[Ref, Dims]:
        return dict(zip(op.inputs, names.inputs, strict=True))

    def link(self, op: Op, s: Structure) -> None:
        names = self.names(op, s.trace)
        if names is None:
            return super().link(op, s)
        found = self.link_names(op, names, s)
        a, b, bias = self.operands(op)
        own, out = self._own(op, names), names.outputs[0]
        summed = [name for name in own[a] if name in own[b] and name not in out and name in found]
        summed.sort(key=lambda name: -s.sizes[found[str(name)]])
        for ref in (a, b):
            for d, name in enumerate(own[ref]):
                if name in out and name is not None:
                    s.role(ref, d, "producer")
                elif name in summed[:1]:
                    s.role(ref, d, "consumer")
                else:  # summed over by one operand alone, or a second such dim
                    s.pin(s.dims(ref)[d], self.why, op)
        if bias is not None:
            for d in range(len(own[bias])):
                s.role(bias, d, "producer")
        if summed:
            s.contractions.append(self._contraction(op, names, str(summed[0]), found, s))

    def _contraction(self, op: Op, names: Names, contracted: str, found: dict[str, int], s: Structure) -> Contraction:
        a, b, _ = self.operands(op)
        own, out = self._own(op, names), names.outputs[0]
        equation = ""
        if self.exact and None not in (*own[a], *own[b], *out):
            letters = _letters((*own[a], *own[b], *out))
            left, right, result = ("".join(letters[str(n)] for n in dims) for dims in (own[a], own[b], out))
            equation = f"{left},{right}->{result}"
        made = [d for d, name in enumerate(out) if name in own[b] and name in found]
        macs = torch.Size(s.trace.info(op.out).shape).numel()
        for n, name in zip(s.trace.info(a).shape, own[a], strict=True):
            macs *= n if name in own[b] and name is not None and name not in out else 1
        factors = tuple(var for name, var in found.items() if name in own[a] or name in own[b])
        place = own[a].index(contracted)
        result_dim = made[-1] if made else len(out) - 1
        return Contraction(op, a, b, found[contracted], factors, result_dim, None, place, equation, macs)

    def _product(self, a: torch.Tensor, dims_a: Dims, b: torch.Tensor, dims_b: Dims, to: Dims) -> torch.Tensor:
        """Elements that see one of both sets, with size 1 along dims without a name."""
        letters = _letters((*dims_a, *dims_b, *to))
        flat, text = [], []
        for s, dims in ((a, dims_a), (b, dims_b)):
            s = sets.any_over(s, [d for d, n in enumerate(dims) if n is None])
            flat.append(s.reshape([s.size(d) for d, n in enumerate(dims) if n is not None]).float())
            text.append("".join(letters[n] for n in dims if n is not None))
        known = [n for n in to if n is not None and (n in dims_a or n in dims_b)]
        s = torch.einsum(f"{text[0]},{text[1]}->{''.join(letters[n] for n in known)}", *flat) > 0.5
        for d, n in enumerate(to):
            if n not in known:
                s = s.unsqueeze(d)
        return s

    def taint(self, op: Op, f) -> list[torch.Tensor]:
        names = self.names(op, f.trace)
        if names is None:
            return super().taint(op, f)
        a, b, bias = self.operands(op)
        others = [ref for ref in op.inputs if ref not in (a, b, bias)]  # offsets, masks
        return self._both(op, f, names, f.nonzero if any(bool(f.tainted(o).any()) for o in others) else f.tainted)

    def nonzero(self, op: Op, f) -> list[torch.Tensor]:
        names = self.names(op, f.trace)
        return super().nonzero(op, f) if names is None else self._both(op, f, names, f.nonzero)

    def _both(self, op: Op, f, names: Names, of: Callable[[Ref], torch.Tensor]) -> list[torch.Tensor]:
        a, b, bias = self.operands(op)
        own, out = self._own(op, names), names.outputs[0]
        total = self._product(of(a), own[a], f.nonzero(b), own[b], out)
        total = total | self._product(f.nonzero(a), own[a], of(b), own[b], out)
        if bias is not None:
            total = total | project(of(bias), own[bias], f.shape(bias), out, f.shape(op.out))
        return [total, *(sets.uniform(rank(ref, f), True) for ref in op.outputs[1:])]

    def live(self, op: Op, f, seen: Seen) -> Iterable[tuple[Ref, torch.Tensor]]:
        names = self.names(op, f.trace)
        if names is None or seen[0] is None:
            yield from super().live(op, f, seen)
            return
        a, b, bias = self.operands(op)
        own, out = self._own(op, names), names.outputs[0]
        for ref, other in ((a, b), (b, a)):
            found = self._product(seen[0], out, f.nonzero(other), own[other], own[ref])
            yield ref, sets.fit(found, f.shape(ref))
        for ref in op.inputs:
            if ref == bias:
                yield ref, project(seen[0], out, f.shape(op.out), own[ref], f.shape(ref))
            elif ref not in (a, b):
                yield ref, sets.uniform(len(f.shape(ref)), True)


def _letters(dims: tuple[str | None, ...]) -> dict[str, str]:
    return dict(zip(dict.fromkeys(n for n in dims if n is not None), string.ascii_letters, strict=False))


class Fixed(Bilinear):
    """The names are those of a table: one entry per op, one list of dims per tensor of the call, then the result."""

    table = {
        "mv": "mk k m",
        "dot": "k k ",
        "vdot": "k k ",
        "ger": "m n mn",
        "linear": "*k nk n *n",
    }

    def names(self, op: Op, trace: Trace) -> Names | None:
        words = self.table[op.name].split(" ")
        given = [*words[: len(op.inputs)], words[-1]]
        lead = "".join(chr(ord("A") + d) for d in range(len(trace.info(op.inputs[0]).shape) - len(words[0]) + 1))
        dims = [tuple(word.replace("*", lead)) for word in given]
        return Names(tuple(dims[:-1]), (dims[-1],))


class GroupedMatmul(Bilinear):
    """_grouped_mm: rows of a [t, k], sorted by expert, times b [expert, k, n]; the offsets are data."""

    why = "says which rows go to which expert"
    exact = False

    def link_names(self, op: Op, names: Names, s: Structure) -> dict[str, int]:
        """As its base; the kernel wants rows of whole 16 bytes."""
        found = super().link_names(op, names, s)
        for name in {"k", "n"} & found.keys():
            s.multiples[found[name]] = 16 // s.trace.info(op.inputs[0]).dtype.itemsize
        return found

    def operands(self, op: Op) -> tuple[Ref, Ref, Ref | None]:
        return op.inputs[0], op.inputs[1], op.arg("bias")

    def names(self, op: Op, trace: Trace) -> Names | None:
        ranks = [len(trace.info(ref).shape) for ref in op.inputs[:2]]
        if ranks[1] != 3:
            return None
        a: Dims = ("!t", "k") if ranks[0] == 2 else ("!e", "!t", "k")
        b: Dims = ("!e", "k", "n")
        out: Dims = ("!t", "n") if ranks[0] == 2 else ("!e", "!t", "n")
        rest = tuple(
            ("!e", "n") if ref == op.arg("bias") else (None,) * len(trace.info(ref).shape) for ref in op.inputs[2:]
        )
        return Names((a, b, *rest), (out,))


class DeformableConvolution(Bilinear):
    """torchvision's deform_conv2d without groups: the kernel is read at places that are data."""

    exact = False

    def operands(self, op: Op) -> tuple[Ref, Ref, Ref | None]:
        return op.inputs[0], op.inputs[1], op.arg("bias")

    def names(self, op: Op, trace: Trace) -> Names | None:
        if op.arg("groups") != 1 or op.arg("offset_groups") != 1:
            return None
        dims: dict[Ref, Dims] = {ref: (None,) * len(trace.info(ref).shape) for ref in op.inputs}
        dims[op.inputs[0]], dims[op.inputs[1]] = ("n", "c", None, None), ("o", "c", None, None)
        if op.arg("bias") is not None:
            dims[op.arg("bias")] = ("o",)
        return Names(tuple(dims[ref] for ref in op.inputs), (("n", "o", None, None),))


class Trilinear(Labelled):
    """_trilinear, which nn.Bilinear is: a sum of products of three, x [n, a], w [o, a, b] and y [n, b]."""

    why = "sums over it"

    def names(self, op: Op, trace: Trace) -> Names:
        num_dims = len(op.arg("expand1")) + len(trace.info(op.inputs[0]).shape)
        letters = string.ascii_letters[:num_dims]
        dims = [tuple(n for d, n in enumerate(letters) if d not in op.arg(f"expand{i}")) for i in (1, 2, 3)]
        return Names(tuple(dims), (tuple(n for d, n in enumerate(letters) if d not in op.arg("sumdim")),))

    def link(self, op: Op, s: Structure) -> None:
        names = self.names(op, s.trace)
        found, out = self.link_names(op, names, s), names.outputs[0]
        for ref, dims in zip(op.inputs, names.inputs, strict=True):
            for d, name in enumerate(dims):
                s.role(ref, d, "producer" if name in out else "consumer")
        macs = math.prod(s.sizes[var] for var in found.values())
        weight = op.inputs[1]
        for ref, own in ((op.inputs[0], names.inputs[0]), (op.inputs[2], names.inputs[2])):
            summed = [(d, found[str(n)]) for d, n in enumerate(own) if n not in out and n in found]
            for d, var in summed:  # costs are those of the first; constants on any are kept
                factors = tuple(found.values())
                s.contractions.append(Contraction(op, ref, weight, var, factors, len(out) - 1, None, d, "", macs))
                macs = 0

    def _see(self, found: list[torch.Tensor], dims: list[Dims], to: Dims) -> torch.Tensor:
        """Elements of a tensor that see one of each set."""
        known = [n for n in to if any(n in own for own in dims)]
        text = ",".join("".join(map(str, own)) for own in dims)
        seen = torch.einsum(f"{text}->{''.join(map(str, known))}", *(x.float() for x in found)) > 0.5
        for d, n in enumerate(to):
            if n not in known:
                seen = seen.unsqueeze(d)
        return seen

    def nonzero(self, op: Op, f) -> list[torch.Tensor]:
        names = self.names(op, f.trace)
        return [self._see(list(map(f.nonzero, op.inputs)), list(names.inputs), names.outputs[0])]

    def taint(self, op: Op, f) -> list[torch.Tensor]:
        names = self.names(op, f.trace)
        total = sets.uniform(len(names.outputs[0]), False)
        for i in range(3):
            found = [f.tainted(ref) if j == i else f.nonzero(ref) for j, ref in enumerate(op.inputs)]
            total = total | self._see(found, list(names.inputs), names.outputs[0])
        return [total]

    def live(self, op: Op, f, seen: Seen) -> Iterable[tuple[Ref, torch.Tensor]]:
        names = self.names(op, f.trace)
        for i, ref in enumerate(op.inputs):
            others = [j for j in range(3) if j != i]
            found = [union(seen), *(f.nonzero(op.inputs[j]) for j in others)]
            dims = [names.outputs[0], *(names.inputs[j] for j in others)]
            yield ref, sets.fit(self._see(found, dims, names.inputs[i]), f.shape(ref))
