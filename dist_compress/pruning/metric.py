"""What a pruning method has to say: one number for each unit or block, higher = keep. Nothing about when or
where.

A method file holds a dataclass `Options` and one subclass of `Metric`; the pruner does the rest:
selection, masks, schedules, ranks.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from dist_compress import method
from dist_compress.config import merge
from dist_compress.errors import UserError
from dist_compress.target import Member


@dataclass
class View:
    """A set of units as its owner sees it at a decision."""

    num_units: int
    scored: tuple[Member, ...]  # the weight slices that belong to the targets
    latent: Callable[[str], torch.Tensor]  # parameter by name, uncompressed
    statistic: torch.Tensor | None = None  # float64 [num_units]: mean of `gate_statistic` since the last decision
    scales: tuple[Member, ...] = ()  # weights of the norms behind the units

    def weights(self) -> list[torch.Tensor]:
        """For each scored weight, [num_units, elements of a unit]: its slices, flattened."""
        return [slices(self.latent(member.fqn), member) for member in self.scored]


class Metric:
    """The base of every metric. Scores are local: each unit set is scored by one rank, blocks by their
    owner."""

    granularity = "out_channel"  # what `granularity: default` means
    data_driven = False  # True: training is heard, so at least one step is needed before the first decision
    # What a data-driven metric hears of units: "gates" (pruning/gates.py) or "outputs" (pruning/outputs.py); of blocks
    # the gradient, or "inputs" (pruning/inputs.py).
    hears = "gates"
    wants_gradients = False  # of "outputs" and of activations that are targets, too
    accumulates = False  # True: all steps since the start are heard; of blocks by `block_step`
    stays_removed = True  # False: every decision is taken anew, and what was removed may return
    distribution = "uniform"  # of a ratio over targets decided one by one, or "erk": see pruning/distribution.py
    masked_decay: float | None = None  # None: no gradient for masked weights; else theirs, plus this times the weight
    by_rows = False  # single weights compete with those of the same output only, unless a group or threshold is asked

    def __init__(self, options: Any) -> None:
        self.options = options

    @property
    def regrows(self) -> bool:
        return type(self).growth_scores is not Metric.growth_scores

    @property
    def solves(self) -> bool:
        return type(self).solve is not Metric.solve

    @property
    def hears_gradients(self) -> bool:
        """Scores of blocks want their gradient."""
        return (self.data_driven and self.hears != "inputs") or self.regrows

    def missing(self, blocks: bool) -> list[str]:
        """Which methods the subclass lacks to score blocks of weights or units."""
        if not blocks and (self.regrows or self.masked_decay is not None):
            return ["unit_scores"]  # these train masks of weights
        if self.hears == "inputs":
            needed = ["block_scores"] * (not self.solves) + ["input_statistic"] if blocks else ["unit_scores"]
        else:
            heard = ["gate_statistic"] + ["output_statistic"] * (self.hears == "outputs")
            running = ["block_step"] * self.accumulates
            needed = ["block_scores", *running] if blocks else ["unit_scores"] + heard * self.data_driven
        lacks = [name for name in needed if getattr(type(self), name) is getattr(Metric, name)]
        by_blocks = not self.data_driven and type(self).block_scores is not Metric.block_scores
        return [name for name in lacks if not (name == "unit_scores" and by_blocks)]

    def hears_activations(self) -> bool:
        """Whether units of an activation can be scored."""
        own = (Metric.activation_statistic, Metric.output_statistic)
        return type(self).activation_statistic is not own[0] or type(self).output_statistic is not own[1]

    def check(self, view: View) -> None:
        """Raise UserError when these units cannot be scored. Called once, before training."""

    def gate_statistic(self, gate: torch.Tensor) -> torch.Tensor:
        """What one micro-batch adds to the statistic: float64 [num_units] from dL/dgate, float64 [num_units]; of a
        metric that hears outputs from `output_statistic`, and of activations from `activation_statistic`, float64
        [samples, num_units]: unless defined, the sum over the samples."""
        return gate.sum(0) if gate.dim() > 1 else gate

    def output_statistic(self, output: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor:
        """float64 [samples, channels] from what a module put out, [samples, positions, channels], and the gradient of
        the loss with respect to it (only with `wants_gradients`)."""
        raise NotImplementedError

    def input_statistic(self, inputs: torch.Tensor) -> torch.Tensor:
        """float64 [groups, features] from the inputs of a layer, [groups, tokens, features] (see `linear_form`), or
        [groups, features, features] where the method solves. A sum over the tokens, of which means are taken next."""
        raise NotImplementedError

    def solve(
        self, weight: torch.Tensor, statistic: torch.Tensor, removed: torch.Tensor, number: int, run: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights, bool removed) of a layer, both [rows, features]: `number` of each `run` consecutive weights go,
        among them what is `removed` already, and the others may change. `weight` are those of before, `statistic` is
        the mean of `input_statistic`, [features, features]. Local: one rank solves a layer. Raises LinAlgError if it
        cannot."""
        raise NotImplementedError

    def activation_statistic(self, activation: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor:
        """The same of an activation that is a target, float64 [samples, units] from [samples, positions of a unit,
        units]. Unless defined, what a metric that hears outputs says of these."""
        return self.output_statistic(activation, grad)

    def unit_scores(self, view: View) -> torch.Tensor:
        """float64 [num_units]. Unless defined, the statistic of an activation, or else the mean over the targets of
        what `block_scores` says of a unit's weights."""
        if view.statistic is not None:
            return view.statistic
        return torch.stack([self.block_scores(weight, None).double() for weight in view.weights()]).mean(0)

    def edit_gradients(self, view: View, grad: Callable[[str], torch.Tensor | None]) -> None:
        """Add to the reduced gradients, by parameter name, before each optimizer step until the last decision. The
        same on every rank. For penalties that a method adds to the loss."""

    def updates(self, first: int, steps: Callable[[float | str, str], int]) -> Iterable[int]:
        """Steps t after `first`, the first decision, at which the method decides again beside the schedule, with the
        ratio that is due by then. `steps(value, option)` is a duration of the options in optimizer steps. The same on
        every rank."""
        return ()

    def exchanged(self, t: int) -> float:
        """Which fraction of the blocks that are kept goes at decision t, for others that come back with a weight of
        zero: those with the highest `growth_scores`. Of methods for blocks, with a ratio."""
        return 0.0

    def growth_scores(self, weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """float [n], highest first, of n blocks: their weights without masks, and their dense gradient."""
        raise NotImplementedError

    def block_step(self, score: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """The running score of n blocks after a step, float64 [n], from that before it (zero at the start), their
        weights without masks and their reduced gradient, [n, k], which is dense: that of masked weights, too."""
        raise NotImplementedError

    def block_scores(self, weight: torch.Tensor, heard: torch.Tensor | None) -> torch.Tensor:
        """float [n] of n blocks of k weights, [n, k], and, when data-driven, of what was heard of each weight, [n, k]:
        the reduced gradient of the last step, or the mean of `input_statistic` at the feature it is multiplied with;
        where the method accumulates, the running score, [n, 1]. A single weight is a block of one. The score of a
        block must not depend on which blocks come with it."""
        raise NotImplementedError


def slices(tensor: torch.Tensor, member: Member) -> torch.Tensor:
    """[num_units, elements of a unit]: what of a parameter belongs to each unit."""
    moved = tensor.movedim(member.dim, 0)
    return moved[member.index.to(tensor.device)].flatten(1)


def build_metric(name: str, options: dict[str, Any], key: str, options_key: str = "") -> Metric:
    """The metric of method `name`, named under `key`, its options under `options_key` if that differs. Local. Raises
    UserError."""
    kind = metric_class(name, key)
    module = importlib.import_module(kind.__module__)
    if not hasattr(module, "Options"):
        raise UserError(
            f"{key}.method={name!r}: {module.__name__} has no dataclass `Options`. Add one, empty if need be."
        )
    return kind(merge(module.Options, options, f"{options_key or key}.options"))


def metric_class(name: str, key: str) -> type[Metric]:
    """The metric that the file of method `name` defines. Local. Raises UserError."""
    module = method.load("pruning", f"{key}.method", name)
    found = [
        kind
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, Metric) and kind.__module__ == module.__name__
    ]
    if len(found) != 1:
        names = ", ".join(kind.__name__ for kind in found) or "none"
        raise UserError(
            f"{key}.method={name!r}: {module.__name__} must define one subclass of Metric, but has {names}."
        )
    return found[0]
