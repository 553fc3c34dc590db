"""Norm modules, whoever wrote them: recognised by what they compute, and their rule where normalised dims may go.

Under norm="exact" or "plain" a recognised norm is a leaf of the trace. A slice of its input may go only if it is zero.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from dist_compress.speedup import sets
from dist_compress.speedup.facts import Facts
from dist_compress.speedup.modules.norm import TAILS, behind, normalise
from dist_compress.speedup.rule import Rule, Seen, union
from dist_compress.speedup.structure import Structure
from dist_compress.tracing import Op, Ref

_SMALLEST = torch.finfo(torch.float64).eps  # of a norm that holds no eps, in the type it is looked at
_PLAIN = (int, float, bool, str, tuple)


@dataclass(frozen=True)
class Formula:
    """The keyword arguments of `modules.norm.normalise` that a norm module computes. A new kind of norm goes there."""

    width: int
    eps: float
    axis: int  # -1, or 1 for images
    centred: bool
    one_plus: bool
    single: bool
    cast_first: bool = False
    packed: bool = False


_recognised: dict[Any, Formula | None] = {}


def formula_of(module: nn.Module) -> Formula | None:
    """What `module` computes if it is a norm over one dim, found by running it on random data, else None. Local."""
    parameters = [p for p in module._parameters.values() if p is not None]
    shape = getattr(module, "normalized_shape", ())
    sizes = {tuple(p.shape) for p in parameters} or {tuple(shape) if isinstance(shape, (tuple, list)) else ()}
    lone = not (module._buffers or module._forward_hooks or module._forward_pre_hooks)
    lone = lone and all(type(child) in TAILS for child in module.children())  # activations behind the norm
    lone = lone and len(inspect.signature(module.forward).parameters) == 1  # no gate or residual beside the input
    if not lone or len(parameters) > 2 or len(sizes) != 1 or "forward" in vars(module):
        return None
    (size,) = sizes
    if len(size) != 1 or size[0] < 2:
        return None
    numbers = tuple((k, v) for k, v in sorted(vars(module).items()) if type(v) in _PLAIN and k != "training")
    names = tuple(name for name, p in module._parameters.items() if p is not None)
    key = (type(module), names, size, numbers, *map(repr, module.children()))
    if key not in _recognised:
        _recognised[key] = _recognise(module, names, size[0])
    formula = _recognised[key]
    if formula is not None and formula.eps == _SMALLEST:  # one that goes by the type, of half precision's sums too
        dtype = next((p.dtype for p in parameters), torch.float32)
        formula = replace(formula, eps=torch.finfo(dtype if dtype.itemsize >= 4 else torch.float32).eps)
    return formula


def norm_leaves(model: nn.Module) -> Callable[[nn.Module], bool]:
    """Whether a module of `model` is a norm; all are looked at now, since looking runs them."""
    found = {module for module in model.modules() if formula_of(module) is not None}
    return found.__contains__


def _recognise(module: nn.Module, names: tuple[str, ...], width: int) -> Formula | None:
    generator = torch.Generator().manual_seed(0)
    affine = tuple(torch.rand(width, generator=generator, dtype=torch.float64) + 0.5 for _ in names)
    epsilons = {v for v in vars(module).values() if type(v) is float} or {_SMALLEST}
    for axis, shape in ((-1, (2, 3, width)), (1, (2, width, 3, 5))):
        for eps in sorted(epsilons):
            # as small as eps, and with a mean, so that every part of the formula shows
            x = (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5) * max(eps, 1e-12) ** 0.5
            actual = _run(module, names, affine, x)
            if actual is None:
                continue
            for centred, one_plus, single in product((False, True), (False, True), (False, True)):
                if one_plus and not names:
                    continue
                formula = Formula(width, eps, axis, centred, one_plus, single)
                expected = behind(module, normalise(x, affine, **asdict(formula)))
                if bool(((actual - expected).abs().max() < (1e-6 if single else 1e-12) * expected.abs().max()).all()):
                    return _with_layout(_with_casts(formula, module, names, affine, x), module, names, affine, x)
    return None


def _with_casts(formula: Formula, module: nn.Module, names: tuple[str, ...], affine: Any, x: Tensor) -> Formula:
    """Whether the factor comes after the cast back shows in bfloat16."""
    half = tuple(p.bfloat16() for p in affine)
    actual = _run(module, names, half, x.bfloat16())
    if actual is None or not names:
        return formula
    late, first = (replace(formula, cast_first=flag) for flag in (False, True))
    results = [behind(module, normalise(x.bfloat16(), half, **asdict(f))) for f in (late, first)]
    wrong = [(result - actual).double().abs().sum() for result in results]
    return first if bool(wrong[1] < wrong[0]) else late


def _with_layout(formula: Formula, module: nn.Module, names: tuple[str, ...], affine: Any, x: Tensor) -> Formula:
    """How the result lies in memory decides which ops come after it."""
    loose = x.movedim(1, -1).contiguous().movedim(-1, 1) if formula.axis == -1 else x
    result = _run(module, names, affine, loose)
    packed = result is not None and result.movedim(formula.axis, -1).is_contiguous()
    return replace(formula, packed=packed)


def _run(module: nn.Module, names: tuple[str, ...], affine: Any, x: Tensor) -> Tensor | None:
    """The result of the module's forward with other parameters, None when it does not take this input."""
    clone = copy.copy(module)
    clone._parameters = {**module._parameters, **dict(zip(names, affine, strict=True))}
    try:
        with torch.no_grad():
            result = clone.forward(x)
    except Exception:  # made for another shape or other arguments: no norm that is known here
        return None
    return result if isinstance(result, Tensor) and result.shape == x.shape and result.dtype == x.dtype else None


class NormModule(Rule):
    """A leaf norm: all dims pass, a position of the normalised one may go where its input is zero."""

    def __init__(self, formula: Formula):
        self.formula = formula

    def link(self, op: Op, s: Structure) -> None:
        x, affine = op.inputs[0], op.inputs[1:]
        if s.sizes[s.dims(x)[self.formula.axis]] != self.formula.width:
            return super().link(op, s)
        for a, b in zip(s.dims(x), s.dims(op.out), strict=True):
            s.same(a, b)
        for ref in affine:
            s.same(s.dims(x)[self.formula.axis], s.dims(ref)[0])
            s.role(ref, 0, "affine")
        s.zeros_only.append((x, self.formula.axis))

    def taint(self, op: Op, f: Facts) -> list[Tensor]:
        tainted = sets.any_over(f.tainted(op.inputs[0]), [self.formula.axis])
        return [tainted & self._factor(op, f)]

    def nonzero(self, op: Op, f: Facts) -> list[Tensor]:
        factor = self._factor(op, f)
        return [factor | self._affine(op, f, 1) if len(op.inputs) > 2 else factor]

    def live(self, op: Op, f: Facts, seen: Seen) -> Iterable[tuple[Ref, Tensor]]:
        total = union(seen)
        yield op.inputs[0], sets.any_over(total & self._factor(op, f), [self.formula.axis])
        for ref in op.inputs[1:]:
            yield ref, sets.uniform(1, True)

    def _factor(self, op: Op, f: Facts) -> Tensor:
        """Where what the data makes is not multiplied by zero; without a mean, zero stays zero."""
        known = sets.uniform(len(f.shape(op.out)), True) if self.formula.centred else f.nonzero(op.inputs[0])
        plain_factor = len(op.inputs) > 1 and not self.formula.one_plus
        return known & self._affine(op, f, 0) if plain_factor else known

    def _affine(self, op: Op, f: Facts, position: int) -> Tensor:
        num_dims = len(f.shape(op.out))
        shape = [1] * num_dims
        shape[self.formula.axis] = -1
        return f.nonzero(op.inputs[1 + position]).reshape(shape)
