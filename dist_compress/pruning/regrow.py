"""Exchange of weights at constant sparsity: drop some of those that are kept, then let as many others come back.

As in RigL (Evci et al. 2020, arXiv:1911.11134, section 3), but exactly so at any number of ranks: both choices are a
radix select over all blocks of the group (pruning/select.py). What was just dropped may come back at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch

from dist_compress.pruning.select import Group, select


@dataclass(frozen=True)
class Swap:
    """What a group exchanges. `cost` is the same on every rank."""

    cost: int  # of what goes and comes back
    growth: Sequence[torch.Tensor]  # float [n] of the blocks of each shard, highest come back first


def swapped(fraction: float, kept: int, cost: int) -> int:
    """The cost of the `fraction` of what is kept, in whole blocks of `cost`, rounded down."""
    return math.floor(Fraction(str(fraction)) * (kept // cost)) * cost


def select_swapping(
    groups: Sequence[Group],
    swaps: Mapping[str, Swap],
    checked: Sequence[tuple[str, str, Sequence[torch.Tensor]]] = (),
    also: Sequence[torch.Tensor] = (),
) -> list[list[torch.Tensor]]:
    """As `select`: what is removed of each shard of each group once those named in `swaps` have made their exchange,
    which takes as many collectives again. Collective."""
    more = {name: swap.cost for name, swap in swaps.items() if swap.cost}
    raised = []
    for group in groups:
        if group.name in more:
            assert isinstance(group.target, int), "an exchange keeps a ratio"
            group = replace(group, target=group.target + more[group.name])
        raised.append(group)
    chosen = select(raised, checked=checked, also=also)
    growing = []
    for group, masks in zip(groups, chosen, strict=True):
        if group.name in more:
            growth = [g.float().clamp(max=torch.finfo(torch.float32).max) for g in swaps[group.name].growth]
            scores = [g.masked_fill(~gone, torch.inf) for g, gone in zip(growth, masks, strict=True)]  # kept ones stay
            shards = [replace(shard, scores=s) for shard, s in zip(group.shards, scores, strict=True)]
            growing.append(replace(group, shards=shards))
    back = iter(select(growing))
    return [next(back) if group.name in more else masks for group, masks in zip(groups, chosen, strict=True)]
