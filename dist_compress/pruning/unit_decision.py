"""One decision on sets of units: those that stand alone first, then what shares a budget."""

from __future__ import annotations

from collections.abc import Mapping, MutableSequence, Sequence

import torch

from dist_compress.pruning.budget import Budget
from dist_compress.pruning.metric import Metric
from dist_compress.pruning.search import Weights
from dist_compress.pruning.seen import Seen
from dist_compress.pruning.setting import AT_MOST
from dist_compress.pruning.sparsity import Ranked, decide_alone
from dist_compress.pruning.units import UnitSet


def members(gid: str, sets: Sequence[UnitSet]) -> list[int]:
    """Numbers of the sets that a budget is about."""
    return [i for i, s in enumerate(sets) if gid in (AT_MOST, s.setting.global_group_id)]


class UnitDecision:
    """Local, the same on every rank. `removed`, bool [num_units] of each set, is updated in place."""

    def __init__(
        self,
        sets: Sequence[UnitSet],
        budgets: Mapping[str, Budget],
        scorers: Mapping[str, Metric],
        due: Mapping[str, Metric],
        scores: Sequence[torch.Tensor],
        removed: MutableSequence[torch.Tensor],
    ) -> None:
        """`scorers` and `due`: the metrics of all targets, and of those that are decided now. `scores`: float32
        [num_units] of each set."""
        self.sets, self.budgets, self.due, self.scores, self.removed = sets, budgets, due, scores, removed
        self.bases = [0]
        for s in sets:
            self.bases.append(self.bases[-1] + s.num_units)
        anew = [not scorers[s.targets[0]].stays_removed for s in sets]
        self.stay = [torch.zeros_like(gone) if new else gone for new, gone in zip(anew, removed, strict=True)]

    def alone(self, fraction: float) -> None:
        """Sets outside of any group."""
        for i, s in enumerate(self.sets):
            if s.setting.global_group_id is None and s.targets[0] in self.due:
                ranked = Ranked.of(self.scores[i], self.stay[i], self.bases[i])
                self.removed[i] = torch.from_numpy(decide_alone(s, ranked, self.scores[i], fraction))

    def shared(self, fraction: float, weights: Weights) -> None:
        """What budgets are about; their sets share in proportion to `weights`, if there are any."""
        for gid, group in self.budgets.items():
            if not any(free and s.targets[0] in self.due for s, free in zip(group.sets, group.free, strict=True)):
                continue
            own = members(gid, self.sets)
            gone = [self.stay[i] if free else self.removed[i] for i, free in zip(own, group.free, strict=True)]
            given = ([self.scores[i] for i in own], gone, [self.bases[i] for i in own])
            for i, removed in zip(own, group.spend(*given, fraction, weights.get(gid)), strict=True):
                self.removed[i] = torch.from_numpy(removed)

    def tell(self, seen: Seen) -> None:
        """What was decided, by the scores that decided it; units that were gone before are not told of."""
        for i, s in enumerate(self.sets):
            if s.setting.global_group_id is None and s.targets[0] in self.due:
                scores = self.scores[i].masked_fill(self.stay[i], -torch.inf)
                seen.add(" + ".join(s.targets), [scores], [self.removed[i]])
        for gid, group in self.budgets.items():
            own = members(gid, self.sets)
            weighed = group.weighed(group.in_order()[0], [self.scores[i] for i in own])
            mine = [
                (score.masked_fill(self.stay[i], -torch.inf), self.removed[i])
                for i, score, free in zip(own, weighed, group.free, strict=True)
                if free and self.sets[i].targets[0] in self.due
            ]
            if mine:
                seen.add(group.title, [score for score, _ in mine], [gone for _, gone in mine])
