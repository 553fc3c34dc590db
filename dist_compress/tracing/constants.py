"""Values of tensors that depend on no weight: index tensors, positions, masks made by `arange`.

Recorded on a real device they are at hand; recorded on the meta device they are computed on the CPU when asked for.
"""

from __future__ import annotations

import torch

from dist_compress.tracing.tape import Op, Ref, Trace, map_tensors


def constant(trace: Trace, ref: Ref) -> torch.Tensor | None:
    """The value on the CPU of what does not depend on inputs; None when weights without values made it. Local."""
    return None if trace.info(ref).dependent else known(trace, ref)


def known(trace: Trace, ref: Ref) -> torch.Tensor | None:
    """The recorded value on the CPU, or what the ops behind it give there; None when that needs unknown values."""
    value = trace.values.get(ref.id)
    if value is not None and not value.is_meta:
        return value.cpu()
    behind = _behind(trace, ref)
    if behind is None:
        return None
    computed: dict[int, torch.Tensor] = {}
    for op in behind:
        for out, value in zip(op.outputs, _run(trace, op, computed), strict=True):
            if out is not None:
                computed[out.id] = value
    trace.values |= computed
    return computed[ref.id]


def _behind(trace: Trace, ref: Ref) -> list[Op] | None:
    """The ops behind a tensor, in tape order; None when one of them reads a tensor without a value."""
    makers = {out.id: op for op in trace.tape for out in op.outputs if out is not None}
    found: dict[int, Op] = {}
    waiting = [ref]
    while waiting:
        key = waiting.pop().id
        value = trace.values.get(key)
        if value is not None and not value.is_meta:
            continue
        if key not in makers:
            return None
        op = makers[key]
        if id(op) not in found:
            found[id(op)] = op
            waiting.extend(op.inputs)
    return [op for op in trace.tape if id(op) in found]


def _run(trace: Trace, op: Op, computed: dict[int, torch.Tensor]) -> list[torch.Tensor]:
    """The outputs of an op on the CPU."""

    def argument(ref: Ref) -> torch.Tensor:
        value = computed[ref.id] if ref.id in computed else trace.values[ref.id]
        return value.clone()  # an in-place op must not change what was recorded

    kwargs = map_tensors(op.kwargs, argument)
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    result = op.target(*map_tensors(op.args, argument), **kwargs)
    return list(result) if isinstance(result, (tuple, list)) else [result]
