"""Rules that say in one line what an op of the user's does: register_op(torch.ops.my.op, Pointwise())."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dist_compress.errors import UserError
from dist_compress.speedup import bilinear, elementwise, movement
from dist_compress.speedup.execute import execute
from dist_compress.speedup.labelled import Dims, Labelled, Names, take
from dist_compress.speedup.structure import Structure
from dist_compress.tracing import ModuleCall, Op, Ref, Trace


class Pointwise(elementwise.Pointwise):
    """Element i of the result is a function of element i of the operands, which broadcast as in PyTorch.

    `keeps_zero`: the function of zeros is zero; only used where a plan is made without values (meta device).
    """

    def __init__(self, keeps_zero: bool = False):
        self.keeps_zero = keeps_zero

    def link(self, op: Op, s: Structure) -> None:
        shapes = [s.trace.info(ref).shape for ref in op.inputs]
        for out in op.outputs:
            if out is not None and tuple(torch.broadcast_shapes(*shapes)) != s.trace.info(out).shape:
                raise UserError(
                    f"{op.name} in {op.module or 'the model itself'} is registered as Pointwise, but makes "
                    f"{s.trace.info(out).shape} of {', '.join(map(str, shapes))}."
                )
        super().link(op, s)

    def _sources(self, op: Op) -> tuple[Ref, ...] | None:
        return op.inputs if self.keeps_zero else None


class Movement(movement.Move):
    """Each element of the result is one of the first operand or its negative, or zero; found by running the op.

    The op must run on float64 tensors on the CPU, of any values.
    """

    def maps(self, op: Op, shape: tuple[int, ...], constants: dict[int, torch.Tensor]) -> list[Any]:
        return super().maps(_in_floats(op), shape, constants)

    def _elements(self, op: Op, shape: tuple[int, ...], constants: dict[int, torch.Tensor]) -> list[torch.Tensor]:
        return super()._elements(_in_floats(op), shape, constants)


@dataclass(frozen=True)
class _Floats:
    """Calls an op that has no integer kernel on integers."""

    target: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args = tuple(a.double() if isinstance(a, torch.Tensor) else a for a in args)
        result = self.target(*args, **kwargs)
        many = isinstance(result, (tuple, list))
        made = [r.abs().round().long() if isinstance(r, torch.Tensor) else r for r in (result if many else [result])]
        return made if many else made[0]


def _in_floats(op: Op) -> Op:
    return Op(_Floats(op.target), op.args, op.kwargs, op.inputs, op.outputs, op.module)  # type: ignore[arg-type]


class _Aligned(Labelled):
    """Operands and results are aligned at their last dims; some of the dims are kept whole, the others pass."""

    def __init__(self, dims: int | Sequence[int] | None):
        self.dims = dims if dims is None else (dims,) if isinstance(dims, int) else tuple(dims)

    def _passes(self, d: int, num_dims: int) -> bool:
        raise NotImplementedError

    def _named(self, num_dims: int) -> set[int]:
        """The given dims, counted from the end; an own dim that there is not is an error."""
        for d in self.dims or ():
            if not -num_dims <= d < num_dims:
                raise UserError(f"{type(self).__name__}(dims={self.dims}): the result has {num_dims} dims.")
        return {d % num_dims - num_dims for d in self.dims or ()}

    def names(self, op: Op, trace: Trace) -> Names | None:
        shapes = [() if ref is None else trace.info(ref).shape for ref in op.outputs]
        if not shapes or len(set(shapes)) > 1:
            return None
        num_dims, given = len(shapes[0]), len(given_inputs(op))
        names: Dims = tuple(f"d{d}" if self._passes(d, num_dims) else None for d in range(-num_dims, 0))
        inputs = []
        for i, ref in enumerate(op.inputs):
            shape = trace.info(ref).shape
            own = names[num_dims - len(shape) :] if len(shape) <= num_dims and i < given else (None,) * len(shape)
            fits = all(n in (1, m) for n, m in zip(shape[::-1], shapes[0][::-1], strict=False))
            inputs.append(own if fits else (None,) * len(shape))
        return Names(tuple(inputs), (names,) * len(shapes))


class Barrier(_Aligned):
    """The given dims of the results are kept whole, as of the operands, and the others pass; without any, all dims.

    That a dim passes means: the op on some of its slices gives those slices of the op. Parameters of a module are kept.
    """

    why = "keeps it whole, as its rule says"

    def __init__(self, dims: int | Sequence[int] | None = None):
        super().__init__(dims)

    def _passes(self, d: int, num_dims: int) -> bool:
        return self.dims is not None and d not in self._named(num_dims)


class PassThrough(_Aligned):
    """The given dims pass and all others are kept whole: Barrier told from the other side."""

    why = "lets only the dims that its rule names pass"

    def __init__(self, dims: int | Sequence[int]):
        super().__init__(dims)

    def _passes(self, d: int, num_dims: int) -> bool:
        return d in self._named(num_dims)


class Bilinear(bilinear.Bilinear):
    """Linear in data `x` and in weight `w` each, plus a bias: a matmul, an einsum, a projection.

    x, w, bias: arguments by position or by name (a module's own parameters by theirs). equation: the einsum of x and w,
    such as "...i,oi->...o"; without one, which dims belong together is found by running the op on zeros and ones, and
    a dim that a window slides over is kept.
    """

    def __init__(self, x: int | str = 0, w: int | str = 1, bias: int | str | None = None, equation: str | None = None):
        self.arguments, self.equation = (x, w, bias), equation
        self.exact = True
        self._found: dict[Any, Names | None] = {}

    def operands(self, op: Op) -> tuple[Ref, Ref, Ref | None]:
        x, w, bias = (None if key is None else argument(op, key) for key in self.arguments)
        if x is None or w is None:
            raise UserError(f"{op.name}: Bilinear{self.arguments} needs two tensors; one of the arguments is none.")
        return x, w, bias

    def names(self, op: Op, trace: Trace) -> Names | None:
        shapes = [trace.info(ref).shape for ref in op.inputs]
        key = (op.target, tuple(shapes))
        if key not in self._found:
            a, b, bias = self.operands(op)
            if a == b or len(op.outputs) != 1:
                self._found[key] = None
            elif self.equation is not None:
                self._found[key] = self._by_equation(op, trace)
            else:
                self._found[key] = _by_running(op, trace, a, b, bias)
        return self._found[key]

    def _by_equation(self, op: Op, trace: Trace) -> Names:
        left, _, result = str(self.equation).replace(" ", "").partition("->")
        words = [*left.split(","), result]
        a, b, bias = self.operands(op)
        dims: dict[Ref, Dims] = {ref: (None,) * len(trace.info(ref).shape) for ref in op.inputs}
        made = []
        for word, ref in zip(words, (a, b, op.out), strict=False):
            missing = len(trace.info(ref).shape) - len(word.replace("...", ""))
            if missing < 0 or (missing and "..." not in word) or len(words) != 3:
                raise UserError(
                    f"{op.name}: the equation {self.equation!r} does not fit shapes "
                    f"{', '.join(str(trace.info(r).shape) for r in (a, b, op.out))}."
                )
            start = word.find("...")
            tail = [f"_{d}" for d in range(missing)][::-1]
            letters = list(word.replace("...", ""))
            made.append(tuple(letters if start < 0 else [*letters[:start], *tail, *letters[start:]]))
        dims[a], dims[b] = made[0], made[1]
        if bias is not None:
            dims[bias] = made[2][len(made[2]) - len(dims[bias]) :]
        return Names(tuple(dims[ref] for ref in op.inputs), (made[2],))


def argument(op: Op, key: int | str) -> Ref | None:
    """The tensor that an op got as its argument `key`, by position or name."""
    if isinstance(key, int):
        value = op.args[key] if key < len(op.args) else None
        if value is None and isinstance(op.target, ModuleCall):
            value = op.inputs[key] if key < len(op.inputs) else None
        return value if isinstance(value, Ref) else None
    if not isinstance(op.target, ModuleCall):
        value = op.arg(key)
        return value if isinstance(value, Ref) else None
    module = op.target.module
    own = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    if key in own:
        return op.inputs[len(op.inputs) - len(own) + own.index(key)]
    value = inspect.signature(module.forward).bind(*op.args, **op.kwargs).arguments.get(key)
    return value if isinstance(value, Ref) else None


def given_inputs(op: Op) -> tuple[Ref, ...]:
    """The tensors that a call got, without a module's own."""
    if not isinstance(op.target, ModuleCall):
        return op.inputs
    module = op.target.module
    return op.inputs[: len(op.inputs) - len([*module.parameters(), *module.buffers()])]


def _by_running(op: Op, trace: Trace, a: Ref, b: Ref, bias: Ref | None) -> Names | None:
    """Names from where the results of operands of zeros and ones are zero; None where that is not clear."""
    shapes = {ref: trace.info(ref).shape for ref in op.inputs}
    dims: dict[Ref, list[str | None]] = {ref: [None] * len(shape) for ref, shape in shapes.items()}
    out: list[str | None] = [None] * len(trace.info(op.out).shape)

    def reached(**slices: tuple[Ref, int, int]) -> torch.Tensor | None:
        """Which elements of the result are not zero, with one slice of some operands only."""
        tensors = []
        for ref in op.inputs:
            value = torch.zeros(shapes[ref]) if ref == bias else torch.ones(shapes[ref])
            for other, d, i in slices.values():
                if other == ref:
                    value = torch.zeros_like(value).index_fill_(d, torch.tensor([i]), 1.0) * value
            tensors.append(value.to(trace.info(ref).dtype))
        try:
            made = execute(op, tensors)
        except Exception:
            return None
        return made[0] != 0 if len(made) == 1 and made[0].dim() == len(out) else None

    for ref in (a, b):
        for d, size in enumerate(shapes[ref]):
            if size == 1:
                continue
            hits = [reached(x=(ref, d, i)) for i in (0, size - 1)]
            if any(hit is None for hit in hits):
                return None
            places = [o for o, n in enumerate(trace.info(op.out).shape) if n == size and _only(hits, o, (0, size - 1))]
            if len(places) == 1:
                dims[ref][d] = out[places[0]] = f"o{places[0]}"
    for d, size in enumerate(shapes[a]):
        for e, other in enumerate(shapes[b]):
            if size == other > 1 and dims[a][d] is None and dims[b][e] is None:
                same, different = reached(x=(a, d, 0), y=(b, e, 0)), reached(x=(a, d, 0), y=(b, e, size - 1))
                if same is not None and different is not None and bool(same.all()) and not bool(different.any()):
                    dims[a][d] = dims[b][e] = f"k{d}"
    if bias is not None and len(shapes[bias]) <= len(out):
        dims[bias] = out[len(out) - len(shapes[bias]) :]
    names = Names(tuple(tuple(dims[ref]) for ref in op.inputs), (tuple(out),))
    return names if _narrows(op, trace, names) else None


def _narrows(op: Op, trace: Trace, names: Names) -> bool:
    """Whether the op on random slices gives what it gives with all other slices zero (no width in the result)."""
    infos = [trace.info(ref) for ref in op.inputs]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _agrees(op, names, [torch.randn(info.shape).to(info.dtype) for info in infos])


def _agrees(op: Op, names: Names, tensors: list[torch.Tensor]) -> bool:
    summed = {n for dims in names.inputs for n in dims} - set(names.outputs[0])
    sizes = {n: i.shape[d] for i, dims in zip(tensors, names.inputs, strict=True) for d, n in enumerate(dims) if n}
    kept = {name: torch.randperm(size)[: max(1, size // 2)].sort().values for name, size in sizes.items()}
    masked = [t.clone() for t in tensors]
    for tensor, dims in zip(masked, names.inputs, strict=True):
        for d, name in enumerate(dims):
            if name in summed and name is not None:
                gone = torch.ones(sizes[name], dtype=torch.bool)
                gone[kept[name]] = False
                tensor.index_fill_(d, gone.nonzero().flatten(), 0)
    small = [take(t, dims, kept) for t, dims in zip(tensors, names.inputs, strict=True)]
    try:
        expected, made = take(execute(op, masked)[0], names.outputs[0], kept), execute(op, small)[0]
    except Exception:
        return False
    if made.shape != expected.shape:
        return False
    return float((made - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def _only(hits: list[Any], dim: int, indices: tuple[int, ...]) -> bool:
    """Whether each set is one slice along `dim` and nothing else."""
    for hit, index in zip(hits, indices, strict=True):
        sides = hit.any(dim=[d for d in range(hit.dim()) if d != dim]) if hit.dim() > 1 else hit
        if int(sides.sum()) != 1 or not bool(sides[index]):
            return False
    return True
