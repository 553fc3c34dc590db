"""The student's class probabilities towards the teacher's (Hinton, Vinyals and Dean 2015, arXiv:1503.02531).

Forward KL covers all that the teacher deems possible; reverse KL settles on what it deems likeliest (Gu et al. 2023,
arXiv:2306.08543); the Jensen-Shannon divergence lies between them (Agarwal et al. 2023, arXiv:2306.13649).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from dist_compress import comm
from dist_compress.calling import Headless, logits
from dist_compress.distillation.encoding import Encoding
from dist_compress.distillation.head import Head, head_loss
from dist_compress.distillation.logit_term import LogitTerm
from dist_compress.distillation.losses import CHUNK_ELEMENTS, Divergence, TopK, divergence, topk_divergence
from dist_compress.distillation.stored import Stored
from dist_compress.distillation.teacher import OnlineTeacher, Teacher
from dist_compress.distillation.term import Moment
from dist_compress.distillation.vocabulary import KEY, rows_of, split_loss
from dist_compress.errors import UserError
from dist_compress.method import Context


@dataclass
class Options:
    kind: str = "forward"  # forward | reverse | jensen_shannon
    tau_squared: bool = True  # multiply by temperature^2, which keeps the gradients' size
    beta: float = 0.5  # of jensen_shannon: the teacher's share of the mixture
    num_classes: int | None = None  # compare the first ones only, where a vocabulary is padded; None: all


class Logits(LogitTerm):
    fuses = True
    split = False  # over the ranks, by vocabulary

    def attach(self, context: Context, teacher: Teacher, temperatures: list[float]) -> int:
        try:
            self._how(temperatures[0])
        except UserError as error:
            raise UserError(f"distillation.options: {error}") from None
        num_classes = super().attach(context, teacher, temperatures)
        self.split = context.config.distillation.teacher.mode == "vocab"
        if self.split:
            assert isinstance(teacher, OnlineTeacher)
            teacher.keep_rows(rows_of(num_classes, comm.rank()))
        return num_classes

    def check_topk(self, encoding: Encoding, temperatures: list[float]) -> None:
        if self.options.kind != "forward":
            raise UserError(
                f"distillation.options.kind={self.options.kind!r}: a stored top-{encoding.k} serves forward alone. "
                "Set forward, or write the store with distillation.store.encoding=dense_fp16."
            )
        for temperature in temperatures:
            encoding.check_temperature(temperature)

    def loss(self, moment: Moment, batch: dict[str, Any], output: Any, answer: Any) -> torch.Tensor:
        how = self._how(moment.temperature)
        if isinstance(found := logits(output), Headless):
            return self._fused(found, moment, batch, answer, how)
        if self.split:
            raise UserError(f"{KEY}: the task makes whole logits. Take task=causal_lm, or mode=online.")
        own, theirs, valid = self.both(moment, batch, output, answer)
        size = max(CHUNK_ELEMENTS // own.shape[1], 1)
        parts = zip(own.split(size), theirs.split(size), valid.split(size), strict=True)
        return torch.stack([_sum(s, t, v, how) for s, t, v in parts]).sum()

    def _fused(
        self, own: Headless, moment: Moment, batch: dict[str, Any], answer: Any, how: Divergence
    ) -> torch.Tensor:
        """A chunk of tokens at a time, of the student and of the teacher."""
        hidden, head = self._head(own)
        valid = self.valid(batch, len(hidden))
        if self.split:
            return split_loss(hidden, head, *self._head(logits(answer)), how, valid & batch["live"])
        if not isinstance(answer, Stored):
            return head_loss(hidden, head, *self._head(logits(answer)), how, valid=valid)[0]
        size = max(CHUNK_ELEMENTS // len(head.weight), 1)

        def part(x: torch.Tensor, weight: torch.Tensor, bias: Any, t: Any, v: torch.Tensor) -> torch.Tensor:
            return _sum(Head(weight, bias).logits(x), t, v, how)

        parts = zip(hidden.split(size), self.known(moment, answer).split(size), valid.split(size), strict=True)
        layer = (head.weight, head.bias)  # logits are made again for the gradient, not kept
        return torch.stack([checkpoint(part, x, *layer, t, v, use_reentrant=False) for x, t, v in parts]).sum()

    def _head(self, found: Headless) -> tuple[torch.Tensor, Head]:
        """Hidden states [tokens, H] and the layer, of the classes that are compared."""
        most = self.options.num_classes
        bias = None if found.bias is None else found.bias[:most]
        return found.hidden.flatten(0, -2), Head(found.weight[:most], bias)

    def _how(self, temperature: float) -> Divergence:
        options = self.options
        return Divergence(options.kind, temperature, options.tau_squared, options.beta)


def _sum(student: torch.Tensor, known: torch.Tensor | TopK, valid: torch.Tensor, how: Divergence) -> torch.Tensor:
    """Over the valid tokens, a scalar."""
    if isinstance(known, TopK):
        return topk_divergence(student, known, how, valid).sum()
    return divergence(student, known, how, valid).sum()
