"""The student's class probabilities towards the teacher's (Hinton, Vinyals and Dean 2015, arXiv:1503.02531).

Forward KL covers all that the teacher deems possible; reverse KL settles on what it deems likeliest (Gu et al. 2023,
arXiv:2306.08543); the Jensen-Shannon divergence lies between them (Agarwal et al. 2023, arXiv:2306.13649).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dist_compress.distillation.encoding import Encoding
from dist_compress.distillation.logit_term import LogitTerm
from dist_compress.distillation.losses import CHUNK_ELEMENTS, Divergence, TopK, divergence, topk_divergence
from dist_compress.distillation.teacher import Teacher
from dist_compress.distillation.term import Moment
from dist_compress.errors import UserError
from dist_compress.method import Context


@dataclass
class Options:
    kind: str = "forward"  # forward | reverse | jensen_shannon
    tau_squared: bool = True  # multiply by temperature^2, which keeps the gradients' size
    beta: float = 0.5  # of jensen_shannon: the teacher's share of the mixture
    num_classes: int | None = None  # compare the first ones only, where a vocabulary is padded; None: all


class Logits(LogitTerm):
    def attach(self, context: Context, teacher: Teacher, temperatures: list[float]) -> None:
        try:
            self._how(temperatures[0])
        except UserError as error:
            raise UserError(f"distillation.options: {error}") from None
        super().attach(context, teacher, temperatures)

    def check_topk(self, encoding: Encoding, temperatures: list[float]) -> None:
        if self.options.kind != "forward":
            raise UserError(
                f"distillation.options.kind={self.options.kind!r}: a stored top-{encoding.k} serves forward alone. "
                "Set forward, or write the store with distillation.store.encoding=dense_fp16."
            )
        for temperature in temperatures:
            encoding.check_temperature(temperature)

    def loss(self, moment: Moment, batch: dict[str, Any], output: Any, answer: Any) -> torch.Tensor:
        own, theirs, valid = self.both(moment, batch, output, answer)
        how, size = self._how(moment.temperature), max(CHUNK_ELEMENTS // own.shape[1], 1)
        losses = []
        for s, t, v in zip(own.split(size), theirs.split(size), valid.split(size), strict=True):
            loss = topk_divergence(s, t, how, v) if isinstance(t, TopK) else divergence(s, t, how, v)
            losses.append(loss.sum())
        return torch.stack(losses).sum()

    def _how(self, temperature: float) -> Divergence:
        options = self.options
        return Divergence(options.kind, temperature, options.tau_squared, options.beta)
