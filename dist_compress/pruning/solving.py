"""Layers that one rank solves: which weights go, and what the others become in return.

Layer number i belongs to rank i mod N. Sums over inputs are reduced layer by layer, so that each rank keeps those of
its own layers only; then every owner solves its layers at the same time as the others and hands out weights and masks:
to everyone, or of sharded layers to those who hold them. With one owner the result is the same on every rank, whatever
its solver rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch

from dist_compress import comm
from dist_compress.errors import UserError
from dist_compress.exchange import Exchange, Span
from dist_compress.linear_form import from_rows, weight_rows
from dist_compress.pruning.elements import BlockTensor
from dist_compress.pruning.evidence import Evidence, Found
from dist_compress.pruning.inputs import Inputs
from dist_compress.pruning.metric import Metric
from dist_compress.pruning.sparsity import share

Solved = tuple[torch.Tensor, torch.Tensor]  # weights and bool, True = removed, both [groups, rows, features]


def solve(
    tensors: Sequence[BlockTensor],
    metrics: Mapping[str, Metric],
    inputs: Mapping[str, Inputs],
    evidence: Evidence,
    seen: Found,
    fraction: float,
) -> None:
    """Decide `tensors`: what is removed and, in place, their latents. Collective. `metrics` by target, `inputs` by
    parameter; `seen` has the weights of this rank's layers. Raises UserError on every rank when a layer has no
    solution."""
    owner, model = {x.name: evidence.solver[x.name] for x in tensors}, evidence.projection.model
    own = [[name for name in owner if owner[name] == rank] for rank in range(comm.world_size())]
    before = evidence.elements.placed.gather(own)
    owned: dict[str, torch.Tensor] = {}
    for tensor in tensors:
        means = inputs[tensor.name].means(inputs[tensor.name].statistic.total())
        if owner[tensor.name] == comm.rank():
            owned[tensor.name] = means[tensor.setting.module]
    weights: dict[str, torch.Tensor] = {}
    gone: dict[str, torch.Tensor] = {}
    failures = []
    for tensor in [x for x in tensors if x.name in owned]:
        module, whole = model.get_submodule(tensor.setting.module), evidence.whole(tensor.name, seen)
        rows = weight_rows(module, whole)
        try:
            old = before[tensor.name].view(rows.shape)
            solved, removed = _solve(tensor, metrics, rows, owned.pop(tensor.name), old, fraction)
            if not bool(solved.isfinite().all()):
                raise torch.linalg.LinAlgError("weights or inputs are no finite numbers")
            weights[tensor.name] = from_rows(module, solved.to(whole.dtype), whole.shape).flatten()
            gone[tensor.name] = removed.flatten()
        except torch.linalg.LinAlgError as error:
            failures.append(f"{tensor.setting.name}: {error}")
    failures = [failure for of_rank in comm.gather_object(failures) for failure in of_rank]
    if failures:
        raise UserError(
            f"{'; '.join(failures)}. The layer cannot be solved with what was heard of its inputs. Raise the dampening "
            "in the options of the method, hear more data, or exclude the layer."
        )
    evidence.elements.placed.hand_out(gone, owner)
    _hand_out(weights, owner, evidence)


def _hand_out(weights: Mapping[str, torch.Tensor], owner: Mapping[str, int], evidence: Evidence) -> None:
    """Put the flat solutions of all owners into the latents. Collective: for whole layers one by one, so that no rank
    has more than one of them twice."""
    layout, latent = evidence.projection.layout, evidence.projection.latent
    ranks, sharded = range(comm.world_size()), {n: o for n, o in owner.items() if not layout.is_whole(n)}
    for name in owner:
        if name not in sharded:
            target = latent(name)
            solved = weights[name] if name in weights else torch.empty_like(target.reshape(-1))
            target.copy_(comm.broadcast(solved.contiguous(), owner[name]).view(target.shape))
    holdings = {n: [[(0, layout.shape(n).numel())] if r == o else [] for r in ranks] for n, o in sharded.items()}
    wants = [[Span(n, a, a + k) for n in sharded for a, k in layout.runs(n, r) if k] for r in ranks]
    exchange = Exchange(holdings, wants)
    found = exchange.move(exchange.pick(weights.__getitem__), latent)
    parts: dict[str, list[torch.Tensor]] = {name: [latent(name).new_empty(0)] for name in sharded}
    for span, part in zip(exchange.wants, found, strict=True):
        parts[span.name].append(part)
    for name, own in parts.items():
        target = latent(name)
        target.copy_(torch.cat(own).view(target.shape))


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
