"""Whether an op that moves elements does to the kept ones what the recorded op did, whatever their values are.

A roll by one, a shuffle of three groups, a slice from two on: with fewer channels and the same numbers they may give
the planned shape and yet the wrong channels, which values show only where the example input makes them nonzero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dist_compress.speedup.dim_map import DimMap, run
from dist_compress.speedup.movement import Move
from dist_compress.speedup.overlay import Write, same_writes
from dist_compress.speedup.rules import rule_of
from dist_compress.tracing import Op, Ref, Trace
from dist_compress.tracing.tape import map_tensors

Kept = Callable[[Ref], list[torch.Tensor]]  # recorded tensor -> kept positions along each dim


def moves_alike(op: Op, new: Op, recorded: Trace, again: Trace, kept: Kept) -> bool:
    """Whether `new` of `again` picks from the kept elements what `op` of `recorded` picked. True for other rules."""
    rule = rule_of(op)
    if isinstance(rule, Write):
        return same_writes(op, new, kept)
    if not isinstance(rule, Move):
        return True
    old_shape, new_shape = recorded.info(op.inputs[0]).shape, again.info(new.inputs[0]).shape
    if old_shape == new_shape and _plain(op) == _plain(new):
        return True
    old_constants, new_constants = rule.constants(op, recorded), rule.constants(new, again)
    if old_constants is None or new_constants is None:
        return True  # everything such an op touches is kept
    source = kept(op.inputs[0])
    old_maps = [m for m in rule.maps(op, old_shape, old_constants) if m is not None]
    new_maps = [m for m in rule.maps(new, new_shape, new_constants) if m is not None]
    if len(old_maps) == len(new_maps) == len(op.outputs):  # separable
        pairs = zip(op.outputs, old_maps, new_maps, strict=True)
        return all(out is None or _same_map(a, b, source, kept(out)) for out, a, b in pairs)
    ids = torch.arange(1, torch.Size(old_shape).numel() + 1).view(old_shape)
    before = run(op, op.inputs[0], ids, old_constants)
    after = run(new, new.inputs[0], _select(ids, source), new_constants)
    pairs = zip(op.outputs, before, after, strict=True)
    return all(out is None or torch.equal(_select(a, kept(out)), b) for out, a, b in pairs)


def _same_map(old: DimMap, new: DimMap, source: list[torch.Tensor], target: list[torch.Tensor]) -> bool:
    for position, (dim, index) in enumerate(old.dims):
        if dim is None:
            continue
        expected = target[position] if index is None else index[target[position]]
        if not torch.equal(_read(new, position, dim, source[dim], len(target[position])), expected):
            return False
    return all(int(source[dim][new.fixed.get(dim, 0)]) == position for dim, position in old.fixed.items())


def _read(new: DimMap, position: int, dim: int, source: torch.Tensor, size: int) -> torch.Tensor:
    """Which recorded positions of `dim` output dim `position` holds; -1 for a constant."""
    from_dim, index = new.dims[position]
    if from_dim is None:  # one position is read
        index = torch.full((size,), new.fixed.get(dim, 0))
    elif from_dim != dim:
        return torch.full((size,), -2)
    elif index is None:
        return source
    return torch.where(index >= 0, source[index.clamp(min=0)], -1)


def _select(ids: torch.Tensor, kept: list[torch.Tensor]) -> torch.Tensor:
    for dim, index in enumerate(kept):
        ids = ids.index_select(dim, index)
    return ids


def _plain(op: Op) -> Any:
    """The arguments that are no tensors."""
    return map_tensors((op.args, op.kwargs), lambda _: None)
