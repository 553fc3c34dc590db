"""The base of the methods that compare the logits of student and teacher, asked or stored."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from dist_compress import comm
from dist_compress.calling import IGNORED, Headless, call, call_headless, logits
from dist_compress.distillation.encoding import Encoding
from dist_compress.distillation.losses import TopK
from dist_compress.distillation.stored import Stored, StoreTeacher
from dist_compress.distillation.teacher import Teacher
from dist_compress.distillation.term import Moment, Term
from dist_compress.errors import UserError
from dist_compress.method import Context
from dist_compress.tracing.untouched import untouched
from dist_compress.tracing.weightless import weightless


class LogitTerm(Term):
    """Its options have `num_classes`."""

    fuses = False  # whether its loss can be had without whole logits

    def check_topk(self, encoding: Encoding, temperatures: list[float]) -> None:
        """Raise UserError when a stored top-k does not tell enough."""
        raise UserError(
            f"distillation.method={self.name!r} needs all classes, and the store holds {encoding.k} of each sample. "
            "Set distillation.method=logits, or write the store with distillation.store.encoding=dense_fp16."
        )

    def attach(self, context: Context, teacher: Teacher, temperatures: list[float]) -> int:
        """As in Term. Returns how many classes are compared."""
        assert context.example is not None
        if context.config.task.fused_head and not self.fuses:
            raise UserError(
                f"task.fused_head=true: distillation.method={self.name!r} needs whole logits. Set it to false, or take "
                "distillation.method=logits."
            )
        args, kwargs = context.example
        inputs, headless = kwargs or args[0], context.config.task.fused_head
        with weightless(context.model, comm.device()), untouched(context.model):
            ask = partial(call_headless, key="task.fused_head") if headless else call
            own = self.num_compared(ask(context.model, inputs))
        if isinstance(teacher, StoreTeacher):
            encoding = teacher.store.encoding
            theirs = encoding.num_classes
            if encoding.name == "dense_fp16":
                theirs = len(self.cut(torch.empty(theirs)))
            else:
                self.check_topk(encoding, temperatures)
        else:
            theirs = self.num_compared(teacher({"inputs": inputs}, headless))
        if own != theirs:
            raise UserError(
                f"distillation.teacher: it has {theirs} classes, the student {own}. They must be the same: set "
                "model.num_classes of both, or distillation.options.num_classes where a vocabulary is only padded."
            )
        return own

    def both(
        self, moment: Moment, batch: dict[str, Any], output: Any, answer: Any
    ) -> tuple[torch.Tensor, torch.Tensor | TopK, torch.Tensor]:
        """The student's logits [tokens, classes] (a sample of images is one token), the teacher's, and which tokens
        count, bool [tokens]."""
        own = self.cut(logits(output)).flatten(0, -2)
        return own, self.known(moment, answer), self.valid(batch, len(own))

    def known(self, moment: Moment, answer: Any) -> torch.Tensor | TopK:
        """What the teacher says of each token."""
        theirs = answer.at(moment.temperature) if isinstance(answer, Stored) else logits(answer).flatten(0, -2)
        if isinstance(theirs, torch.Tensor):
            theirs = self.cut(theirs)
        return theirs

    def valid(self, batch: dict[str, Any], num_tokens: int) -> torch.Tensor:
        """bool [tokens]."""
        targets = batch["targets"].flatten()
        return targets != IGNORED if len(targets) == num_tokens else targets.new_ones(num_tokens, dtype=torch.bool)

    def num_compared(self, output: Any) -> int:
        """How many classes of an output are compared."""
        found = logits(output)
        return len(self.cut(found.weight[:, 0])) if isinstance(found, Headless) else self.cut(found).shape[-1]

    def cut(self, values: torch.Tensor) -> torch.Tensor:
        return values[..., : self.options.num_classes]
