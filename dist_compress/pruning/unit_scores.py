"""The scores of units, each set scored by its owner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dist_compress import comm
from dist_compress.errors import UserError
from dist_compress.pruning.evidence import Evidence, Found, view
from dist_compress.pruning.listener import UnitListener
from dist_compress.pruning.unit_listeners import heard_together
from dist_compress.pruning.units import UnitSet


def own_scores(
    evidence: Evidence, found: Found, listeners: Mapping[str, UnitListener], sums: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """float64 [units of all sets]: those of the sets this rank owns, zero elsewhere. Local. `sums`: of what the
    `listeners` heard, over all ranks."""
    sets, metrics = evidence.sets, evidence.metrics
    means: dict[int, torch.Tensor] = {}
    driven = heard_together(sets, metrics)
    for heard, listener in listeners.items():
        means |= dict(zip(driven[heard], listener.means(sums[heard]), strict=True))
    sizes = [s.num_units for s in sets]
    device = next(evidence.projection.model.parameters()).device
    flat = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
    for i, (s, out) in enumerate(zip(sets, flat.split(sizes), strict=True)):
        if evidence.owner[i] == comm.rank():
            seen = view(s, lambda name: evidence.whole(name, found), means.get(i))
            out.copy_(metrics[s.targets[0]].unit_scores(seen))
    return flat


def by_set(flat: torch.Tensor, sets: Sequence[UnitSet]) -> list[torch.Tensor]:
    """The scores of all ranks as float32 [num_units] of each set, on the CPU. Local. Raises UserError for NaN."""
    scores = flat.float().cpu().split([s.num_units for s in sets])
    for s, values in zip(sets, scores, strict=True):
        if values.isnan().any():
            raise UserError(
                f"{s.name}: {int(values.isnan().sum())} pruning scores ({s.setting.said_by('method')}) are NaN. "
                "Its weights or gradients have diverged; lower optim.lr or prune later."
            )
    return list(scores)
