"""Search for the ratio of each set of a global group, by simulated annealing on measurements of the masked model.

As in AutoCompress (Liu et al. 2020, arXiv:1907.03141, section 3.2) and NNI's SimulatedAnnealingPruner. A candidate
gives each set of units a weight; the least important of each set go, so that their shares of the sets are in proportion
to the weights and the budget of the group is spent exactly, within the bounds of its members. All weights equal is the
uniform ratio, where the search starts. A step multiplies some of them by exp(normal draw * perturbation); a candidate
that is worse by a fraction d of the first measurement is taken with probability exp(-d / temperature), and both,
temperature and perturbation, fall as the search goes on. The best candidate measured wins.

Draws come from a generator seeded by the run, and a measurement is the same on every rank: all ranks take the same
steps, at any number of ranks. A search that was killed starts again and finds the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dist_compress.config import SearchConfig
from dist_compress.errors import UserError
from dist_compress.hashing import seed_of
from dist_compress.pruning.units import UnitSet

Evaluate = Callable[[int], dict[str, float]]
Weights = dict[str, list[float]]  # by group, of each of its sets, positive
_SEARCH = 0x5EA2C4  # purpose of the seed
_LARGEST = 5.0  # of the logarithm of a weight
_LEAST_STEP = 0.1  # of the perturbation, at the end


class Search:
    """The search of a run over all its global groups at once. The same on every rank."""

    def __init__(self, config: SearchConfig, seed: int, sizes: Mapping[str, int], evaluate: Evaluate | None) -> None:
        """`sizes`: {group: number of its sets}. Raises UserError for a search that has nothing to choose from."""
        self.config, self.seed, self.sizes, self.evaluate = config, seed, dict(sizes), evaluate
        self.found: Weights = {}  # empty until the search is over
        self.history: list[dict[str, Any]] = []
        if config.evaluations and not any(size > 1 for size in sizes.values()):
            raise UserError(
                f"pruning.search.evaluations={config.evaluations}: no global group has several sets of channels to "
                "choose ratios for. Give the targets a global_group_id and a granularity of channels, use at_most, or "
                "set it to 0."
            )
        if config.evaluations and evaluate is None:
            raise UserError(
                f"pruning.search.evaluations={config.evaluations}: nothing measures the model here. Pass "
                "evaluate=function(model) to attach, start a run, or set it to 0."
            )
        if config.end_temperature > config.start_temperature:
            raise UserError(
                f"pruning.search.end_temperature={config.end_temperature} is above start_temperature="
                f"{config.start_temperature}. Lower it."
            )

    @property
    def pending(self) -> bool:
        return self.config.evaluations > 0 and not self.found

    def objective(self) -> float:
        """What is measured, of the model as it is now. Collective."""
        assert self.evaluate is not None, "checked at the start"
        metrics, name = self.evaluate(self.config.samples), self.config.objective
        if name not in metrics:
            raise UserError(f"pruning.search.objective={name!r}: not measured. Choose one of {', '.join(metrics)}.")
        return float(metrics[name])

    def run(self, measure: Callable[[Weights], float]) -> None:
        """Find the weights. `measure`: of a candidate, the objective; the same on every rank."""
        sign = 1.0 if self.config.objective == "loss" else -1.0
        size = sum(self.sizes.values())
        generator = torch.Generator().manual_seed(seed_of(self.seed, _SEARCH))
        current = best = torch.zeros(size, dtype=torch.float64)
        first = energy = lowest = sign * measure(self._weights(current))
        if not math.isfinite(first):
            raise UserError(
                f"pruning.search: {self.config.objective} is {sign * first} with the uniform ratio. The weights have "
                "diverged, or the ratio leaves nothing; lower optim.lr, or sparse_ratio."
            )
        self.history = [{"objective": sign * first, "taken": True, "best": sign * first}]
        for i in range(1, self.config.evaluations):
            cooled = (self.config.end_temperature / self.config.start_temperature) ** (
                (i - 1) / max(self.config.evaluations - 2, 1)
            )
            candidate = _step(current, self.config.perturbation * max(cooled, _LEAST_STEP), generator)
            chance = float(torch.rand((), generator=generator, dtype=torch.float64))
            value = sign * measure(self._weights(candidate))
            worse = (value - energy) / (abs(first) or 1.0)
            taken = worse <= 0 or chance < math.exp(-worse / (self.config.start_temperature * cooled))
            if taken:
                current, energy = candidate, value
            if value < lowest:
                best, lowest = candidate, value
            self.history.append({"objective": sign * value, "taken": taken, "best": sign * lowest})
        self.found = self._weights(best)

    def _weights(self, logs: torch.Tensor) -> Weights:
        parts = logs.exp().split(list(self.sizes.values()))
        return {group: part.tolist() for group, part in zip(self.sizes, parts, strict=True)}

    def results(self, sets: Sequence[UnitSet], removed: Sequence[torch.Tensor]) -> dict[str, Any]:
        """{"ratios": {set: ratio removed}, "history": [{objective, taken, best}]}; {} without a search."""
        ratios = {s.name: float(gone.double().mean()) for s, gone in zip(sets, removed, strict=True)}
        return {"ratios": ratios, "history": self.history} if self.found else {}

    def state(self) -> str:
        return json.dumps([self.found, self.history])

    def load_state(self, state: str) -> None:
        self.found, self.history = json.loads(state)


def _step(logs: torch.Tensor, size: float, generator: torch.Generator) -> torch.Tensor:
    """Some of the logarithms, at least one, moved by normal draws of this standard deviation."""
    num = len(logs)
    draws = torch.randn(num, generator=generator, dtype=torch.float64) * size
    chosen = torch.rand(num, generator=generator, dtype=torch.float64) < max(0.25, 1 / num)
    chosen[int(torch.randint(num, (), generator=generator))] = True
    return (logs + draws * chosen).clamp(-_LARGEST, _LARGEST)
