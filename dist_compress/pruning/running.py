"""Running scores of blocks of weights, which take a step in every step of the training.

A rank keeps those of the blocks it decides. Their steps come from reduced gradients, before any mask is put on these.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from dist_compress import comm
from dist_compress.pruning.elements import GRAD, Elements
from dist_compress.pruning.evidence import Evidence
from dist_compress.pruning.metric import Metric


class Running:
    """Of the targets whose method accumulates. The model is placed before the first use."""

    def __init__(self, elements: Elements, metrics: Mapping[str, Metric]) -> None:
        """`metrics`: by target."""
        self.elements, self.metrics = elements, metrics
        self.tensors = [t for t in elements.tensors() if metrics[t.setting.name].accumulates]
        self._scores: dict[str, list[torch.Tensor]] = {}  # by parameter, float64 [blocks] of each run of slabs

    def step(self, evidence: Evidence) -> None:
        """Collective where blocks straddle ranks; else local, since who decides holds the weights."""
        if not self.tensors:
            return
        targets = [t.setting.name for t in self.tensors]
        evidence.keep_gradients(targets)
        found = evidence.gather(targets)
        weights, grads = evidence.rows(found), evidence.rows(found, GRAD)
        scores = self.scores()
        for tensor in self.tensors:
            step = self.metrics[tensor.setting.name].block_step
            runs = zip(scores[tensor.name], weights[tensor.name], grads[tensor.name], strict=True)
            scores[tensor.name] = [step(*run) for run in runs]

    def scores(self) -> dict[str, list[torch.Tensor]]:
        """{parameter: float64 [blocks] of each run of slabs that this rank decides}, live. Local."""
        if not self._scores:
            for tensor in self.tensors:
                runs = self.elements.placed.owned(tensor.name)
                self._scores[tensor.name] = [torch.zeros_like(r.removed, dtype=torch.float64) for r in runs]
        return self._scores

    def heard(self, targets: Collection[str]) -> dict[str, list[torch.Tensor]]:
        """{parameter: [blocks, 1] of each run of slabs} of those of `targets` that accumulate. Local."""
        due = [t.name for t in self.tensors if t.setting.name in targets]
        return {name: [score[:, None] for score in self.scores()[name]] for name in due}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """{parameter: float64 [num blocks]}, the same on every rank and at any number of ranks. Collective if there are
        any."""
        state = {}
        for tensor in self.tensors:
            runs, scores = self.elements.placed.owned(tensor.name), self.scores()[tensor.name]
            device = self.elements.removed[tensor.name].device
            state[tensor.name] = whole = torch.zeros(tensor.num, dtype=torch.float64, device=device)
            for run, score in zip(runs, scores, strict=True):
                whole[run.first_block : run.first_block + len(score)] = score
            comm.all_reduce(whole)  # each has one owner, so the sum is a copy
        return state

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Local."""
        for tensor in self.tensors:
            for run, score in zip(self.elements.placed.owned(tensor.name), self.scores()[tensor.name], strict=True):
                score.copy_(state[tensor.name][run.first_block : run.first_block + len(score)])
