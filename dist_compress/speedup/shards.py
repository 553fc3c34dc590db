"""A plan on sharded tensors: each rank shrinks the rows that it holds."""

from __future__ import annotations

import torch

from dist_compress.errors import UserError
from dist_compress.speedup.plan import Plan


def apply_to_shard(plan: Plan, fqn: str, shard: torch.Tensor, start: int) -> tuple[torch.Tensor, int]:
    """What the plan keeps of rows [start, start + len(shard)) of tensor `fqn`, and the row where it begins then. Local.

    For parameters and optimizer moments that are split along dim 0. A shard may end up empty. Raises UserError for
    rows that the tensor does not have.
    """
    if fqn not in plan.keep:
        return shard, start
    shape, stop = plan.shapes[fqn], start + shard.size(0)
    if start < 0 or stop > shape[0] or tuple(shard.shape[1:]) != shape[1:]:
        raise UserError(
            f"apply_to_shard: rows {start} to {stop} of shape {list(shard.shape)} are not a part of {fqn!r}, which has "
            f"shape {list(shape)} in the plan. Give rows of the dense tensor, before anything is shrunk."
        )
    for dim, kept in plan.keep[fqn].items():
        index = kept[(kept >= start) & (kept < stop)] - start if dim == 0 else kept
        shard = shard.index_select(dim, index.to(shard.device))
    rows = plan.keep[fqn].get(0)
    return shard, start if rows is None else int((rows < start).sum())
