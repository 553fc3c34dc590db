"""The student's class probabilities towards the teacher's (Hinton, Vinyals and Dean 2015, arXiv:1503.02531).

Forward KL covers all that the teacher deems possible; reverse KL settles on what it deems likeliest (Gu et al. 2023,
arXiv:2306.08543); the Jensen-Shannon divergence lies between them (Agarwal et al. 2023, arXiv:2306.13649).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dist_compress.calling import logits
from dist_compress.distillation.losses import CHUNK_ELEMENTS, Divergence, TopK, divergence, topk_divergence
from dist_compress.distillation.stored import Stored, StoreTeacher
from dist_compress.distillation.teacher import Teacher
from dist_compress.distillation.term import Moment, Term
from dist_compress.errors import UserError
from dist_compress.method import Context
from dist_compress.tracing.trace import untouched

IGNORED = -100  # the target of a token that does not count


@dataclass
class Options:
    kind: str = "forward"  # forward | reverse | jensen_shannon
    tau_squared: bool = True  # multiply by temperature^2, which keeps the gradients' size
    beta: float = 0.5  # of jensen_shannon: the teacher's share of the mixture
    num_classes: int | None = None  # compare the first ones only, where a vocabulary is padded; None: all


class Logits(Term):
    def attach(self, context: Context, teacher: Teacher, temperatures: list[float]) -> None:
        try:
            self._how(temperatures[0])
        except UserError as error:
            raise UserError(f"distillation.options: {error}") from None
        assert context.example is not None
        args, kwargs = context.example
        with untouched(context.model):
            own = self._cut(logits(context.model(*args, **kwargs))).shape[-1]
        if isinstance(teacher, StoreTeacher):
            theirs = self._check_store(teacher, temperatures)
        else:
            theirs = self._cut(logits(teacher({"inputs": kwargs or args[0]}))).shape[-1]
        if own != theirs:
            raise UserError(
                f"distillation.teacher: it has {theirs} classes, the student {own}. They must be the same: set "
                "model.num_classes of both, or distillation.options.num_classes where a vocabulary is only padded."
            )

    def _check_store(self, teacher: StoreTeacher, temperatures: list[float]) -> int:
        """The number of classes. Raises UserError for what the store does not tell."""
        encoding = teacher.store.encoding
        if encoding.name == "dense_fp16":
            return len(range(encoding.num_classes)[: self.options.num_classes])
        if self.options.kind != "forward":
            raise UserError(
                f"distillation.options.kind={self.options.kind!r}: a stored top-{encoding.k} serves forward alone. "
                "Set forward, or write the store with distillation.store.encoding=dense_fp16."
            )
        for temperature in temperatures:
            encoding.check_temperature(temperature)
        return encoding.num_classes

    def loss(self, moment: Moment, batch: dict[str, Any], output: Any, answer: Any) -> torch.Tensor:
        own = self._cut(logits(output)).flatten(0, -2)  # [n, C] of images, [n * L, C] of text
        theirs = answer.at(moment.temperature) if isinstance(answer, Stored) else logits(answer).flatten(0, -2)
        if isinstance(theirs, torch.Tensor):
            theirs = self._cut(theirs)
        targets = batch["targets"].flatten()
        valid = targets != IGNORED if len(targets) == len(own) else torch.ones_like(own[:, 0], dtype=torch.bool)
        how, size = self._how(moment.temperature), max(CHUNK_ELEMENTS // own.shape[1], 1)
        losses = []
        for s, t, v in zip(own.split(size), theirs.split(size), valid.split(size), strict=True):
            loss = topk_divergence(s, t, how, v) if isinstance(t, TopK) else divergence(s, t, how, v)
            losses.append(loss.sum())
        return torch.stack(losses).sum()

    def _how(self, temperature: float) -> Divergence:
        options = self.options
        return Divergence(options.kind, temperature, options.tau_squared, options.beta)

    def _cut(self, values: torch.Tensor) -> torch.Tensor:
        return values[..., : self.options.num_classes]
