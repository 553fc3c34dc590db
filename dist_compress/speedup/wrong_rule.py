"""When a shrunk copy gives another output: whether a rule of the user's is to blame, which must not pass in silence."""

from __future__ import annotations

import torch

from dist_compress.errors import UserError
from dist_compress.speedup.facts import Facts
from dist_compress.speedup.keep import Keep
from dist_compress.speedup.propagation import propagate
from dist_compress.speedup.rules import rule_of
from dist_compress.speedup.structure import Structure
from dist_compress.tracing import Ref, Trace
from dist_compress.tracing.verify import verify


def check_user_rules(recorded: Trace, again: Trace, s: Structure, keep: Keep, tolerance: float) -> None:
    """Raise UserError if the first op whose observed output differs follows a rule of the user's. Local.

    Both traces hold values and treat the same modules as leaves; where the ops are not the same, nothing is said.
    """
    if not any(rule_of(op).user for op in recorded.tape) or len(recorded.tape) != len(again.tape):
        return
    facts = propagate(recorded)
    for op, new in zip(recorded.tape, again.tape, strict=True):
        if op.name != new.name or len(op.outputs) != len(new.outputs):
            return
        for a, b in zip(op.outputs, new.outputs, strict=True):
            if a is None or b is None or a.id not in s.known() or not facts.dependent(a):
                continue
            error = _difference(a, recorded.values[a.id], again.values[b.id], s, keep, facts)
            if error <= tolerance:
                continue
            if rule_of(op).user:
                raise UserError(
                    f"The rule registered for {op.name} is wrong: in {op.module or 'the model itself'}, the first op "
                    f"whose output changes, it lets slices go that the result needs (relative difference {error:.2g}). "
                    "Correct its link() and taint(), or register Barrier()."
                )
            return


def _difference(ref: Ref, value: torch.Tensor, new: torch.Tensor, s: Structure, keep: Keep, facts: Facts) -> float:
    """As `verify`, of the kept slices, where the output sees them."""
    seen = facts.observed(ref).expand(value.shape).to(value.device)
    for d, var in enumerate(s.dims(ref)):
        index = keep.kept[var].nonzero().flatten().to(value.device)
        value, seen = value.index_select(d, index), seen.index_select(d, index)
    if value.shape != new.shape:
        return float("inf")
    return verify(torch.where(seen, value, 0), torch.where(seen, new.to(value.dtype), 0))
