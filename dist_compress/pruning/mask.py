"""Masks of parameters from removed units, and the fingerprint of all masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dist_compress import comm
from dist_compress.exchange import Exchange, Span, segments_of, within
from dist_compress.hashing import splitmix64
from dist_compress.layout import Layout
from dist_compress.projection import Masked, Projection
from dist_compress.pruning.units import UnitSet


def owners(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter -> its first name (they differ for tied parameters)."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}


def offsets(layout: Layout) -> dict[str, int]:
    """Global index of the first element of each parameter, in registration order."""
    starts, total = {}, 0
    for name, _ in layout.model.named_parameters():
        starts[name] = total
        total += layout.shape(name).numel()
    return starts


def unit_masks(layout: Layout, sets: Sequence[UnitSet], removed: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """{parameter: bool, True = keep} of all that the sets may mask: broadcastable to what this rank holds, of size 1
    in the dims nothing is removed from where it holds all. Local."""
    names = owners(layout.model)
    alive: dict[str, dict[int, torch.Tensor]] = {}
    for unit_set, gone in zip(sets, removed, strict=True):
        for member in unit_set.masked:
            full = torch.ones(layout.shape(member.fqn)[member.dim], dtype=torch.bool)
            dims = alive.setdefault(names[member.fqn], {})
            dims.setdefault(member.dim, full)[member.index[gone].flatten()] = False
    masks = {}
    for name, dims in alive.items():
        num_dims = len(layout.shape(name))
        mask = torch.ones([1] * num_dims, dtype=torch.bool)
        for dim, vector in dims.items():
            mask = mask & vector.view([-1 if d == dim else 1 for d in range(num_dims)])
        masks[name] = layout.part(name, mask).to(layout.device(name))
    return masks


def put_on(
    projection: Projection, masks: Mapping[str, torch.Tensor], soft: Mapping[str, tuple[torch.Tensor, float]]
) -> None:
    """Let masks act on weights and gradients from the next projection on; `soft`: where masked weights keep theirs, and
    the factor of the latent that is added to it. Local."""
    for name, mask in masks.items():
        if bool(mask.all()):
            take_off(projection, name)
            continue
        projection.add(name, "mask", Masked(mask))
        own, decay = soft.get(name, (None, 0.0))
        projection.mask_grad(name, mask if own is None else mask | ~own)
        projection.decay_masked(name, own, decay)


def take_off(projection: Projection, name: str) -> None:
    """No mask acts on this parameter any more. Local."""
    projection.remove(name, "mask")
    projection.mask_grad(name, None)
    projection.decay_masked(name, None)


@dataclass(frozen=True)
class Mark:
    """What one rank knows of a fingerprint of masks: the sum of splitmix64(global index) over removed elements, modulo
    2^64. It depends on neither world size, sharding nor how a mask is broadcast.
    """

    whole: int  # of what every rank holds
    share: int = 0  # of what is spread over the ranks; those of all ranks add up

    def __str__(self) -> str:
        return f"{(self.whole + self.share) % 2**64:016x}"


def fingerprint(layout: Layout, masks: Mapping[str, torch.Tensor]) -> Mark:
    """Of masks of parameters. Each element of a sharded one is counted by the first rank that holds it. Local."""
    starts = offsets(layout)
    whole = share = 0
    for name, mask in masks.items():
        if layout.is_whole(name):
            gone = (~mask).expand(layout.shape(name)).flatten().nonzero().flatten()
            whole += int(splitmix64(gone + starts[name]).sum())
            continue
        gone, at = ~mask.expand(layout.local(name).shape).flatten(), 0
        segments = segments_of(layout.holdings(name))
        for first, length in layout.runs(name, comm.rank()):
            for s in within(segments, first, first + length):
                if s.ranks[0] == comm.rank():
                    mine = gone[at + s.start - first : at + s.end - first].nonzero().flatten()
                    share += int(splitmix64(mine + (starts[name] + s.start)).sum())
            at += length
    return Mark(whole, share)


def agreed(marks: Mapping[str, Mark], step: int, also: Sequence[torch.Tensor]) -> tuple[list[str], list[torch.Tensor]]:
    """The fingerprints by what they are of, and the sums of `also`, int64 tensors, over the ranks. Collective: one for
    all. Raises RuntimeError on every rank where the ranks differ."""
    own = [torch.cat([comm.own_slot(m.whole), comm.own_slot(m.share)]) for m in marks.values()]
    slots, sums = (found := comm.sum_together([*own, *also]))[: len(own)], found[len(own) :]
    said = []
    for what, found in zip(marks, slots, strict=True):
        whole, shares = (part.tolist() for part in found.chunk(2))
        values = [str(Mark(value, sum(shares))) for value in whole]
        comm.refuse_unequal(what, values, step)
        said.append(values[0])
    return said, sums


def gathered(layout: Layout, masks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Masks of what this rank holds -> bool of the shapes of the parameters, the same on every rank. Collective if any
    is sharded."""
    sharded = [name for name in masks if not layout.is_whole(name)]
    spans = [Span(name, 0, layout.shape(name).numel()) for name in sharded]
    exchange = Exchange({name: layout.holdings(name) for name in sharded}, [spans] * comm.world_size())

    def flat(name: str) -> torch.Tensor:
        return masks[name].expand(layout.local(name).shape).reshape(-1)

    found = exchange.move(exchange.pick(flat), flat, packed=True)
    whole = {span.name: bits.view(layout.shape(span.name)) for span, bits in zip(spans, found, strict=True)}
    return {name: whole.get(name, mask) for name, mask in masks.items()}
