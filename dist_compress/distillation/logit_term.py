"""The base of the methods that compare the logits of student and teacher, asked or stored."""

from __future__ import annotations

from typing import Any

import torch

from dist_compress.calling import IGNORED, logits
from dist_compress.distillation.encoding import Encoding
from dist_compress.distillation.losses import TopK
from dist_compress.distillation.stored import Stored, StoreTeacher
from dist_compress.distillation.teacher import Teacher
from dist_compress.distillation.term import Moment, Term
from dist_compress.errors import UserError
from dist_compress.method import Context
from dist_compress.tracing.untouched import untouched


class LogitTerm(Term):
    """Its options have `num_classes`."""

    def check_topk(self, encoding: Encoding, temperatures: list[float]) -> None:
        """Raise UserError when a stored top-k does not tell enough."""
        raise UserError(
            f"distillation.method={self.name!r} needs all classes, and the store holds {encoding.k} of each sample. "
            "Set distillation.method=logits, or write the store with distillation.store.encoding=dense_fp16."
        )

    def attach(self, context: Context, teacher: Teacher, temperatures: list[float]) -> None:
        assert context.example is not None
        args, kwargs = context.example
        with untouched(context.model):
            own = self.cut(logits(context.model(*args, **kwargs))).shape[-1]
        if isinstance(teacher, StoreTeacher):
            encoding = teacher.store.encoding
            theirs = encoding.num_classes
            if encoding.name == "dense_fp16":
                theirs = len(range(theirs)[: self.options.num_classes])
            else:
                self.check_topk(encoding, temperatures)
        else:
            theirs = self.cut(logits(teacher({"inputs": kwargs or args[0]}))).shape[-1]
        if own != theirs:
            raise UserError(
                f"distillation.teacher: it has {theirs} classes, the student {own}. They must be the same: set "
                "model.num_classes of both, or distillation.options.num_classes where a vocabulary is only padded."
            )

    def both(
        self, moment: Moment, batch: dict[str, Any], output: Any, answer: Any
    ) -> tuple[torch.Tensor, torch.Tensor | TopK, torch.Tensor]:
        """The student's logits [tokens, classes] (a sample of images is one token), the teacher's, and which tokens
        count, bool [tokens]."""
        own = self.cut(logits(output)).flatten(0, -2)
        theirs = answer.at(moment.temperature) if isinstance(answer, Stored) else logits(answer).flatten(0, -2)
        if isinstance(theirs, torch.Tensor):
            theirs = self.cut(theirs)
        targets = batch["targets"].flatten()
        valid = targets != IGNORED if len(targets) == len(own) else torch.ones_like(own[:, 0], dtype=torch.bool)
        return own, theirs, valid

    def cut(self, values: torch.Tensor) -> torch.Tensor:
        return values[..., : self.options.num_classes]
