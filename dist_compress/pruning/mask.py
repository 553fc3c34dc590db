"""Masks of parameters from removed units, packed bits, and the fingerprint of all masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from dist_compress import comm
from dist_compress.hashing import splitmix64
from dist_compress.pruning.units import UnitSet


def owners(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter -> its first name (they differ for tied parameters)."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}


def offsets(model: nn.Module) -> dict[str, int]:
    """Global index of the first element of each parameter, in registration order."""
    starts, total = {}, 0
    for name, parameter in model.named_parameters():
        starts[name] = total
        total += parameter.numel()
    return starts


def unit_masks(model: nn.Module, sets: Sequence[UnitSet], removed: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """{parameter: bool, True = keep, of size 1 in the dims nothing is removed from} of all that the sets
    may mask."""
    names = owners(model)
    alive: dict[str, dict[int, torch.Tensor]] = {}
    for unit_set, gone in zip(sets, removed, strict=True):
        for member in unit_set.masked:
            parameter = model.get_parameter(member.fqn)
            full = torch.ones(parameter.shape[member.dim], dtype=torch.bool)
            dims = alive.setdefault(names[member.fqn], {})
            dims.setdefault(member.dim, full)[member.index[gone].flatten()] = False
    masks = {}
    for name, dims in alive.items():
        parameter = model.get_parameter(name)
        mask = torch.ones([1] * parameter.dim(), dtype=torch.bool)
        for dim, vector in dims.items():
            mask = mask & vector.view([-1 if d == dim else 1 for d in range(parameter.dim())])
        masks[name] = mask.to(parameter.device)
    return masks


def fingerprint(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> str:
    """16 hex digits: the sum of splitmix64(global index) over removed elements, mod 2^64.

    It depends on neither world size, sharding nor how a mask is broadcast. Local.
    """
    starts, total = offsets(model), 0
    for name, mask in masks.items():
        parameter = model.get_parameter(name)
        gone = (~mask).expand(parameter.shape).flatten().nonzero().flatten()
        total += int(splitmix64(gone + starts[name]).sum())
    return f"{total % 2**64:016x}"


def owned_slice(num: int) -> tuple[int, int]:
    """This rank's elements [start, end) of `num`: whole bytes of packed bits, as even as can be. Local."""
    num_bytes, rank, size = -(-num // 8), comm.rank(), comm.world_size()
    return min(num, num_bytes * rank // size * 8), min(num, num_bytes * (rank + 1) // size * 8)


def gather_bits(
    parts: Sequence[torch.Tensor], sizes: Sequence[int], widths: Sequence[int] | None = None
) -> list[torch.Tensor]:
    """Bool [sizes[i]] of every tensor from each rank's part of it, n / 8 bytes in all. A rank's part is its
    `owned_slice`, counted in runs of `widths[i]` bits (1). Collective."""
    widths = widths or [1] * len(sizes)
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // 8))
    device = parts[0].device if parts else torch.device("cpu")
    packed = torch.zeros(starts[-1], dtype=torch.uint8, device=device)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=device)
    for part, size, width, start in zip(parts, sizes, widths, starts, strict=False):
        if len(part):
            bits = torch.nn.functional.pad(part.to(torch.uint8), (0, -len(part) % 8)).view(-1, 8)
            first = start + owned_slice(size // width)[0] // 8 * width
            packed[first : first + len(bits)] = (bits * weights).sum(1, dtype=torch.uint8)
    comm.all_reduce(packed)  # every byte has one owner, so the sum is a copy
    return [
        (packed[start : start + -(-size // 8), None] & weights).ne(0).flatten()[:size]
        for size, start in zip(sizes, starts, strict=False)
    ]
