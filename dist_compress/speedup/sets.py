"""Boolean element sets of tensors, broadcast-compressed: size 1 along a dim means uniform along it.

A set has the rank of its tensor. Batch, tokens and space stay at size 1, so that a convolution is a boolean matmul
over [O, I]. Growing a set is always allowed: a larger set keeps more and stays exact.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch


@functools.cache
def uniform(rank: int, value: bool) -> torch.Tensor:
    """The set of everything or nothing, of a tensor with `rank` dims. Shared: no set is changed in place."""
    return torch.full((1,) * rank, value)


def is_all(s: torch.Tensor) -> bool:
    return s.numel() == 1 and bool(s)


def is_none(s: torch.Tensor) -> bool:
    """Whether a canonical set is empty."""
    return s.numel() == 1 and not bool(s)


def canonical(s: torch.Tensor) -> torch.Tensor:
    """The same set, at size 1 everywhere when it is everything or nothing."""
    size = s.numel()
    if size > 1:
        count = int(s.count_nonzero())
        if count == size or count == 0:
            return uniform(s.dim(), count == size)
    return s


def compress(s: torch.Tensor) -> torch.Tensor:
    """The same set with each uniform dim at size 1. Costs a pass per uniform dim."""
    for dim in range(s.dim()):
        if s.size(dim) > 1:
            first, last = s.narrow(dim, 0, 1), s.narrow(dim, s.size(dim) - 1, 1)
            if torch.equal(first, last) and bool((s == first).all()):
                s = first
    return s


def union(parts: Iterable[torch.Tensor], rank: int) -> torch.Tensor:
    """The union of some sets that broadcast to a tensor with `rank` dims."""
    total = None
    for s in parts:
        if s.numel() > 1:
            total = s if total is None else total | s
        elif bool(s):
            return uniform(rank, True)
    return uniform(rank, False) if total is None else pad(total, rank)


def pad(s: torch.Tensor, rank: int) -> torch.Tensor:
    """The set with dims of size 1 before its own."""
    return s if s.dim() == rank else s.reshape((1,) * (rank - s.dim()) + tuple(s.shape))


def any_over(s: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """Union over `dims`, kept at size 1."""
    if s.numel() == 1:
        return s
    wide = [dim % s.dim() for dim in dims if s.size(dim) != 1]
    return s.any(dim=tuple(wide), keepdim=True) if wide else s


def _any(s: torch.Tensor, dim: int) -> torch.Tensor:
    return s if s.size(dim) == 1 else s.any(dim, keepdim=True)


def fit(s: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Un-broadcast: the union over what a tensor of `shape` was broadcast along, with the rank of `shape`."""
    extra = s.dim() - len(shape)
    if s.numel() == 1 and extra >= 0:
        return uniform(len(shape), bool(s))
    s = any_over(s, [d for d in range(s.dim()) if d < extra or shape[d - extra] == 1])
    return s.reshape(s.shape[extra:]) if extra > 0 else s


def restrict(element_set: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Union of a full-size `element_set` over the dims along which `s` has size 1."""
    return any_over(element_set, [d for d in range(s.dim()) if s.size(d) == 1])


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Elements of a @ b that see an element of both: [..., m, k], [..., k, n] -> [..., m, n], all compressed."""
    if a.size(-1) == 1 or b.size(-2) == 1:  # uniform along what is summed over
        return _any(a, -1) & _any(b, -2)
    if a.size(-2) == 1:
        return (a.mT & b).any(-2, keepdim=True)
    if b.size(-1) == 1:
        return (a & b.mT).any(-1, keepdim=True)
    k = max(a.size(-1), b.size(-2))
    a = a.expand(*a.shape[:-1], k).float()
    b = b.expand(*b.shape[:-2], k, b.size(-1)).float()
    return (a @ b) > 0.5


def view_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The finest groups of dims with equal products in a view of `old` as `new`; dims of size 1 are in none."""
    if 0 in old:
        return []
    groups: list[tuple[list[int], list[int]]] = []
    a = [d for d, n in enumerate(old) if n != 1]
    b = [d for d, n in enumerate(new) if n != 1]
    while a and b:
        left, right = [a.pop(0)], [b.pop(0)]
        m, n = old[left[0]], new[right[0]]
        while m != n:
            if m < n:
                left.append(a.pop(0))
                m *= old[left[-1]]
            else:
                right.append(b.pop(0))
                n *= new[right[-1]]
        groups.append((left, right))
    return groups


def reshape(s: torch.Tensor, old: Sequence[int], new: Sequence[int]) -> torch.Tensor:
    """The set of a tensor of shape `old` after a view as `new`; only dims that merge or split are expanded."""
    wide, reduced = [1] * len(old), [1] * len(new)
    for left, right in view_groups(old, new):
        if any(s.size(d) != 1 for d in left):
            for d in left:
                wide[d] = old[d]
            for d in right:
                reduced[d] = new[d]
    return s.expand(wide).reshape(reduced)


def outer(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The box of per-dim keep vectors, flat: [prod of sizes]."""
    box = vectors[0]
    for vector in vectors[1:]:
        box = (box[:, None] & vector[None]).reshape(-1)
    return box


def sides(elements: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """The per-dim vectors of the bounding box of a flat element set."""
    grid = elements.reshape(tuple(sizes))
    dims = range(len(sizes))
    return [grid.any(dim=tuple(o for o in dims if o != d)) if len(sizes) > 1 else grid for d in dims]
