"""The student's class probabilities towards the teacher's (Hinton, Vinyals and Dean 2015, arXiv:1503.02531).

Forward KL covers all that the teacher deems possible; reverse KL settles on what it deems likeliest (Gu et al. 2023,
arXiv:2306.08543); the Jensen-Shannon divergence lies between them (Agarwal et al. 2023, arXiv:2306.13649).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dist_compress.calling import logits
from dist_compress.distillation.losses import CHUNK_ELEMENTS, Divergence, divergence
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
        assert context.example is not None and teacher.model is not None
        args, kwargs = context.example
        with untouched(context.model):
            own = self._cut(logits(context.model(*args, **kwargs)))
        theirs = self._cut(logits(teacher({"inputs": kwargs or args[0]})))
        if own.shape != theirs.shape:
            raise UserError(
                f"distillation.teacher: its logits are {list(theirs.shape)} for two samples, the student's "
                f"{list(own.shape)}. The classes must be the same: set model.num_classes of both, or "
                "distillation.options.num_classes where one vocabulary is only padded."
            )

    def loss(self, moment: Moment, batch: dict[str, Any], output: Any, answer: Any) -> torch.Tensor:
        own, theirs = self._cut(logits(output)), self._cut(logits(answer))
        own, theirs = own.flatten(0, -2), theirs.flatten(0, -2)  # [n, C] of images, [n * L, C] of text
        targets = batch["targets"].flatten()
        valid = targets != IGNORED if len(targets) == len(own) else torch.ones_like(own[:, 0], dtype=torch.bool)
        how, size = self._how(moment.temperature), max(CHUNK_ELEMENTS // own.shape[1], 1)
        parts = zip(own.split(size), theirs.split(size), valid.split(size), strict=True)
        return torch.stack([divergence(s, t, how, v).sum() for s, t, v in parts]).sum()

    def _how(self, temperature: float) -> Divergence:
        options = self.options
        return Divergence(options.kind, temperature, options.tau_squared, options.beta)

    def _cut(self, values: torch.Tensor) -> torch.Tensor:
        return values[..., : self.options.num_classes]
