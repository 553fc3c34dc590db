"""Where a shrunk model first computes something else than the masked one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dist_compress.speedup.constraints import build
from dist_compress.speedup.custom import is_leaf
from dist_compress.speedup.plan import Plan
from dist_compress.speedup.propagation import propagate
from dist_compress.speedup.settings import Settings
from dist_compress.speedup.structure import Structure
from dist_compress.tracing import Ref, Trace, trace
from dist_compress.tracing.verify import verify


def first_difference(
    masked: nn.Module, small: nn.Module, plan: Plan, inputs: tuple[tuple[Any, ...], dict[str, Any]], tolerance: float
) -> str:
    """The first op whose kept output is not the masked model's, such as "linear in head"; Local.

    Ops are compared where both models ran the same ones, else the results of modules; where neither tells, the output.
    """
    args, kwargs = inputs
    recorded = trace(masked, args, kwargs, values=True, leaves=is_leaf)
    again = trace(small, args, kwargs, values=True, leaves=is_leaf)
    s = build(recorded, masked, args, kwargs, Settings())
    kept = _kept_by(plan, s)
    facts = propagate(recorded)

    def apart(a: Ref, b: Ref) -> bool:
        value, new = recorded.values.get(a.id), again.values.get(b.id)
        if value is None or new is None or a.id not in s.known() or value.dim() != new.dim() or not facts.dependent(a):
            return False
        seen = facts.observed(a).expand(value.shape).to(value.device)
        for d, var in enumerate(s.dims(a)):
            if var in kept and len(kept[var]) == new.shape[d]:
                index = kept[var].to(value.device)
                value, seen = value.index_select(d, index), seen.index_select(d, index)
        if value.shape != new.shape:  # which slices are left is not known here
            return False
        return verify(torch.where(seen, value, 0), torch.where(seen, new, 0)) > tolerance

    if _same_ops(recorded, again):
        for op, new in zip(recorded.tape, again.tape, strict=True):
            for a, b in zip(op.outputs, new.outputs, strict=True):
                if a is not None and b is not None and apart(a, b):
                    return f"{op.name} in {op.module or 'the model itself'}"
    for (name, expected), (_, actual) in zip(recorded.calls, again.calls, strict=False):
        if any(apart(a, b) for a, b in zip(expected, actual, strict=False)):
            return f"the result of {name or 'the model itself'}"
    return "the output of the model"


def _same_ops(a: Trace, b: Trace) -> bool:
    if len(a.tape) != len(b.tape):
        return False
    return all(x.name == y.name and len(x.outputs) == len(y.outputs) for x, y in zip(a.tape, b.tape, strict=True))


def _kept_by(plan: Plan, s: Structure) -> dict[int, torch.Tensor]:
    """{variable of a parameter's dim that shrinks: its kept positions}."""
    kept = {}
    for key in s.known():
        for fqn in s.trace.info(Ref(key)).all_fqns[:1]:
            for dim, index in plan.keep.get(fqn, {}).items():
                kept[s.dims(Ref(key))[dim]] = index
    return kept
