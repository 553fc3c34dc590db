"""Values of tensors that depend on nothing but the program: index tensors, positions, masks made by `arange`.

Recorded on a real device they are at hand; recorded on the meta device they are computed on the CPU when a rule asks.
"""

from __future__ import annotations

import torch

from dist_compress.tracing import Op, Ref, Trace
from dist_compress.tracing.tape import map_tensors


def constant(trace: Trace, ref: Ref) -> torch.Tensor | None:
    """The value on the CPU; None for what depends on inputs, and for weights and buffers without values. Local."""
    known = trace.values.get(ref.id)
    if trace.info(ref).dependent or known is None:
        return None
    if not known.is_meta:
        return known.cpu()
    makers = {out.id: op for op in trace.tape for out in op.outputs if out is not None}
    computed: dict[int, torch.Tensor | None] = {}
    for op in _needed(trace, makers, ref):
        for out, value in zip(op.outputs, _run(trace, op, computed), strict=True):
            if out is not None:
                computed[out.id] = value
    trace.values |= {key: value for key, value in computed.items() if value is not None}
    return computed.get(ref.id)


def _needed(trace: Trace, makers: dict[int, Op], ref: Ref) -> list[Op]:
    """The ops behind a tensor, in tape order."""
    found: dict[int, Op] = {}
    waiting = [ref]
    while waiting:
        op = makers.get(waiting.pop().id)
        if op is not None and id(op) not in found:
            found[id(op)] = op
            waiting.extend(op.inputs)
    return [op for op in trace.tape if id(op) in found]


def _run(trace: Trace, op: Op, computed: dict[int, torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The outputs of an op on the CPU; None when one of its inputs has no value."""

    def argument(ref: Ref) -> torch.Tensor:
        value = computed.get(ref.id, trace.values[ref.id])
        if value is None or value.is_meta:
            raise LookupError
        return value.clone()  # an in-place op must not change what was recorded

    try:
        kwargs = map_tensors(op.kwargs, argument)
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        result = op.target(*map_tensors(op.args, argument), **kwargs)
    except LookupError:
        return [None] * len(op.outputs)
    return list(result) if isinstance(result, (tuple, list)) else [result]
