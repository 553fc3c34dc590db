"""A plan is tried on a copy: python code that holds a size of its own (a literal in a view, an offset) shows there.

The tape of the shrunk copy has to be the recorded one with the kept sizes: the same ops, every output of the shape
that was planned, every number of a pointwise op as it was, and what moves elements has to move the kept ones alike.
Where values are known, they have to agree as well.
"""

from __future__ import annotations

from itertools import repeat, zip_longest
from typing import Any

import torch
from torch import nn

from dist_compress.speedup.apply import apply
from dist_compress.speedup.capture import Capture
from dist_compress.speedup.contraction import Convolution
from dist_compress.speedup.custom import is_leaf
from dist_compress.speedup.dimwise import GroupNorm
from dist_compress.speedup.elementwise import Restride
from dist_compress.speedup.keep import Keep
from dist_compress.speedup.movement import Move, View
from dist_compress.speedup.plan import Plan
from dist_compress.speedup.rules import rule_of
from dist_compress.speedup.same_moves import moves_alike
from dist_compress.speedup.structure import Structure
from dist_compress.speedup.wrong_rule import check_user_rules
from dist_compress.tracing import ModuleCall, Op, Ref, Trace, TraceError, trace
from dist_compress.tracing.copies import copied, tensors_of
from dist_compress.tracing.verify import verify

_COUNTED = (Move, View, Convolution, GroupNorm)  # rules of ops whose numbers are sizes or follow them
_COPIES = ("clone", "contiguous", "alias", "detach")


def rehearse(given: Capture, model: nn.Module, plan: Plan, s: Structure, keep: Keep, compare: bool) -> str | None:
    """None when a shrunk copy of `model` runs as planned, else the module where it first goes wrong. Local.

    compare: whether its result has to be the one that `s.trace` recorded. Where that differs, the module is known
    only if `s.trace` has the values of all tensors, else it is "", the model itself.
    """
    recorded = s.trace
    if not compare and not plan.graphs and _runs_without_values(given, model, plan, s, keep):
        return None
    small = apply(copied(model, tensors_of(model)), plan)  # tensors that stay whole are not copied
    try:
        again = trace(small, given.args, given.kwargs)
    except TraceError as error:  # the code to blame may have run before
        skipped = _other_programs(plan, model, recorded)
        failed = _first_difference(error.recorded, s, keep, skipped, ended=False)
        return error.module if failed is None else failed
    failed = _first_difference(again, s, keep, _other_programs(plan, model, recorded))
    if failed is not None:
        return failed
    if not compare:
        return None
    dtypes = {recorded.info(ref).dtype for ref in recorded.outputs}
    if any(swap.settings.get("single") for swap in plan.swaps.values()):
        dtypes.add(torch.float32)  # norms that compute in it, whatever the model's type is
    tolerance = max(map(_tolerance, dtypes))
    if verify(recorded.result, again.result) <= tolerance:
        return None
    if any(ref.id not in recorded.values for ref in recorded.outputs):  # a run without values cannot tell where
        return ""
    again = trace(small, given.args, given.kwargs, values=True, leaves=is_leaf)
    check_user_rules(recorded, again, s, keep, tolerance)
    return _first_call_apart(recorded, again, s, keep, tolerance)


def _runs_without_values(given: Capture, model: nn.Module, plan: Plan, s: Structure, keep: Keep) -> bool:
    """Whether a shrunk copy on the meta device, which costs little, runs as planned; if not, a real one decides."""
    tensors = (*model.parameters(), *model.buffers())
    if all(t.is_meta for t in tensors):
        return False
    unreal = {id(t): t.detach().to("meta") for t in tensors}
    unreal |= {id(p): nn.Parameter(unreal[id(p)], p.requires_grad) for p in model.parameters()}
    try:
        again = trace(apply(copied(model, unreal), plan), given.args, given.kwargs)
    except Exception:  # code that reads values, or mixes in tensors of its own
        return False
    return _first_difference(again, s, keep, _other_programs(plan, model, s.trace)) is None


def _other_programs(plan: Plan, model: nn.Module, recorded: Trace) -> set[str]:
    """Modules that may run other ops than recorded: exchanged ones, leaves, and layers that get a bias."""
    owners = {fqn.rpartition(".")[0] for fqn in plan.bias}
    created = {owner for owner in owners if getattr(model.get_submodule(owner), "bias", None) is None}
    leaves = {op.module for op in recorded.tape if isinstance(op.target, ModuleCall)}
    return created | leaves | set(plan.swaps) | set(plan.resized) | set(plan.graphs)


def _first_difference(again: Trace, s: Structure, keep: Keep, skipped: set[str], ended: bool = True) -> str | None:
    """The module of the first op that is not the recorded one at the kept sizes; ops inside `skipped` may be any.

    ended: whether `again` is of a whole run.
    """
    sizes = keep.counts()
    planned = {key: tuple(sizes[v] for v in s.dims(Ref(key))) for key in s.known()}

    def kept(ref: Ref) -> list[torch.Tensor]:
        return [keep.kept[v].nonzero().flatten() for v in s.dims(ref)]

    for op, new in zip_longest(_outside(s.trace, skipped), _outside(again, skipped)):
        if new is None and not ended:
            return None
        if op is None or new is None:
            return (op or new or s.trace.tape[-1]).module
        both_views = isinstance(rule_of(op), View) and isinstance(rule_of(new), View)
        if not both_views and (op.target != new.target or len(op.outputs) != len(new.outputs)):
            return op.module
        for a, b in zip(op.outputs, new.outputs, strict=True):
            if a is not None and b is not None and a.id in planned and again.info(b).shape != planned[a.id]:
                return op.module
        if not isinstance(rule_of(op), _COUNTED) and _numbers(op) != _numbers(new):
            return op.module
        if not all(map(_same_constant, op.inputs, new.inputs, repeat(s.trace), repeat(again))):
            return op.module
        known = all(ref is None or ref.id in planned for ref in (*op.inputs[:1], *op.outputs))
        if known and not moves_alike(op, new, s.trace, again, kept):
            return op.module
    return None


def _outside(trace: Trace, modules: set[str]) -> list[Op]:
    """What ran outside of `modules`, without what depends on sizes and layouts alone: copies, strides."""
    inside = tuple(f"{module}." for module in modules)
    return [op for op in trace.tape if not _is_copy(op, trace) and not (inside and f"{op.module}.".startswith(inside))]


def _is_copy(op: Op, trace: Trace) -> bool:
    rule = rule_of(op)
    return op.name in _COPIES or (isinstance(rule, Restride) and rule.same_elements(op, trace))


def _numbers(op: Op) -> list[Any]:
    """The plain arguments of an op."""
    return [x for x in (*op.args, *op.kwargs.values()) if isinstance(x, (bool, int, float, str))]


def _same_constant(a: Ref, b: Ref, recorded: Trace, again: Trace) -> bool:
    """Whether two tensors that python made, of a size perhaps, hold the same; True for others."""
    if recorded.info(a).kind != "const" or again.info(b).kind != "const":
        return True
    one, other = recorded.values.get(a.id), again.values.get(b.id)
    if one is None or other is None or one.is_meta or other.is_meta:
        return True
    return torch.equal(one, other)


def _first_call_apart(recorded: Trace, again: Trace, s: Structure, keep: Keep, tolerance: float) -> str:
    """The first module call whose kept output is not the recorded one."""
    known = set(s.known())
    for (name, expected), (_, actual) in zip(recorded.calls, again.calls, strict=False):
        for a, b in zip(expected, actual, strict=False):
            if a.id in known and verify(_kept(recorded.values[a.id], a, s, keep), again.values[b.id]) > tolerance:
                return name
    return ""


def _kept(value: torch.Tensor, ref: Ref, s: Structure, keep: Keep) -> torch.Tensor:
    for d, var in enumerate(s.dims(ref)):
        value = value.index_select(d, keep.kept[var].nonzero().flatten().to(value.device))
    return value


def _tolerance(dtype: torch.dtype) -> float:
    return min(max(1e3 * torch.finfo(dtype).eps, 1e-11), 0.05) if dtype.is_floating_point else 0.0
