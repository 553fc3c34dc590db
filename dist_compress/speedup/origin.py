"""From an operand back to the parameter behind it: `weight.t()` in a linear layer is the weight."""

from __future__ import annotations

from dist_compress.speedup import weight_norm
from dist_compress.speedup.movement import Move
from dist_compress.speedup.rules import rule_of
from dist_compress.tracing import Op, Ref, Trace

_SAME = ("detach", "alias", "clone", "_to_copy", "to", "contiguous", *weight_norm.NAMES)


def makers(trace: Trace) -> dict[int, Op]:
    """Which op made each tensor."""
    return {ref.id: op for op in trace.tape for ref in op.outputs if ref is not None}


def layer_of(fqn: str) -> tuple[str, str]:
    """(module, "weight") of a weight or of what its parametrization or weight norm holds, else (owner, own name)."""
    owner, _, name = fqn.rpartition(".")
    layer, _, parametrized = f".{owner}".rpartition(".parametrizations.")
    if parametrized == "weight" and name in ("original", "original1"):
        return layer.lstrip("."), "weight"
    return owner, "weight" if name in ("weight_v", "weight_orig") else name


def behind(
    trace: Trace, made_by: dict[int, Op], ref: Ref, repeated: bool = False
) -> tuple[Ref | None, list[int | None]]:
    """(the parameter, its dim for each dim of `ref`; None for a dim it does not have), or (None, []).

    Follows transposes and casts only, so that the parameter's elements are the operand's elements, and a weight norm
    to what it normalises; where `repeated`, what is repeated for each sample too (the affine of an instance norm).
    """
    dims: list[int | None] = list(range(len(trace.info(ref).shape)))
    while trace.info(ref).kind == "value" and not trace.info(ref).dependent:
        op = made_by[ref.id]
        if op.name in _SAME:
            ref = op.inputs[0]
            continue
        rule = rule_of(op)
        if type(rule) is not Move or len(op.inputs) != 1 or len(op.outputs) != 1:
            return None, []
        source = op.inputs[0]
        shape = trace.info(source).shape
        dim_map = rule.maps(op, shape, {})[0] if 0 not in shape else None
        whole = repeated and op.name == "repeat"
        if dim_map is None or any(index is not None and not whole for _, index in dim_map.dims):
            return None, []
        moved = [dim for dim, _ in dim_map.dims]
        dims = [None if d is None else moved[d] for d in dims]
        ref = source
    return (ref, dims) if trace.info(ref).kind == "param" else (None, [])
