"""What slices of which tensors belong together, whatever the weights are: the constraint system of a tape.

Each dim of each tensor is a *variable*; dims that an op aligns (both sides of an addition, an output channel and
its bias) are one variable. Partial relations (concatenation, splits) are `Link`s between positions of two variables,
views that merge or split dims are `Box`es, and dims that cannot shrink are pinned with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from dist_compress.speedup import sets
from dist_compress.speedup.settings import Settings
from dist_compress.tracing import Op, Ref, Trace


@dataclass(frozen=True)
class Link:
    """Position `index_a[i]` of variable a is kept if and only if position `index_b[i]` of variable b is."""

    a: int
    index_a: torch.Tensor  # int64 [k]
    b: int
    index_b: torch.Tensor  # int64 [k]

    @cached_property
    def parts(self) -> tuple[slice | torch.Tensor, slice | torch.Tensor]:
        """`index_a` and `index_b`, each as a slice where it is one: reading that copies nothing."""
        return _part(self.index_a), _part(self.index_b)


def _part(index: torch.Tensor) -> slice | torch.Tensor:
    if not len(index):
        return slice(0, 0)
    first = int(index[0])
    return slice(first, first + len(index)) if torch.equal(index, torch.arange(first, first + len(index))) else index


@dataclass(frozen=True)
class Box:
    """The elements of the grid of `a` are the elements of the grid of `b`; both grids stay boxes.

    `source` int64 [elements of b] names the flat element of `a` behind each element of `b` (-1: none); None: the same.
    """

    a: tuple[int, ...]
    b: tuple[int, ...]
    reason: str
    source: torch.Tensor | None = None


@dataclass(frozen=True)
class Contraction:
    """A bilinear op: convolution or matmul. Variables of its dims, to find constants, costs and roles."""

    op: Op
    a: Ref  # data side
    b: Ref  # weight side
    contracted: int  # variable summed over, on the data side
    factors: tuple[int, ...]  # variables whose sizes multiply to its MACs (others are fixed)
    result_dim: int  # dim of its output that the weight makes
    groups: int | None = None  # variable of the groups of a grouped convolution
    contracted_dim: int = -1  # the dim of `a` that is summed over
    equation: str | None = None  # einsum of another op than convolution and matmul; "" where it is none
    macs: int | None = None  # of the traced call; None: of a convolution or matmul, from its shapes


@dataclass
class Structure:
    """Built by the rules, in tape order. `find` every variable before use."""

    trace: Trace
    settings: Settings
    op: Op | None = None  # whose rule is at work
    parent: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    pins: dict[int, str] = field(default_factory=dict)
    # (ref id, dim) -> producer | added | affine | consumer
    roles: dict[tuple[int, int], str] = field(default_factory=dict)
    contractions: list[Contraction] = field(default_factory=list)
    whole_groups: dict[int, int] = field(default_factory=dict)  # a GroupNorm's weight or output -> its groups
    multiples: dict[int, int] = field(default_factory=dict)  # variable -> what its size must be a multiple of
    zeros_only: list[tuple[Ref, int]] = field(default_factory=list)  # dims of which only zero slices may go (sums)
    _dims: dict[int, list[int]] = field(default_factory=dict)

    def new(self, size: int) -> int:
        self.parent.append(len(self.parent))
        self.sizes.append(size)
        return len(self.parent) - 1

    def find(self, var: int) -> int:
        while self.parent[var] != var:
            self.parent[var] = self.parent[self.parent[var]]
            var = self.parent[var]
        return var

    def roots(self) -> list[int]:
        """The variables that represent themselves."""
        return [var for var, parent in enumerate(self.parent) if var == parent]

    def dims(self, ref: Ref) -> list[int]:
        """The variables of a tensor's dims."""
        dims = self._dims.get(ref.id)
        if dims is None:
            dims = self._dims[ref.id] = [self.new(n) for n in self.trace.info(ref).shape]
        return dims

    def known(self) -> list[int]:
        """Ids of the tensors that have variables."""
        return list(self._dims)

    def same(self, a: int, b: int) -> None:
        """Two dims are one variable."""
        a, b = self.find(a), self.find(b)
        assert self.sizes[a] == self.sizes[b], (self.sizes[a], self.sizes[b])
        if a != b:
            self.parent[b] = a
            if b in self.pins:
                self.pins.setdefault(a, self.pins.pop(b))

    def link(self, a: int, index_a: torch.Tensor, b: int, index_b: torch.Tensor) -> None:
        self.links.append(Link(a, index_a, b, index_b))

    def box(self, a: Sequence[int], b: Sequence[int], op: Op, source: torch.Tensor | None = None) -> None:
        """Elements of two grids are the same; a grid of one dim each is `same`."""
        a = [var for var in a if self.sizes[var] != 1]
        b = [var for var in b if self.sizes[var] != 1]
        if source is None and len(a) == 1 and len(b) == 1:
            self.same(a[0], b[0])
        elif a and b:
            self.boxes.append(Box(tuple(a), tuple(b), reason("merges or splits dims", op), source))

    def pin(self, var: int, why: str, op: Op | None = None) -> None:
        """No position of this variable can be removed."""
        self.pins.setdefault(self.find(var), reason(why, op))

    def stays(self, ref: Ref, dim: int) -> bool:
        """Whether a dim is pinned."""
        return ref.id in self._dims and self.find(self._dims[ref.id][dim]) in self.pins

    def pin_all(self, ref: Ref, why: str, op: Op | None = None) -> None:
        for var in self.dims(ref):
            self.pin(var, why, op)

    def role(self, ref: Ref, dim: int, name: str) -> None:
        self.roles.setdefault((ref.id, dim), name)

    def close(self) -> None:
        """Resolve every variable to its representative, once all ops are in."""
        self._dims = {key: [self.find(v) for v in dims] for key, dims in self._dims.items()}
        self.links = [Link(self.find(k.a), k.index_a, self.find(k.b), k.index_b) for k in self.links]
        self.boxes = [
            Box(tuple(map(self.find, x.a)), tuple(map(self.find, x.b)), x.reason, x.source) for x in self.boxes
        ]
        self.contractions = [
            replace(
                c,
                contracted=self.find(c.contracted),
                factors=tuple(map(self.find, c.factors)),
                groups=None if c.groups is None else self.find(c.groups),
            )
            for c in self.contractions
        ]
        self.multiples = {self.find(var): n for var, n in self.multiples.items()}
        self.whole_groups = {key: self.find(var) for key, var in self.whole_groups.items()}

    def view(self, a: Ref, b: Ref, op: Op) -> None:
        """Tensor b is tensor a in another shape, in the same element order."""
        dims_a, dims_b = self.dims(a), self.dims(b)
        for left, right in sets.view_groups(self.trace.info(a).shape, self.trace.info(b).shape):
            self.box([dims_a[d] for d in left], [dims_b[d] for d in right], op)


def reason(why: str, op: Op | None) -> str:
    """One clause for people: what op of which module, and why."""
    return f"{op.name} in {op.module or 'the model itself'} {why}" if op is not None else why
