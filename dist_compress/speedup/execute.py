"""Run one op of a tape, or one leaf module, on other tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from dist_compress.tracing import ModuleCall, Op
from dist_compress.tracing.tape import map_tensors


def execute(op: Op, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors of its result, with `tensors` in place of `op.inputs`. Raises what the op raises."""
    given = dict(zip(op.inputs, tensors, strict=True))
    args, kwargs = map_tensors(op.args, given.__getitem__), map_tensors(op.kwargs, given.__getitem__)
    with torch.no_grad():
        if isinstance(op.target, ModuleCall):
            module = op.target.module
            own = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
            state = dict(zip(own, tensors[len(tensors) - len(own) :], strict=True))
            result = functional_call(module, state, args, kwargs)
        else:
            result = op.target(*args, **kwargs)
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
