"""Layers that one rank solves: which weights go, and what the others become in return.

Of the layers that are due, number i belongs to rank i mod N. Sums over inputs are reduced layer by layer, so that each
rank keeps those of its own layers only; then every owner solves its layers at the same time as the others, and weights
and masks are broadcast. With one owner the result is the same on every rank, whatever its solver rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import torch
from torch import nn

from dist_compress import comm
from dist_compress.errors import UserError
from dist_compress.linear_form import from_rows, weight_rows
from dist_compress.pruning.elements import BlockTensor
from dist_compress.pruning.inputs import Inputs
from dist_compress.pruning.metric import Metric
from dist_compress.pruning.sparsity import share

Solved = tuple[torch.Tensor, torch.Tensor]  # weights and bool, True = removed, both [groups, rows, features]


def solve(
    tensors: Sequence[BlockTensor],
    metrics: Mapping[str, Metric],
    inputs: Mapping[str, Inputs],
    model: nn.Module,
    removed: dict[str, torch.Tensor],
    fraction: float,
    latent: Callable[[str], torch.Tensor],
) -> None:
    """Decide `tensors`: write into `removed` and, in place, into their latents. Collective. `metrics` by target,
    `inputs` by parameter. Raises UserError on every rank when a layer has no solution."""
    owned: dict[str, torch.Tensor] = {}
    for i, tensor in enumerate(tensors):
        means = inputs[tensor.name].means()
        if i % comm.world_size() == comm.rank():
            owned[tensor.name] = means[tensor.setting.module]
    found: dict[str, Solved] = {}
    failures = []
    for tensor in tensors:
        if tensor.name in owned:
            module = model.get_submodule(tensor.setting.module)
            weight = weight_rows(module, latent(tensor.name))
            gone = removed[tensor.name].view(weight.shape)
            try:
                solved = _solve(tensor, metrics, weight, owned.pop(tensor.name), gone, fraction)
                if not bool(solved[0].isfinite().all()):
                    raise torch.linalg.LinAlgError("weights or inputs are no finite numbers")
                found[tensor.name] = solved
            except torch.linalg.LinAlgError as error:
                failures.append(f"{tensor.setting.name}: {error}")
    failures = [failure for of_rank in comm.gather_object(failures) for failure in of_rank]
    if failures:
        raise UserError(
            f"{'; '.join(failures)}. The layer cannot be solved with what was heard of its inputs. Raise the dampening "
            "in the options of the method, hear more data, or exclude the layer."
        )
    for i, tensor in enumerate(tensors):
        module = model.get_submodule(tensor.setting.module)
        target = latent(tensor.name)
        rows = weight_rows(module, target)
        weight = torch.empty_like(rows, memory_format=torch.contiguous_format)
        gone = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
        if tensor.name in found:
            weight, gone = found[tensor.name][0].to(rows.dtype).contiguous(), found[tensor.name][1].to(torch.uint8)
        owner = i % comm.world_size()
        target.copy_(from_rows(module, comm.broadcast(weight, owner), target.shape))
        removed[tensor.name] = comm.broadcast(gone, owner).flatten().bool()


def _solve(
    tensor: BlockTensor,
    metrics: Mapping[str, Metric],
    weight: torch.Tensor,
    mean: torch.Tensor,
    gone: torch.Tensor,
    fraction: float,
) -> Solved:
    """Group by group: weight and gone [groups, rows, features], mean [groups, features, features]. Local."""
    if tensor.setting.pattern:
        keep, run = tensor.setting.pattern
        number = math.floor(Fraction(str(fraction)) * (run - keep))
    else:
        run = weight[0].numel()
        number = math.floor(share(tensor.setting.sparse_ratio, fraction) * run)
    metric = metrics[tensor.setting.name]
    parts = [metric.solve(w, m, g, number, run) for w, m, g in zip(weight, mean, gone, strict=True)]
    return torch.stack([w for w, _ in parts]), torch.stack([g for _, g in parts])
