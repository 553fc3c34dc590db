"""What is learned: the loss and the metrics of a micro-batch, as sums over its samples.

A user's own task (`task._target_`) is any object with the methods of `Classification`, and `finish` if it likes; it is
built once per rank from its keyword arguments. One with a method `call(model, inputs)` is asked to call the model.
Sums, because the loop divides by the count of the global batch, whatever the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dist_compress.calling import IGNORED, Headless, call, call_headless, logits
from dist_compress.config import TaskConfig
from dist_compress.distillation.head import Head, label_loss
from dist_compress.errors import UserError
from dist_compress.method import Method
from dist_compress.training.instantiate import instantiate

_LARGEST = 100.0  # loss whose perplexity is still told
AUXILIARY_WEIGHT = 0.3  # of GoogLeNet's side classifiers (Szegedy et al. 2014, section 5)


class Classification:
    """Cross-entropy and top-1 accuracy."""

    fixed_count = True  # count(batch) is the number of samples, so the global count needs no communication

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def loss(self, output: Any, batch: dict[str, Any]) -> torch.Tensor:
        """Sum over the samples, a scalar. `output`: logits [n, classes], or an object with `.logits`."""
        total = self._cross_entropy(logits(output), batch)
        for name in getattr(output, "_fields", ()):
            if name.startswith("aux_logits") and getattr(output, name) is not None:
                total = total + AUXILIARY_WEIGHT * self._cross_entropy(getattr(output, name), batch)
        return total

    def count(self, batch: dict[str, Any]) -> int:
        """What the loss and the metrics are divided by."""
        return len(batch["targets"])

    def metrics(self, output: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Sums over the samples, the same keys for every batch."""
        return {"accuracy": (logits(output).argmax(1) == batch["targets"]).sum()}

    def _cross_entropy(self, values: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        return F.cross_entropy(values.float(), batch["targets"], reduction="sum", label_smoothing=self.label_smoothing)


class CausalLM:
    """Next-token cross-entropy, the accuracy of the likeliest token, and perplexity. `targets` lie at the place of the
    logits that predict them; IGNORED ones count nowhere."""

    fixed_count = False  # of a global batch: its valid tokens

    def __init__(self, fused_head: bool = False) -> None:
        self.fused_head = fused_head

    def call(self, model: nn.Module, inputs: Any) -> Any:
        """How the loop calls the model, where logits must not be whole."""
        return call_headless(model, inputs, "task.fused_head") if self.fused_head else call(model, inputs)

    def loss(self, output: Any, batch: dict[str, Any]) -> torch.Tensor:
        """Sum over the valid tokens, a scalar. `output`: logits [n, tokens, vocabulary], or an object with them."""
        values, targets = logits(output), batch["targets"].flatten()
        if isinstance(values, Headless):
            head = Head(values.weight, values.bias)
            loss, values.num_correct = label_loss(values.hidden.flatten(0, -2), head, targets, targets != IGNORED)
            return loss
        values = values.flatten(0, -2)
        return F.cross_entropy(values.float(), targets, reduction="sum", ignore_index=IGNORED)

    def count(self, batch: dict[str, Any]) -> int:
        return int((batch["targets"] != IGNORED).sum())

    def metrics(self, output: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """To be called after `loss`."""
        values = logits(output)
        if isinstance(values, Headless):
            assert values.num_correct is not None
            return {"accuracy": values.num_correct}
        return {"accuracy": (values.argmax(-1) == batch["targets"]).sum()}

    def finish(self, means: dict[str, float]) -> dict[str, float]:
        """`means`: of a whole split, over its tokens."""
        return {**means, "perplexity": math.exp(min(means["loss"], _LARGEST))}


def caller(task: Any) -> Callable[[nn.Module, Any], Any]:
    """`(model, inputs) -> output` as the task wants it."""
    return getattr(task, "call", call)


def add_losses(
    task: Any, methods: Sequence[Method], step: int, batch: dict[str, Any], output: Any
) -> dict[str, torch.Tensor]:
    """Sums over the samples: "loss" is what is minimised, then its parts when there are several. Local."""
    weight = math.prod(method.task_weight(step) for method in methods)
    parts = {"task_loss": task.loss(output, batch) * weight}
    for method in methods:
        loss = method.loss(step, batch, output)
        if loss is not None:
            name = f"{type(method).__name__.lower()}_loss"
            parts |= loss if isinstance(loss, dict) else {name: loss}
    return {"loss": torch.stack(list(parts.values())).sum(), **(parts if len(parts) > 1 else {})}


def build(config: TaskConfig) -> Any:
    """The task of the run. Local. Raises UserError naming `task`."""
    if config.target is not None:
        task = instantiate(config.target, "task")
        if missing := [n for n in ("loss", "count", "metrics") if not hasattr(task, n)]:
            raise UserError(
                f"task._target_={config.target['_target_']!r}: the object has no {', '.join(missing)}. A task has "
                "loss(output, batch), count(batch) and metrics(output, batch); see training/task.py."
            )
        return task
    if config.source == "causal_lm":
        if config.label_smoothing:
            raise UserError(
                f"task.label_smoothing={config.label_smoothing}: belongs to classification; perplexity is of the plain "
                "loss. Set it to 0."
            )
        return CausalLM(config.fused_head)
    if config.fused_head:
        raise UserError(f"task.fused_head=true belongs to causal_lm, not to task.source={config.source!r}. Set false.")
    if config.source != "classification":
        raise UserError(f"task.source={config.source!r}: choose classification or causal_lm, or give task._target_.")
    return Classification(config.label_smoothing)
