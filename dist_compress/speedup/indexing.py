"""Reading and writing at positions that are data: the indexed dim is kept whole, every other one passes."""

from __future__ import annotations

import torch

from dist_compress.speedup.labelled import Dims, Labelled, Names
from dist_compress.speedup.structure import Structure
from dist_compress.tracing import Op, Ref, Trace


class Indexed(Labelled):
    why = "uses data as positions along it"

    def link_names(self, op: Op, names: Names, s: Structure) -> dict[str, int]:
        """As its base; a table of weights that is read (biases of experts) goes with what it is added to."""
        for ref, dims in zip(op.inputs, names.inputs, strict=True):
            for d, name in enumerate(dims):
                if name is not None and not name.startswith("!"):
                    s.role(ref, d, "added")
        return super().link_names(op, names, s)


class Gather(Indexed):
    """gather(x, dim, index), take_along_dim."""

    def names(self, op: Op, trace: Trace) -> Names | None:
        x, index = op.inputs
        shape = trace.info(x).shape
        if not shape:
            return None
        dim = op.arg("dim") % len(shape)
        passing = _passing(dim, trace.info(index).shape, shape)
        place = tuple("i" if d == dim else name for d, name in enumerate(passing))
        return Names((tuple("!p" if d == dim else name for d, name in enumerate(passing)), place), (place,))

    def sources(self, op: Op) -> tuple[Ref, ...]:
        return op.inputs[:1]


class Scatter(Indexed):
    """scatter, scatter_add, scatter_reduce: (self, dim, index, src or a number)."""

    def names(self, op: Op, trace: Trace) -> Names | None:
        shapes = [trace.info(ref).shape for ref in op.inputs]
        if not shapes[0]:
            return None
        dim = op.arg("dim") % len(shapes[0])
        passing = _passing(dim, *shapes)
        own = tuple("!p" if d == dim else name for d, name in enumerate(passing))
        place = tuple("i" if d == dim else name for d, name in enumerate(passing))
        if len({shape[dim] for shape in shapes[1:]}) > 1:
            place = tuple(None if d == dim else name for d, name in enumerate(passing))
        return Names((own, *(place for _ in op.inputs[1:])), (own,))

    def sources(self, op: Op) -> tuple[Ref, ...] | None:
        value = op.arg("value", 0)
        return (op.inputs[0], *op.inputs[2:]) if value == 0 and op.arg("reduce") is None else None


class IndexSelect(Indexed):
    """index_select(x, dim, index [i])."""

    def names(self, op: Op, trace: Trace) -> Names | None:
        shape = trace.info(op.inputs[0]).shape
        if not shape:
            return None
        dim = op.arg("dim") % len(shape)
        names = tuple(f"d{d}" for d in range(len(shape)))
        own = tuple("!p" if d == dim else name for d, name in enumerate(names))
        return Names((own, _index(op.inputs[1], trace)), (tuple("i" if n == "!p" else n for n in own),))

    def sources(self, op: Op) -> tuple[Ref, ...]:
        return op.inputs[:1]


class IndexAdd(Indexed):
    """index_add, index_copy, index_fill, index_reduce: (self, dim, index [i], source or a number)."""

    def names(self, op: Op, trace: Trace) -> Names | None:
        shape = trace.info(op.inputs[0]).shape
        if not shape:
            return None
        dim = op.arg("dim") % len(shape)
        own = tuple("!p" if d == dim else f"d{d}" for d in range(len(shape)))
        dims: list[Dims] = [own, _index(op.inputs[1], trace)]
        for ref in op.inputs[2:]:
            same = len(trace.info(ref).shape) == len(shape)
            dims.append(tuple("i" if n == "!p" else n for n in own) if same else (None,) * len(trace.info(ref).shape))
        return Names(tuple(dims), (own,))

    def sources(self, op: Op) -> tuple[Ref, ...] | None:
        if op.name == "index_reduce" or op.arg("value", 0) != 0:
            return None
        return op.inputs[:1] if op.name == "index_fill" else (op.inputs[0], *op.inputs[2:])


class AdvancedIndex(Indexed):
    """index(x, indices) and index_put(x, indices, values): x[a, :, b]."""

    def names(self, op: Op, trace: Trace) -> Names | None:
        placed = self._place(op, trace)
        if placed is None:
            return None
        own, read, indices = placed
        dims: dict[Ref, Dims] = {op.inputs[0]: own, **indices}
        if op.name == "index":
            return Names(tuple(dims[ref] for ref in op.inputs), (read,)) if _distinct(op) else None
        values = op.arg("values")
        num_dims = len(trace.info(values).shape)
        dims.setdefault(values, read[len(read) - num_dims :])
        return Names(tuple(dims[ref] for ref in op.inputs), (own,)) if _distinct(op) else None

    def _place(self, op: Op, trace: Trace) -> tuple[Dims, Dims, dict[Ref, Dims]] | None:
        """(names of x, of what is read or written, of each index)."""
        num_dims = len(trace.info(op.inputs[0]).shape)
        own: list[str | None] = []
        indices: dict[Ref, Dims] = {}
        width, masked = 0, False
        for index in op.arg("indices"):
            if index is None:
                own.append(f"d{len(own)}")
                continue
            info = trace.info(index)
            is_mask = info.dtype in (torch.bool, torch.uint8)
            masked = masked or is_mask
            indices[index] = (None,) * len(info.shape) if is_mask else _right(len(info.shape))
            width = max(width, 1 if is_mask else len(info.shape))
            own.extend(f"!p{len(own) + k}" for k in range(len(info.shape) if is_mask else 1))
        own.extend(f"d{d}" for d in range(len(own), num_dims))
        if masked:  # how many positions a mask has is data
            indices = {ref: (None,) * len(dims) for ref, dims in indices.items()}
        result: Dims = (None,) * width if masked else _right(width)
        places = [d for d, name in enumerate(own) if str(name).startswith("!")]
        if not places:
            return None
        adjacent = places[-1] - places[0] + 1 == len(places)
        first = places[0] if adjacent else 0
        rest = [name for name in own if not str(name).startswith("!")]
        return tuple(own), (*rest[:first], *result, *rest[first:]), indices

    def sources(self, op: Op) -> tuple[Ref, ...]:
        return op.inputs[:1] if op.name == "index" else (op.inputs[0], op.arg("values"))


class MaskedScatter(Indexed):
    """masked_scatter(self, mask, source): the last dims pass if the mask is the same along them."""

    def names(self, op: Op, trace: Trace) -> Names | None:
        x, mask, source = op.inputs
        shape, source_shape = trace.info(x).shape, trace.info(source).shape
        alike = _uniform_dims(trace, mask)
        passing = 0
        while passing < min(len(source_shape), len(alike)) and alike[-1 - passing]:
            if source_shape[-1 - passing] != shape[-1 - passing]:
                break
            passing += 1
        names = [f"d{d}" if d < passing else None for d in range(len(shape))][::-1]
        own: Dims = tuple("!p" + str(d) if name is None else name for d, name in enumerate(names))
        masks = own[len(own) - len(alike) :]
        sources = (None,) * (len(source_shape) - passing) + tuple(own[len(own) - passing :])
        return Names((own, masks, sources), (own,)) if _distinct(op) else None

    def sources(self, op: Op) -> tuple[Ref, ...]:
        return op.inputs[0], op.inputs[2]


def _uniform_dims(trace: Trace, ref: Ref) -> list[bool]:
    """The dims along which a tensor is the same by construction: those it was expanded along."""
    shape = trace.info(ref).shape
    alike = [n == 1 for n in shape]
    op = next((op for op in reversed(trace.tape) if ref in op.outputs), None)
    while op is not None and op.name in ("expand", "_to_copy", "to", "clone", "contiguous", "detach", "alias"):
        source = op.inputs[0]
        before = trace.info(source).shape
        for d in range(1, len(shape) + 1):
            alike[-d] = alike[-d] or d > len(before) or before[-d] == 1
        op = next((op for op in reversed(trace.tape) if source in op.outputs), None)
    return alike


def _passing(dim: int, *shapes: tuple[int, ...]) -> tuple[str | None, ...]:
    """Names of the dims of equal size of all tensors; None for the others."""
    return tuple(f"d{d}" if len({shape[d] for shape in shapes}) == 1 else None for d in range(len(shapes[0])))


def _index(ref: Ref, trace: Trace) -> Dims:
    return ("i",) * len(trace.info(ref).shape)


def _right(num_dims: int) -> Dims:
    """Names that agree when tensors are aligned at their last dim."""
    return tuple(f"i{num_dims - 1 - d}" for d in range(num_dims))


def _distinct(op: Op) -> bool:
    """A tensor given twice would need two lists of names."""
    return len(set(op.inputs)) == len(op.inputs)
