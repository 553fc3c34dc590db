"""Taint forwards, liveness backwards, by the rule of each op."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from dist_compress.speedup import sets
from dist_compress.speedup.facts import Facts
from dist_compress.speedup.rules import rule_of
from dist_compress.tracing import Op, Ref, Trace


def propagate(
    trace: Trace,
    masks: Mapping[str, torch.Tensor] | None = None,
    values: Callable[[], dict[int, torch.Tensor]] = dict,
    zeros: bool = False,
    stays: Callable[[Ref, int], bool] = lambda ref, dim: False,
) -> Facts:
    """What depends on the inputs of a trace, and what its outputs can see. Local.

    Zeros are those of the trace's values, or with `masks` what follows from them without values; all as in `Facts`.
    """
    facts = Facts(trace, masks, values, zeros, stays)
    for ref in trace.inputs:
        facts.taint(ref, sets.uniform(len(facts.shape(ref)), True))
    for op in trace.tape:
        rule = rule_of(op)
        if masks is not None and op.inputs and (rule.makes_zeros or _some_zero(op, facts)):
            for ref, elements in zip(op.outputs, rule.nonzero(op, facts), strict=True):
                if ref is not None:
                    facts.set_nonzero(ref, elements)
        if facts.any_dependent(op.inputs):
            for ref, elements in zip(op.outputs, rule.taint(op, facts), strict=True):
                if ref is not None:
                    facts.taint(ref, elements)
    for ref in trace.outputs:
        facts.observe(ref, sets.uniform(len(facts.shape(ref)), True))
    for op in reversed(trace.tape):
        if not any(ref is not None for ref in op.outputs):  # python reads it, and may decide by it
            for ref in op.inputs:
                facts.observe(ref, sets.uniform(len(facts.shape(ref)), True))
            continue
        seen = [None if ref is None else facts.seen(ref) for ref in op.outputs]
        if all(s is None for s in seen) or not facts.any_dependent(op.inputs):
            continue
        for ref, elements in rule_of(op).live(op, facts, seen):
            if facts.dependent(ref):
                facts.observe(ref, elements)
    return facts


def _some_zero(op: Op, facts: Facts) -> bool:
    for ref in op.inputs:
        if not sets.is_all(facts.nonzero(ref)):
            return True
    return False
