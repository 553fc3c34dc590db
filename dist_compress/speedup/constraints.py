"""The constraint system of a tape: what the rules of its ops link, and what cannot shrink whatever the weights are."""

from __future__ import annotations

from typing import Any

from torch import nn

from dist_compress.speedup.rules import rule_of
from dist_compress.speedup.settings import Settings
from dist_compress.speedup.structure import Structure
from dist_compress.speedup.swaps import is_attention
from dist_compress.speedup.training_only import pin_training_inputs
from dist_compress.tracing import Op, Ref, Trace
from dist_compress.tracing.walk import each_module


def build(
    trace: Trace, model: nn.Module, args: Any, kwargs: Any, settings: Settings, kind: type[Structure] = Structure
) -> Structure:
    """The constraint system of a tape (with values) of `model(*args, **kwargs)`, with what cannot shrink pinned.

    The rules of norms read `settings.norm`. Raises UserError when a name in `settings` matches nothing.
    """
    s = kind(trace, settings)
    for s.op in _read(trace):
        rule_of(s.op).link(s.op, s)
    s.op = None
    for ref in trace.inputs:
        s.pin_all(ref, "is an input of the model")
    for ref in trace.outputs:
        s.pin_all(ref, "is an output of the model")
    fixed = {
        name for m, name in each_module(model).items() if isinstance(m, nn.MultiheadAttention) and not is_attention(m)
    }
    for key, info in trace.tensors.items():
        if info.kind == "const":
            for var in s.dims(Ref(key)):
                s.pin(var, "is a tensor that python code holds")
        if info.kind == "param" and info.fqn.rpartition(".")[0] in fixed:
            for var in s.dims(Ref(key)):
                s.pin(var, "is inside a subclass of nn.MultiheadAttention, which takes its head size from its width")
    pin_training_inputs(s, model, args, kwargs)
    _pin_by_settings(s, model, settings)
    s.close()
    return s


def _read(trace: Trace) -> list[Op]:
    """The ops that the outputs need: averaged attention weights that nobody takes hold no head."""
    needed = {ref.id for ref in trace.outputs}
    found = []
    for op in reversed(trace.tape):
        if any(ref is not None and ref.id in needed for ref in op.outputs):
            needed.update(ref.id for ref in op.inputs)
            found.append(op)
    return found[::-1]


def _pin_by_settings(s: Structure, model: nn.Module, settings: Settings) -> None:
    kept = settings.kept_parameters(model)
    for key, info in s.trace.tensors.items():
        for fqn in info.all_fqns:
            if fqn in kept:
                s.pin_all(Ref(key), f"is kept by the setting keep={kept[fqn]!r}")
    barriers = settings.barrier_modules(model)
    for op in s.trace.tape if barriers else ():
        if op.module in barriers:
            for ref in (*op.inputs, *op.outputs):
                if ref is not None:
                    s.pin_all(ref, f"is kept by the setting barrier={barriers[op.module]!r}")


def pin_modules(s: Structure, modules: set[str]) -> dict[int, str]:
    """Pins (by representative) for everything that ops directly in `modules` touch."""
    pins: dict[int, str] = {}
    known = set(s.known())
    for op in s.trace.tape:
        if op.module in modules:
            for ref in (*op.inputs, *op.outputs):
                for var in s.dims(ref) if ref is not None and ref.id in known else ():
                    pins.setdefault(s.find(var), f"the code of {op.module or 'the model itself'} holds this size")
    return pins
